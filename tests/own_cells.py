"""Three cells of one's own, for the tests: with two states, with two stages, with unit weights and masks."""

import torch

import fastrnn
from fastrnn import clipped, regularized
from fastrnn.cells import CELLS
from fastrnn.schema import add_cell


def name_of(cell):
    """Of a cell or its name: what a test with it is called in every process."""
    return getattr(cell, "name", cell)


@fastrnn.cell(gates="a b d", states="h c")
def two_states(x, u, h, c):
    """A gate with a product of the input alone, one with a recurrent product alone."""
    a, b = torch.sigmoid(x.a), torch.sigmoid(u.b(h))
    c = a * c + (1 - a) * torch.tanh(x.d + u.d(h))
    return b * torch.tanh(c) + 0.1 * h, c


@fastrnn.cell(gates="r s t", states="h c")
def two_stages(x, u, h, c, *, scale=0.5):
    """Two gates have the second product, whose operand another state is a part of."""
    r = torch.sigmoid(x.r + u.r(h))
    operand = scale * r * (h + c)
    c = r * c + (1 - r) * torch.tanh(x.s + u.s(operand))
    return c * torch.sigmoid(x.t + u.t(operand)), c


@fastrnn.cell(gates="z n", states="h c m", unit_weights="p q", masks="keep drop")
def given_much(x, u, h, c, m, p, q, keep, drop):
    """A zoneout of its state, a peephole, and a third state that is a largest value."""
    z = torch.sigmoid(x.z + u.z(h) + p * c)
    c = keep * c + (1 - keep) * (z * c + (1 - z) * torch.tanh(x.n + u.n(h)))
    return drop * torch.tanh(q * c) / (2 + torch.exp(m)), c, torch.maximum(m, c)


OWN = [two_states, two_stages, given_much]


def of_options() -> list[str]:
    """The names of cells that options of modules make of others."""
    names = [clipped.lstm(0.4)]
    for base, drops, zoned in (("lstm", True, (True, True)), ("gru", False, (True,)), ("rnn_tanh", True, (False,))):
        made = regularized.noisy(base, drops, zoned)
        if made.name not in CELLS:
            add_cell(made)
        names.append(made.name)
    return names
