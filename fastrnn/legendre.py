"""The Legendre memory: a linear system whose state holds the last theta steps of its input as Legendre coefficients
(Voelker, Kajić and Eliasmith 2019), and the Legendre memory unit, which is built around it."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastrnn import autocast, functional, layers
from fastrnn.cells import CELLS
from fastrnn.composed import Composed
from fastrnn.recurrent import _check_size
from fastrnn.reference import Weights
from fastrnn.schema import accumulator
from fastrnn.signatures import Device, Given, Input, Result, States
from fastrnn.stream import NotCopied, Stream

CHUNK = 32  # steps whose responses are one product; twice as many or half as many take longer


def continuous(order: int) -> tuple[Tensor, Tensor]:
    r"""A `[d, d]` and B `[d]` of :math:`\theta \dot m = A m + B u`, in float64.

    .. math:: a_{ij} = (2i + 1) \begin{cases} -1 & i < j \\ (-1)^{i-j+1} & i \ge j \end{cases}, \quad
        b_i = (2i + 1) (-1)^i
    """
    _check_size("order", order)
    i = torch.arange(order, dtype=torch.float64)
    sign = 1 - 2 * (i % 2)
    below = -sign[:, None] * sign
    a = (2 * i + 1)[:, None] * torch.where(i[:, None] < i, -1.0, below)
    return a, (2 * i + 1) * sign


def discrete(order: int, theta: float) -> tuple[Tensor, Tensor]:
    r"""The system for inputs that are held for a step (zero-order hold), in float64.

    .. math:: m_t = \bar A m_{t-1} + \bar B u_t, \quad \bar A = e^{A / \theta}, \quad \bar B = A^{-1} (\bar A - 1) B

    Args:
        order: d.
        theta: the length of the window in steps.

    Raises:
        ValueError: `order` is less than 1, or `theta` not a positive number.
    """
    a, b = continuous(order)
    if isinstance(theta, bool) or not isinstance(theta, numbers.Real) or not 0 < theta < math.inf:
        raise ValueError(f"theta: expected a positive number of steps, got {theta!r}")
    both = torch.zeros(order + 1, order + 1, dtype=torch.float64)
    both[:order, :order], both[:order, order] = a / theta, b / theta
    both = torch.linalg.matrix_exp(both)
    return both[:order, :order].contiguous(), both[:order, order].contiguous()


_discrete = functools.lru_cache(16)(discrete)


def polynomials(order: int, at: Tensor) -> Tensor:
    r"""The shifted Legendre polynomials :math:`P_i(r) = (-1)^i \sum_j \binom{i}{j} \binom{i+j}{j} (-r)^j`, i < order.

    Args:
        at: r `[N]`, 0 to 1.

    Returns:
        `[N, order]`, in float64.
    """
    return torch.from_numpy(np.polynomial.legendre.legvander(2 * at.double().numpy() - 1, order - 1))


class LegendreMemory(nn.Module):
    r"""The last `theta` steps of each input, as Legendre coefficients.

    .. math:: m_t = \bar A m_{t-1} + \bar B u_t, \quad u_{t - r \theta} \approx \sum_i P_i(r) m_{t,i}

    It has no parameters. Chunks of steps are computed in parallel: their responses to the inputs are one product with
    the powers of :math:`\bar A`, and only the states between chunks follow one another. With lengths or resets it is a
    fused layer of B*I rows instead, step after step.

    Args:
        order: d, how many coefficients.
        theta: the length of the window in steps.
        batch_first: as of torch.nn's layers.
        device, dtype: of the buffers, `A [d, d]` and `B [d]` in discrete time among them.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    A: Tensor
    B: Tensor
    _responses: Tensor
    _carry: Tensor

    def __init__(
        self,
        order: int,
        theta: float,
        batch_first: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        discrete(order, theta)  # checks them
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first: expected a bool, got {type(batch_first).__name__}")
        self.order, self.theta, self.batch_first = order, theta, batch_first
        shapes: dict[str, tuple[int, ...]] = {"A": (order, order), "B": (order,)}
        shapes |= {"_responses": (CHUNK, CHUNK * order), "_carry": (CHUNK, order, order)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Computes the buffers, in float64, from `order` and `theta`: they are in no `state_dict`."""
        a, b = discrete(self.order, self.theta)
        powers = [torch.eye(self.order, dtype=torch.float64)]
        for _ in range(CHUNK):
            powers.append(a @ powers[-1])
        stacked = torch.stack(powers)
        lag = torch.arange(CHUNK) - torch.arange(CHUNK)[:, None]  # [from, to]
        responses = torch.where((lag >= 0)[:, :, None], (stacked @ b)[lag.clamp(min=0)], 0)
        made = {"A": a, "B": b, "_responses": responses.flatten(1), "_carry": stacked[1:].transpose(1, 2)}
        for name, value in made.items():
            getattr(self, name).copy_(value)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the memory over each feature of the input.

        Args:
            input: `[T, B, I]`, `[B, T, I]` with `batch_first`.
            hx: the state before the first step `[B, I, d]`. Zero if None.
            lengths, resets: as of `fastrnn.LSTM`.

        Returns:
            The states of all steps `[T, B, I, d]` (`[B, T, I, d]`) and the last one `[B, I, d]`.

        Raises:
            TypeError, ValueError: a dimension, dtype, size or value is wrong.
        """
        if not isinstance(input, Tensor) or input.dim() != 3 or input.dtype != self.A.dtype:
            given = f"{input.dim()} of {input.dtype}" if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"input: expected 3 dimensions of {self.A.dtype}, got {given}")
        u = input.transpose(0, 1) if self.batch_first else input
        T, B, I = u.shape
        if hx is not None and (hx.shape != (B, I, self.order) or hx.dtype != u.dtype):
            raise ValueError(
                f"hx: expected shape {(B, I, self.order)} of {u.dtype}, got {tuple(hx.shape)} of {hx.dtype}"
            )
        state = u.new_zeros(B * I, self.order) if hx is None else hx.reshape(B * I, self.order)
        if lengths is not None or (resets is not None and T > 0):
            lengths, resets = layers._check_rows(u, lengths, resets, True, self.batch_first)
            states, last = self._by_steps(u, state, lengths, resets)
        elif T == 0:
            states, last = u.new_empty(T, B, I, self.order), state
        else:
            states, last = self._by_chunks(u, state)
        return (states.transpose(0, 1) if self.batch_first else states), last.view(B, I, self.order)

    def _by_steps(
        self, u: Tensor, state: Tensor, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        T, B, I = u.shape
        dtype = accumulator(u.dtype)  # 16 bits would lose what the matrices differ from 1 and 0 by
        with autocast.off(u.device.type):
            states, last, _ = functional.rnn(
                "lmu",
                u.reshape(T, B * I, 1).to(dtype),
                state[None].to(dtype),
                None,
                [[self._weights(dtype)]],
                lengths=None if lengths is None else lengths.repeat_interleave(I),
                resets=None if resets is None else resets.repeat_interleave(I, dim=1),
            )
        return states.view(T, B, I, self.order).to(u.dtype), last.to(u.dtype)

    def _by_chunks(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        T, B, I = u.shape
        chunks = (T + CHUNK - 1) // CHUNK
        # What is not finite would reach the steps before it, by products with 0: it is left out, and put back.
        spoilt = (u.detach() * 0).cumsum(0)
        u = torch.where(spoilt.isnan(), 0, u).reshape(T, B * I)
        padded = nn.functional.pad(u, (0, 0, 0, chunks * CHUNK - T)).view(chunks, CHUNK, B * I)
        own = padded.transpose(1, 2) @ self._responses  # within chunks, [chunks, B*I, CHUNK*d]
        own = own.view(chunks, B * I, CHUNK, self.order)
        before = []
        for last in own[:, :, -1].unbind():
            before.append(state)
            state = last + state @ self._carry[-1]
        carried = torch.stack(before) @ self._carry.transpose(0, 1).reshape(self.order, -1)
        states = own + carried.view_as(own)
        states = states.transpose(1, 2).reshape(chunks * CHUNK, B, I, self.order)[:T] + spoilt[..., None]
        return states, states[-1]

    def decoder(self, delays: Tensor) -> Tensor:
        """What reads the inputs of some steps ago out of a state: `m @ decoder.T`.

        Args:
            delays: `[N]`, in steps: 0 is the last input, theta - 1 the first one of the window.

        Returns:
            :math:`P_i((delay + 1/2) / \\theta)`, `[N, d]`: an input is held for a step, and its middle is what is read.
        """
        return polynomials(self.order, (torch.as_tensor(delays).cpu() + 0.5) / self.theta).to(self.A)

    def stream(self, batch: int = 1, *, copy: bool = False) -> Stream:
        """One step per call: `m = step(u)`, u `[batch, 1]`, m `[batch, d]`; a row for each row and feature. In 16-bit
        types its matrices are rounded, which long windows and high orders do not stand."""
        return Stream("lmu", [[self._weights(self.A.dtype)]], batch, copy=copy)

    def _weights(self, dtype: torch.dtype) -> Weights:
        """Those of an Elman network whose units are all linear."""
        a, b = self.A, self.B
        if dtype != a.dtype:
            a, b = (part.to(a.device, dtype) for part in _discrete(self.order, self.theta))
        return Weights(b[:, None], a, w_own=a.new_zeros(1, self.order))

    def extra_repr(self) -> str:
        return f"order={self.order}, theta={self.theta}" + (", batch_first=True" if self.batch_first else "")


class LMU(Composed):
    r"""Legendre memory unit (Voelker, Kajić and Eliasmith 2019).

    .. math::
        u_t &= e_x x_t + e_h h_{t-1} + e_m m_{t-1} \\
        m_t &= \bar A m_{t-1} + \bar B u_t \quad \text{for each of the memories} \\
        h_t &= \tanh(W_x x_t + W_h h_{t-1} + W_m m_t + b)

    With u and m put into the equation of h, the step is that of an Elman network with the state [h, m], whose units of
    m are linear: one fused layer of H + M * d units, and gradients through the composition of its matrices. In 16-bit
    types its matrices are rounded as all weights are, which long windows and high orders do not stand.

    Args:
        input_size, hidden_size: I and H.
        order: d, the coefficients of each memory.
        theta: the length of the memories' window in steps.
        memory_size: M, how many memories there are.
        bias: whether there is a b.
        batch_first, device, dtype: as of torch.nn's layers.
        recompute: as of `fastrnn.LSTM`.

    Attributes:
        input_encoders `[M, I]`, hidden_encoders `[M, H]`, memory_encoders `[M, M*d]`: e_x, e_h, e_m, which start as in
            the paper: LeCun's uniform, LeCun's uniform, zero.
        input_kernel `[H, I]`, hidden_kernel `[H, H]`, memory_kernel `[H, M*d]`: W, which start from Xavier's normal.
        bias `[H]`: 0 at first.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    cell = CELLS["lmu"]
    A: Tensor
    B: Tensor
    input_encoders: Tensor
    hidden_encoders: Tensor
    memory_encoders: Tensor
    input_kernel: Tensor
    hidden_kernel: Tensor
    memory_kernel: Tensor
    bias: Tensor | None  # type: ignore[assignment]  # of other layers it says whether there are any

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        order: int,
        theta: float,
        memory_size: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, batch_first, recompute)
        _check_size("memory_size", memory_size)
        if not isinstance(bias, bool):
            raise TypeError(f"bias: expected a bool, got {type(bias).__name__}")
        discrete(order, theta)  # checks them
        self.memory_size, self.order, self.theta = memory_size, order, theta
        I, H, M = input_size, hidden_size, memory_size
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_buffer("A", torch.empty(order, order, **options), persistent=False)
        self.register_buffer("B", torch.empty(order, **options), persistent=False)
        shapes: dict[str, tuple[int, ...]] = {
            "input_encoders": (M, I),
            "hidden_encoders": (M, H),
            "memory_encoders": (M, M * order),
        }
        shapes |= {"input_kernel": (H, I), "hidden_kernel": (H, H), "memory_kernel": (H, M * order), "bias": (H,)}
        for name, shape in shapes.items():
            is_there = bias or name != "bias"
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **options)) if is_there else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters, and computes A and B from `order` and `theta`: they are in no `state_dict`."""
        a, b = discrete(self.order, self.theta)
        self.A.copy_(a)
        self.B.copy_(b)
        for name, parameter in self.named_parameters():
            if name in ("input_encoders", "hidden_encoders"):
                bound = (3 / parameter.shape[1]) ** 0.5
                nn.init.uniform_(parameter, -bound, bound)
            elif name.endswith("kernel"):
                nn.init.xavier_normal_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(
        self, input: Input, hx: Given = None, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> Result:
        """As of `fastrnn.LSTM`, with h `[1, B, H]` and m `[1, B, M*d]` for the states."""
        output, state = super().forward(input, hx, lengths, resets)
        if isinstance(output, nn.utils.rnn.PackedSequence):
            return output._replace(data=output.data[..., : self.hidden_size]), state
        return output[..., : self.hidden_size], state

    def stream(self, batch: int = 1, *, copy: bool = False) -> LMUStream:  # type: ignore[override]
        """As `fastrnn.LSTM.stream`."""
        return LMUStream(super().stream(batch, copy=copy), self.hidden_size)

    def composed(self) -> Weights:
        H, M = self.hidden_size, self.memory_size
        response = torch.kron(torch.eye(M, dtype=self.B.dtype, device=self.B.device), self.B[:, None])  # [M*d, M]
        keep = torch.block_diag(*[self.A] * M)
        of_x = response @ self.input_encoders
        of_h = response @ self.hidden_encoders
        of_m = keep + response @ self.memory_encoders
        w_ih = torch.cat([self.input_kernel + self.memory_kernel @ of_x, of_x])
        upper = torch.cat([self.hidden_kernel + self.memory_kernel @ of_h, self.memory_kernel @ of_m], dim=1)
        w_hh = torch.cat([upper, torch.cat([of_h, of_m], dim=1)])
        b = None if self.bias is None else torch.cat([self.bias, self.bias.new_zeros(len(of_m))])
        share = w_ih.new_zeros(1, len(w_ih))
        share[:, :H] = 1
        return Weights(w_ih, w_hh, b, None if b is None else torch.zeros_like(b), w_own=share)

    def _states(self, hx: Given) -> tuple[Tensor, ...] | None:
        if hx is None:
            return None
        states = layers.as_states(hx, ("h", "m"))
        for name, state, size in zip("hm", states, (self.hidden_size, self.memory_size * self.order), strict=True):
            if not isinstance(state, Tensor):
                raise TypeError(f"hx: {name}: expected a tensor, got {type(state).__name__}")
            if state.dim() == 0 or state.shape[-1] != size:
                raise RuntimeError(f"hx: {name}: expected {size} features, got shape {tuple(state.shape)}")
        return (torch.cat(states, dim=-1),)

    def _state(self, states: tuple[Tensor, ...]) -> States:
        h, m = states[0].split([self.hidden_size, self.memory_size * self.order], dim=-1)
        return h, m

    def _check_states(self, input: Tensor, *states: Tensor) -> None:
        expected = 1, input.size(1), self.hidden_size + self.memory_size * self.order
        for state in states:
            if state.shape != expected:
                raise RuntimeError(f"Expected h and m side by side of size {expected}, got {list(state.shape)}")

    def extra_repr(self) -> str:
        shown = f"{super().extra_repr()}, order={self.order}, theta={self.theta}"
        options = {"memory_size": (self.memory_size, 1), "bias": (self.bias is not None, True)}
        return shown + "".join(f", {k}={value!r}" for k, (value, default) in options.items() if value != default)


class LMUStream(NotCopied):
    """An LMU that advances by one step per call (`fastrnn.Stream`): `h = step(x)`.

    Attributes:
        state: h `[1, batch, H]` and m `[1, batch, M*d]`, views of the stream's own memory.
    """

    def __init__(self, stream: Stream, hidden_size: int) -> None:
        self._stream, self._hidden_size = stream, hidden_size

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        both = self._stream.state
        assert isinstance(both, Tensor)
        return both[:, :, : self._hidden_size], both[:, :, self._hidden_size :]

    @property
    def nbytes(self) -> int:
        """As `fastrnn.Stream.nbytes`."""
        return self._stream.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return self._stream(x)[:, : self._hidden_size]

    def reset(self, rows: Tensor | None = None) -> None:
        """As `fastrnn.Stream.reset`."""
        self._stream.reset(rows)
