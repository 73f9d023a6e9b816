"""Linear state-space recurrences: diagonal, so that a step is pointwise and a sequence one pass over memory."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn.cells import CELLS
from fastrnn.composed import Composed
from fastrnn.reference import Weights
from fastrnn.signatures import Device, Given, Input, Result


class DiagonalSSM(Composed):
    r"""A diagonal state-space model (S4D: Gu et al. 2022, arXiv 2206.11893; as a layer of its own matrices: Orvieto et
    al. 2023, arXiv 2303.06349): each unit is a complex number that turns and decays.

    .. math::
        \dot s &= A s + B x, \quad A = -\mathrm{rate} + i \, \mathrm{frequency}, \text{ diagonal} \\
        s_t &= \bar A s_{t-1} + \bar B x_t, \quad \bar A = e^{\Delta A}, \quad \bar B = A^{-1} (\bar A - 1) B \\
        h_t &= \mathrm{Re}(s_t)

    Inputs are held for a step of length :math:`\Delta` (zero-order hold). What reads h is for a `torch.nn.Linear` to
    mix: C and D of the papers. In 16-bit types :math:`\bar A` is rounded as all weights are, which slow decays do not
    stand: 1 - 1/1000 is 1 in bfloat16.

    Args:
        input_size, hidden_size: I and H.
        dt_min, dt_max: the lengths of a step that units start with, log-uniformly between them.
        batch_first, device, dtype: as of torch.nn's layers.
        recompute: as of `fastrnn.LSTM`.

    Attributes:
        log_rate, frequency, log_dt: `[H]`; rate starts as 1/2, the frequency of unit n as pi n (S4D-Lin).
        weight_re, weight_im: the parts of B `[H, I]`, uniform in ±1/sqrt(I) at first.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    cell = CELLS["diagonal"]
    log_rate: Tensor
    frequency: Tensor
    log_dt: Tensor
    weight_re: Tensor
    weight_im: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        batch_first: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, batch_first, recompute)
        for name, dt in {"dt_min": dt_min, "dt_max": dt_max}.items():
            if isinstance(dt, bool) or not isinstance(dt, numbers.Real):
                raise TypeError(f"{name}: expected a number, got {type(dt).__name__}")
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(f"dt_min, dt_max: expected positive numbers in order, got {dt_min!r}, {dt_max!r}")
        self.dt_min, self.dt_max = dt_min, dt_max
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for name in ("log_rate", "frequency", "log_dt"):
            self.register_parameter(name, nn.Parameter(torch.empty(hidden_size, **options)))
        for name in ("weight_re", "weight_im"):
            self.register_parameter(name, nn.Parameter(torch.empty(hidden_size, input_size, **options)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.log_rate.fill_(math.log(0.5))
            self.frequency.copy_(math.pi * torch.arange(self.hidden_size))
            self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
            for weight in (self.weight_re, self.weight_im):
                nn.init.uniform_(weight, -(self.input_size**-0.5), self.input_size**-0.5)

    def discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""The real and imaginary parts of :math:`\bar A` `[H]` and :math:`\bar B` `[H, I]`."""
        dtype = torch.promote_types(self.log_rate.dtype, torch.float32)
        log_rate, frequency, log_dt, w_re, w_im = (
            p.to(dtype) for p in (self.log_rate, self.frequency, self.log_dt, self.weight_re, self.weight_im)
        )
        # z = dt A = x + iy, with an x that is not 0: the quotient below is 1 where z vanishes.
        dt = log_dt.exp()
        x, y = -(log_rate.exp() * dt + torch.finfo(dtype).tiny), frequency * dt
        a_re, a_im = x.exp() * y.cos(), x.exp() * y.sin()
        # B's factor (e^z - 1) / A = dt (e^z - 1) / z, without the difference of numbers close to 1; both sides of the
        # fraction are divided by the size of z, whose square might be 0 or infinite.
        size = torch.maximum(x.abs(), y.abs()).detach()
        above_re, above_im = (x.expm1() * y.cos() - 2 * (y / 2).sin().square()) / size, a_im / size
        x, y = x / size, y / size
        s_re = (dt * (above_re * x + above_im * y) / (x.square() + y.square()))[:, None]
        s_im = (dt * (above_im * x - above_re * y) / (x.square() + y.square()))[:, None]
        b_re, b_im = s_re * w_re - s_im * w_im, s_re * w_im + s_im * w_re
        dtype = self.log_rate.dtype
        return a_re.to(dtype), a_im.to(dtype), b_re.to(dtype), b_im.to(dtype)

    def forward(
        self, input: Input, hx: Given = None, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> Result:
        """As of `fastrnn.LSTM`, with the real and the imaginary part of s `[1, B, H]` for the states."""
        return super().forward(input, hx, lengths, resets)

    def composed(self) -> Weights:
        a_re, a_im, b_re, b_im = self.discrete()
        return Weights(torch.cat([b_re, b_im]), None, w_own=torch.stack([a_re, a_im]))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dt_min={self.dt_min}, dt_max={self.dt_max}"
