"""From equations to structs of C++: what is kept, what is computed, and what cannot be made a kernel."""

import ctypes
import itertools
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from fastrnn import cells, codegen
from fastrnn.cells import Cell, relu, sigmoid, tanh
from fastrnn.equation import EquationError, record

ROOT = codegen.TARGET.parents[2]

# ---- cells of this file, which need more of the generator than the built-in ones


def minimal_gated_unit(x, u, h):
    """Zhou et al. 2016, with the forget gate before the product."""
    f = sigmoid(x.f + u.f(h))
    n = tanh(x.n + u.n(f * h))
    return (1 - f) * h + f * n


def private_gate_first(x, u, h):
    """The gate whose two gradients differ is the first one; numbers, a minus, a value that is used twice."""
    a = tanh(x.a - 0.5 * u.a(h))
    b = sigmoid(x.b + u.b(h))
    return a * b + (a - 0.25) * h - b


def reset_that_stays(x, u, h, c):
    """Two states and two products; the first product's gates act on both sides of the second one."""
    r, z = sigmoid(x.r + u.r(h)), sigmoid(x.z + u.z(h) * x.r)
    n = relu(x.n + u.n(r * h))
    c = r * c + (1 - r) * n
    return x.z - u.r(h) - z * tanh(c) + r * h, c


def names_that_clash(x, u, h, c):
    """With words of C++, with the arguments of the kernels, with each other and with what has no name."""
    new, t1 = sigmoid(x.new + u.new(h)), sigmoid(x.b + u.b(h))
    dh, V, saved, c_t = t1 * new, tanh(x.d + u.d(h)), relu(x.e + u.e(h)), t1 * c
    c = c_t + new * V
    return dh * tanh(c) + saved * t1 + 0.1875 * V + 1048577 * dh, c


def without_products(x, u, h):
    """Linear, with a gate that is not asked for."""
    return 0.5 * h + x.a


def rectified_interpolation(x, u, h):
    """Of values without a bound: what is n + z * (h - n) elsewhere would lose h."""
    z = sigmoid(x.z + u.z(h))
    return z * h + (1 - z) * relu(x.n + u.n(h))


OWN = [
    Cell("names_that_clash", ("new", "b", "d", "e"), ("h", "c"), names_that_clash),
    Cell("without_products", ("a", "b"), ("h",), without_products),
    Cell("rectified_interpolation", ("z", "n"), ("h",), rectified_interpolation),
    Cell("minimal_gated_unit", ("f", "n"), ("h",), minimal_gated_unit),
    Cell("private_gate_first", ("a", "b"), ("h",), private_gate_first),
    Cell("reset_that_stays", ("r", "z", "n"), ("h", "c"), reset_that_stays),
]
ALL = [*cells.CELLS.values(), *OWN]

HARNESS = """
// in: x [G], h [G], h_prev, c_prev, dh, dc, w; out: h_t, c_t, dx [G], dproduct [G], dh_prev, dc_prev.
// A second product is w times its operand.
template <class Cell>
void run_cell(const double* in, double* out) {{
  constexpr int G = Cell::kGates, S = Cell::kSaved, R = Cell::kGrads, first = G - Cell::kSecondGates;
  const double *x = in, h_prev = in[2 * G], c_prev = in[2 * G + 1], dh = in[2 * G + 2];
  [[maybe_unused]] const double w = in[2 * G + 4];
  double h[G], saved[S], grads[R], c = c_prev, dc = in[2 * G + 3], dh_prev;
  for (int g = 0; g < G; ++g) h[g] = in[G + g];
  if constexpr (Cell::kSecondGates > 0) {{
    const double operand = Cell::first(x, h, h_prev, saved);
    for (int g = 0; g < first; ++g) h[g] = NAN;  // the second phase has no products of the first
    for (int g = first; g < G; ++g) h[g] = w * operand;
  }}
  out[0] = Cell::forward(x, h, h_prev, c, saved);
  out[1] = c;
  Cell::backward(saved, h_prev, c_prev, c, dh, dc, grads, dh_prev);
  if constexpr (Cell::kSecondGates > 0) {{
    double doperand = 0;
    for (int g = first; g < G; ++g) doperand += w * grads[Cell::kRecurrentGrad[g]];
    Cell::backward_first(saved, h_prev, doperand, grads, dh_prev);
    if (saved[Cell::kSavedOperand] * w != h[G - 1]) out[0] = NAN;
  }}
  for (int g = 0; g < G; ++g) out[2 + g] = grads[Cell::kInputGrad[g]];
  for (int g = 0; g < G; ++g) out[2 + G + g] = grads[Cell::kRecurrentGrad[g]];
  out[2 + 2 * G] = dh_prev, out[3 + 2 * G] = dc;
}}
extern "C" void run(const double* in, double* out) {{ run_cell<fastrnn::{name}>(in, out); }}
"""


def header_of(cell):
    """To be compiled from anywhere."""
    made = codegen.header([cell]).replace('"cell.h"', f'"{codegen.TARGET.parent / "cell.h"}"')
    return made.replace("#pragma once", "")


def compiled(cell, folder):
    source = folder / f"{cell.name}.cpp"
    source.write_text(header_of(cell) + HARNESS.format(name=codegen.class_name(cell)))
    library = source.with_suffix(".so")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).run


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_struct_is_the_equation_and_its_derivative(cell, tmp_path):
    """Against autograd in float64, to a few roundings."""
    run = compiled(cell, tmp_path)
    made = record(cell)
    G = len(cell.gates)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.randn(2 * G + 5, generator=generator, dtype=torch.float64)
        out = torch.empty(2 * G + 4, dtype=torch.float64)
        run(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        x, products = values[:G].clone().requires_grad_(), values[G : 2 * G].clone().requires_grad_()
        x.grad, products.grad = torch.zeros_like(x), torch.zeros_like(products)
        states = [values[2 * G + i].clone().requires_grad_() for i in range(len(cell.states))]
        second = []

        def product(g, states=states, products=products, w=values[-1], second=second):
            def of(operand):
                if operand is states[0]:
                    return products[g]
                second.append((w * operand).requires_grad_())
                second[-1].retain_grad()
                return second[-1]

            return of

        given = SimpleNamespace(**{name: x[g] for g, name in enumerate(cell.gates)})
        results = cell.equation(given, SimpleNamespace(**{n: product(g) for g, n in enumerate(cell.gates)}), *states)
        results = results if isinstance(results, tuple) else (results,)
        sum(d * result for d, result in zip(values[2 * G + 2 :], results, strict=False)).backward()
        assert len(second) == len(made.second)
        for g, value in zip(made.second, second, strict=True):
            products.grad[g] = value.grad
        of_states = [torch.zeros(()).double() if state.grad is None else state.grad for state in states]
        expected = [*results, *x.grad, *products.grad, *of_states]
        if len(states) == 1:
            expected.insert(1, out[1])  # no c
        torch.testing.assert_close(
            out[: len(expected)], torch.stack([e.detach() for e in expected]), rtol=1e-12, atol=1e-12
        )


VECTORS = """
#include "{root}/csrc/cpu/vec.h"
{struct}
using F = fastrnn::cpu::base::Vec<float>;
using D = fastrnn::cpu::base::Vec<double>;
template F fastrnn::{name}::forward(const F*, const F*, F, F&, F*);
template void fastrnn::{name}::backward(const D*, D, D, D, D, D&, D*, D&);
"""


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_struct_compiles_for_vectors(cell, tmp_path):
    source = tmp_path / "vectors.cpp"
    source.write_text(VECTORS.format(root=ROOT, struct=header_of(cell), name=codegen.class_name(cell)))
    flags = ["-std=c++17", "-fsyntax-only", "-DFASTRNN_ISA=base", "-Wno-psabi"]
    subprocess.run(["g++", *flags, str(source)], check=True)


SIZES = {"lstm": (4, 4), "gru": (4, 4), "gru_reset_before": (4, 3), "rnn_tanh": (1, 1), "rnn_relu": (1, 1)}


@pytest.mark.parametrize("name", SIZES)
def test_keeps_no_more_than_it_has_to(name):
    """Vectors kept for backward, and gradients per step: what the best hand-written kernels of these cells have."""
    text = codegen.struct(cells.CELLS[name])
    assert tuple(int(re.search(rf"{size} = (\d+)", text)[1]) for size in ("kSaved", "kGrads")) == SIZES[name]


def test_equal_values_are_computed_once():
    def twice(x, u, h):
        a = sigmoid(x.a + u.a(h))
        return a * h + sigmoid(u.a(h) + x.a)

    assert codegen.struct(Cell("twice", ("a",), ("h",), twice)).count("sigmoid(") == 1


def test_minimum_cut():
    """Against all cuts of small graphs."""
    generator = torch.Generator().manual_seed(0)
    nodes = list("sabcdt")
    for _ in range(50):
        edges = {
            (a, b): float(torch.randint(1, 9, (), generator=generator))
            for a, b in itertools.permutations(nodes, 2)
            if torch.rand((), generator=generator) < 0.5
        }
        sides = [{"s", *inner} for size in range(5) for inner in itertools.combinations("abcd", size)]
        cost = {frozenset(side): sum(c for (a, b), c in edges.items() if a in side and b not in side) for side in sides}
        assert cost[frozenset(codegen.minimum_cut(edges, "s", "t"))] == min(cost.values())


def test_rectified_interpolation_keeps_the_state():
    assert "h_prev - " not in codegen.struct(OWN[2])


def test_more_gates_or_states_than_the_kernels_have():
    for gates, states in ("abcde", "h"), ("a", "hcm"):
        with pytest.raises(EquationError, match="expected at most 4 gates and 2 states"):
            record(Cell("many", tuple(gates), tuple(states), adds_a_string))


# ---- equations that cannot be kernels


def branches(x, u, h):
    return h if x.a else u.a(h)


def unknown_operation(x, u, h):
    return (x.a + u.a(h)).logsumexp(-1)


def unknown_gate(x, u, h):
    return x.a + u.b(h)


def missing_state(x, u, h, c):
    return x.a + u.a(h)


def returns_a_number(x, u, h):
    return 0


def two_operands(x, u, h):
    return u.a(h) + u.a(2 * h)


def second_product_first(x, u, h):
    return u.a(x.b * h) + u.b(h)


def product_of_its_own(x, u, h):
    return u.b(u.b(h))


def operand_of_another_state(x, u, h, c):
    return u.b(c * h), c


def adds_a_string(x, u, h):
    return x.a + "1"


def divides(x, u, h):
    return x.a / 2 + u.a(h)


def squares(x, u, h):
    return h**2


def compares(x, u, h):
    return h if h == 0 else x.a


def adds_a_tenth(x, u, h):
    return x.a + 0.1


def only_products_of_something_else(x, u, h):
    return x.a + u.b(tanh(h)) + u.a(tanh(h))


def first_phase_reads_c(x, u, h, c):
    a = sigmoid(x.a + u.a(h) + c)
    c = a * c + tanh(x.b + u.b(sigmoid(h)))
    return tanh(c) * a, c


def operand_of_the_new_c(x, u, h, c):
    r = sigmoid(x.a)
    return tanh(x.b + u.b(r * h)) + c, r


BAD = {
    divides: ("expected + - *, sigmoid, tanh, relu", "x.a / 2"),
    squares: ("expected + - *, sigmoid, tanh, relu", "h**2"),
    compares: ("cannot branch on a value", "h == 0"),
    adds_a_tenth: ("0.1 is no number of float32", "x.a + 0.1"),
    only_products_of_something_else: ("and not the only one", "def only_products_of_something_else"),
    first_phase_reads_c: ("is wanted where the kernels do not have it", "def first_phase_reads_c"),
    operand_of_the_new_c: ("is wanted where the kernels do not have it", "def operand_of_the_new_c"),
    branches: ("cannot branch on a value", "h if x.a else"),
    unknown_operation: ("logsumexp is not an operation of a cell", "logsumexp(-1)"),
    unknown_gate: ("there is no gate b", "u.b(h)"),
    missing_state: ("expected the new h, c, got a value", "def missing_state"),
    returns_a_number: ("expected the new h, got int", "def returns_a_number"),
    two_operands: ("u.a has two operands", "u.a(2 * h)"),
    second_product_first: ("has to be the last one", "def second_product_first"),
    product_of_its_own: ("u.b has two operands", "u.b(u.b(h))"),
    operand_of_another_state: ("may depend on h, but not on c", "def operand_of_another_state"),
    adds_a_string: ("expected a value of the step or a number, got str", 'x.a + "1"'),
}


@pytest.mark.parametrize("equation", BAD, ids=lambda equation: equation.__name__)
def test_bad_equation_names_its_line(equation):
    what, line = BAD[equation]
    gates = ("a",) if equation is unknown_gate else ("a", "b")
    states = ("h", "c") if "c" in equation.__code__.co_varnames[: equation.__code__.co_argcount] else ("h",)
    with pytest.raises(EquationError, match=re.escape(what)) as error:
        codegen.struct(Cell(equation.__name__, gates, states, equation))
    assert line in str(error.value)
    assert f"{__file__}:" in str(error.value)
