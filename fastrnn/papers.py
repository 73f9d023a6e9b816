"""Layers of cells that torch.nn does not have, under the names of their papers; equations in fastrnn/cells.py."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import torch

from fastrnn.cells import Cell
from fastrnn.recurrent import Recurrent

P = ParamSpec("P")

__all__ = [
    "CTRNN",
    "MGU",
    "QRNN",
    "SLSTM",
    "SRU",
    "IndRNN",
    "JordanRNN",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LightGRU",
    "MinGRU",
    "MinLSTM",
]


def _without_cell(
    init: Callable[Concatenate[Recurrent, Cell | str, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """For constructors that choose the cell: type checkers and `help` see the arguments of `init` but this one. `help`
    also sees the keyword-only ones of the constructor itself, which type checkers take for numbers of the cell."""

    def decorate(constructor: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        taken = [p for name, p in inspect.signature(init).parameters.items() if name != "cell"]
        own = [p for p in inspect.signature(constructor).parameters.values() if p.kind is p.KEYWORD_ONLY]
        taken[-1:-1] = own  # what is given besides comes last
        constructor.__signature__ = inspect.Signature(taken, return_annotation=None)  # type: ignore[attr-defined]
        return constructor

    return decorate


class _Named(Recurrent):
    """`Recurrent` with its cell chosen; the other arguments are the same."""

    _name: str

    @_without_cell(Recurrent.__init__)  # type: ignore[arg-type]  # `cell` might be among **numbers
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(self._name, *args, **options)


class SLSTM(_Named):
    r"""Scalar LSTM of xLSTM (Beck et al. 2024, arXiv 2405.04517), with one head and without its block's normalizations.

    .. math::
        \tilde i, \tilde f, \tilde z, \tilde o &= W_* x_t + b_{i*} + R_* h_{t-1} + b_{h*} \\
        m_t &= \max(\log \sigma(\tilde f) + m_{t-1}, \tilde i) \\
        i, f &= \exp(\tilde i - m_t), \exp(\log \sigma(\tilde f) + m_{t-1} - m_t) \\
        c_t, n_t &= f c_{t-1} + i \tanh(\tilde z), f n_{t-1} + i \\
        h_t &= \sigma(\tilde o) c_t / \max(n_t, 10^{-30})

    Arguments as of `fastrnn.Recurrent` without `cell`; its states are h, c, n and m. A given n has to be positive.
    """

    _name = "slstm"


class MGU(_Named):
    r"""Minimal gated unit (Zhou et al. 2016, arXiv 1603.09420).

    .. math::
        f &= \sigma(W_f x_t + b_{if} + U_f h_{t-1} + b_{hf}) \\
        n &= \tanh(W_n x_t + b_{in} + U_n (f \odot h_{t-1}) + b_{hn}) \\
        h_t &= (1 - f) \odot h_{t-1} + f \odot n

    Arguments as of `fastrnn.Recurrent` without `cell`.
    """

    _name = "mgu"


class LightGRU(_Named):
    r"""Light GRU (Ravanelli et al. 2018, arXiv 1803.10225): no reset gate, a rectifier for tanh.

    .. math::
        z &= \sigma(W_z x_t + b_{iz} + U_z h_{t-1} + b_{hz}) \\
        n &= \mathrm{ReLU}(W_n x_t + b_{in} + U_n h_{t-1} + b_{hn}) \\
        h_t &= z \odot h_{t-1} + (1 - z) \odot n

    The paper also normalizes W x over the batch, which this does not. Arguments as of `fastrnn.Recurrent` without
    `cell`.
    """

    _name = "light_gru"


class CTRNN(_Named):
    r"""Continuous-time network (Beer 1995) by Euler's method, with a trainable leak = dt / tau for each unit.

    .. math::
        v_t &= v_{t-1} + \mathrm{leak} \odot (W x_t + b_i + U \tanh(v_{t-1}) + b_h - v_{t-1}) \\
        h_t &= \tanh(v_t)

    Arguments as of `fastrnn.Recurrent` without `cell`; its states are h and v, of which a given h is tanh of v.
    `leak`: what the leaks start from.
    """

    _name = "ctrnn"

    @_without_cell(Recurrent.__init__)  # type: ignore[arg-type]
    def __init__(self, *args: Any, leak: float = 0.5, **options: Any) -> None:
        if isinstance(leak, bool) or not isinstance(leak, int | float) or not math.isfinite(leak):
            raise ValueError(f"leak: expected a finite number, got {leak!r}")
        self._leak = leak
        super().__init__(*args, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, leak={self._leak}"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _fill(self, "leak", self._leak)


class JordanRNN(_Named):
    r"""Jordan network (Jordan 1986): what is fed back is the output.

    .. math::
        n_t &= \tanh(W x_t + b_i + U y_{t-1} + b_n) \\
        y_t &= \sigma(V n_t + b_y)

    Arguments as of `fastrnn.Recurrent` without `cell`. `weight_hh_l[k]` is U, then V; the state is y.
    """

    _name = "jordan"


class IndRNN(_Named):
    r"""Independently recurrent network (Li et al. 2018, arXiv 1803.04831).

    .. math:: h_t = \mathrm{ReLU}(W x_t + b + w \odot h_{t-1})

    Arguments as of `fastrnn.Recurrent` without `cell`. w starts uniform in [0, 1], as in the paper.
    """

    _name = "indrnn"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("w_l"):
                torch.nn.init.uniform_(parameter, 0, 1)


class SRU(_Named):
    r"""Simple recurrent unit (Lei et al. 2018, arXiv 1709.02755).

    .. math::
        f &= \sigma(W_f x_t + v_f \odot c_{t-1} + b_f) \\
        r &= \sigma(W_r x_t + v_r \odot c_{t-1} + b_r) \\
        c_t &= f \odot c_{t-1} + (1 - f) \odot (W x_t + b) \\
        h_t &= r \odot c_t + (1 - r) \odot (W_p x_t + b_p)

    The paper has :math:`x_t` in place of :math:`W_p x_t` where its size is that of h. Arguments as of
    `fastrnn.Recurrent` without `cell`; its states are h and c.
    """

    _name = "sru"


class QRNN(_Named):
    r"""Quasi-recurrent network (Bradbury et al. 2017, arXiv 1611.01576) with fo-pooling, for a window of one step.

    .. math::
        z, f, o &= \tanh(W_z x_t + b_z), \sigma(W_f x_t + b_f), \sigma(W_o x_t + b_o) \\
        c_t &= f \odot c_{t-1} + (1 - f) \odot z \\
        h_t &= o \odot c_t

    Arguments as of `fastrnn.Recurrent` without `cell`; its states are h and c.
    """

    _name = "qrnn"


class MinGRU(_Named):
    r"""minGRU (Feng et al. 2024, arXiv 2410.01201).

    .. math::
        z &= \sigma(W_z x_t + b_z) \\
        h_t &= (1 - z) \odot h_{t-1} + z \odot (W_n x_t + b_n)

    Arguments as of `fastrnn.Recurrent` without `cell`.
    """

    _name = "mingru"


class MinLSTM(_Named):
    r"""minLSTM (Feng et al. 2024, arXiv 2410.01201), with the gates divided by their sum.

    .. math::
        f, i &= \sigma(W_f x_t + b_f), \sigma(W_i x_t + b_i) \\
        h_t &= (f \odot h_{t-1} + i \odot (W_n x_t + b_n)) / (f + i)

    With `return_states=True`, the gate f is f / (f + i), and i the logarithm of i: what its kernels compute with.
    Arguments as of `fastrnn.Recurrent` without `cell`.
    """

    _name = "minlstm"


class LayerNormLSTM(_Named):
    r"""LSTM with layer normalization (Ba et al. 2016, arXiv 1607.06450), in fused kernels on the CPU.

    .. math::
        i, f, g, o &= \mathrm{LN}_x(W x_t) + \mathrm{LN}_h(U h_{t-1}) \\
        c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
        h_t &= \sigma(o) \odot \tanh(\mathrm{LN}_c(c_t))

    LN(v) = gain * (v - mean) / sqrt(variance + 1e-5) + bias; LN_x and LN_h over all four gates together, with the gains
    `gain_ih_l[k]` and `gain_hh_l[k]` `[4*H]` and the biases `bias_ih_l[k]` and `bias_hh_l[k]`; LN_c with `gain_c_l[k]`
    and `bias_c_l[k]` `[H]`. Gains start at 1, biases at 0.

    There are two definitions. This is the paper's and Haste's: c is normalized where the output reads it. With
    `carries_normalized=True` it is that of PyTorch's `benchmarks/fastrnns`: LN_c(c_t) is what goes on to the next step,

    .. math::
        c_t &= \mathrm{LN}_c(\sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g)) \\
        h_t &= \sigma(o) \odot \tanh(c_t)

    Other arguments as of `fastrnn.Recurrent` without `cell`; with `recompute`, y alone is kept, and the backward pass
    begins with another forward pass. Second derivatives and tangents, and all of it on a GPU, run step by step in
    torch's operations.
    """

    @_without_cell(Recurrent.__init__)  # type: ignore[arg-type]  # `cell` might be among **numbers
    def __init__(self, *args: Any, carries_normalized: bool = False, **options: Any) -> None:
        if not isinstance(carries_normalized, bool):
            raise TypeError(f"carries_normalized: expected a bool, got {type(carries_normalized).__name__}")
        self._name = "layer_norm_lstm_carried" if carries_normalized else "layer_norm_lstm"
        super().__init__(*args, **options)


class LayerNormGRU(_Named):
    r"""GRU with layer normalization (Ba et al. 2016, arXiv 1607.06450), in fused kernels on the CPU.

    .. math::
        r, z &= \sigma(\mathrm{LN}_x(W_{rz} x_t) + \mathrm{LN}_h(U_{rz} h_{t-1})) \\
        n &= \tanh(\mathrm{LN}_x(W_n x_t) + r \odot \mathrm{LN}_h(U_n h_{t-1})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    LN(v) = gain * (v - mean) / sqrt(variance + 1e-5) + bias, with the gains `gain_ih_l[k]` and `gain_hh_l[k]` `[3*H]`
    and the biases `bias_ih_l[k]` and `bias_hh_l[k]`. Gains start at 1, biases at 0.

    There are two definitions. This is the paper's: means and variances of both gates' products together, of n's by
    themselves. With `joint=True` it is Haste's: of all three together.

    Other arguments as of `fastrnn.Recurrent` without `cell`; with `recompute`, y alone is kept, and the backward pass
    begins with another forward pass. Second derivatives and tangents, and all of it on a GPU, run step by step in
    torch's operations.
    """

    @_without_cell(Recurrent.__init__)  # type: ignore[arg-type]  # `cell` might be among **numbers
    def __init__(self, *args: Any, joint: bool = False, **options: Any) -> None:
        if not isinstance(joint, bool):
            raise TypeError(f"joint: expected a bool, got {type(joint).__name__}")
        self._name = "layer_norm_gru_joint" if joint else "layer_norm_gru"
        super().__init__(*args, **options)


def _fill(module: Recurrent, unit_weight: str, value: float) -> None:
    """Sets a unit weight of all layers and directions."""
    for name, parameter in module.named_parameters():
        if name.startswith(f"{unit_weight}_l"):
            torch.nn.init.constant_(parameter, value)
