"""From equations to structs of C++: what is kept, what is computed, and what cannot be made a kernel."""

import ctypes
import functools
import itertools
import math
import re
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastrnn import cells, codegen, derivatives
from fastrnn.cells import describe, exp, logsigmoid, maximum, relu, sigmoid, step, tanh
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
    """Linear, with no recurrent product."""
    return 0.5 * h + x.a


def rectified_interpolation(x, u, h):
    """Of values without a bound: what is n + z * (h - n) elsewhere would lose h."""
    z = sigmoid(x.z + u.z(h))
    return z * h + (1 - z) * relu(x.n + u.n(h))


def every_operation(x, u, h, c, n):
    """Three states; gates that have the input's product alone, the recurrent one alone, and both."""
    a, b = exp(0.1 * x.a), logsigmoid(u.b(h) - x.d)
    d = maximum(x.d + u.d(h), a) / (2 + sigmoid(c))
    return tanh(n + d) * b, 1 / (3 + n * n) + d, maximum(c, b) - 7 / (2 + relu(n)) + c * step(d - h)


def everything_that_is_given(x, u, h, c, p, q, m, *, alpha):
    """Unit weights and a mask on both sides of the second product, which two gates have; the first phase reads c."""
    r = sigmoid(x.r + u.r(h) + p * c)
    s, t = tanh(x.s + u.s(m * r * h + c)), sigmoid(u.t(m * r * h + c) - q * r)
    return alpha * s * t + p * c, m * c + (1 - m) * s * q


def operand_of_the_new_c(x, u, h, c):
    r = sigmoid(x.a + u.a(h))
    return tanh(x.b + u.b(r * h)) + c, r


def awkward_names(x, u, y, h, carried):
    r"""Words that headers define, states called as others' are, and a backslash where a line may end \\"""
    errno, NULL, M_PI = x.a + u.a(y), sigmoid(x.a), tanh(carried)
    dcarried, assert_, saved = errno * NULL, M_PI + h, relu(errno)
    return dcarried + assert_, h * saved, carried * M_PI + y


OWN = [
    describe(awkward_names, gates="a", states="y h carried"),
    describe(operand_of_the_new_c, gates="a b", states="h c"),
    describe(names_that_clash, gates="new b d e", states="h c"),
    describe(without_products, gates="a", states="h"),
    describe(rectified_interpolation, gates="z n", states="h"),
    describe(minimal_gated_unit, gates="f n", states="h"),
    describe(private_gate_first, gates="a b", states="h"),
    describe(reset_that_stays, gates="r z n", states="h c"),
    describe(every_operation, gates="a b d", states="h c n"),
    replace(
        describe(everything_that_is_given, gates="r s t", states="h c", unit_weights="p q", masks="m"),
        numbers=(("alpha", 0.3),),
    ),
]
ALL = [*cells.CELLS.values(), *OWN]

HARNESS = """
// in: x [G], products [R], states [1 + K], given [U + M], their gradients [1 + K], w; a second product is w times its
// operand, and so is what is normalized. out: states [1 + K], and gradients: dx [G], dproduct [R], dstates [1 + K],
// dgiven [U].
template <class Cell>
void run_cell(const double* in, double* out) {{
  constexpr int G = Cell::kGates, F = Cell::kFirstGates, R = F + Cell::kSecondGates, K = Cell::kCarried;
  constexpr int N = Cell::kUnitWeights + Cell::kMasks;
  const double *const x = in, *const products = x + G, *const states = products + R;
  const double *const grads_after = states + 1 + K + N, h_prev = states[0];
  [[maybe_unused]] const double w = grads_after[1 + K], *const c_prev = states + 1;
  double h[R + 1], c[K + 1], dcarried[K + 1], saved[Cell::kSaved + 1], grads[Cell::kGrads], dh_prev, given[N + 1];
  for (int j = 0; j < N; ++j) given[j] = states[1 + K + j];
  for (int k = 0; k < K; ++k) c[k] = c_prev[k], dcarried[k] = grads_after[1 + k];
  for (int g = 0; g < R; ++g) h[g] = products[g];
  if constexpr (Cell::kSecondGates > 0) {{
    const double operand = Cell::first(x, h, h_prev, given, c_prev, saved);
    for (int g = 0; g < F; ++g) h[g] = NAN;  // the second phase has no products of the first
    for (int g = F; g < R; ++g) h[g] = w * operand;
  }}
  if constexpr (Cell::kNormalizes) {{
    given[N] = w * Cell::first(x, h, h_prev, given, c_prev, saved);
    for (int g = 0; g < R; ++g) h[g] = NAN;
  }}
  *out++ = Cell::forward(x, h, h_prev, given, c, saved);
  for (int k = 0; k < K; ++k) *out++ = c[k];
  Cell::backward(saved, h_prev, given, c_prev, c, grads_after[0], dcarried, grads, dh_prev);
  if constexpr (Cell::kSecondGates > 0) {{
    double doperand = 0;
    for (int g = F; g < R; ++g) doperand += w * grads[Cell::kRecurrentGrad[g]];
    Cell::backward_first(saved, h_prev, given, c_prev, c, doperand, dcarried, grads, dh_prev);
    if (saved[Cell::kSavedOperand] * w != h[R - 1]) dh_prev = NAN;
  }}
  if constexpr (Cell::kNormalizes) {{
    const double doperand = w * grads[Cell::kNormalizedGrad];
    Cell::backward_first(saved, h_prev, given, c_prev, c, doperand, dcarried, grads, dh_prev);
    const double operand = Cell::kOperandState < 0 ? saved[Cell::kSavedOperand] : c[Cell::kOperandState];
    if (operand * w != given[N]) dh_prev = NAN;
  }}
  for (int g = 0; g < G; ++g) *out++ = grads[Cell::kInputGrad[g]];
  for (int g = 0; g < R; ++g) *out++ = grads[Cell::kRecurrentGrad[g]];
  *out++ = dh_prev;
  for (int k = 0; k < K; ++k) *out++ = dcarried[k];
  for (int j = 0; j < Cell::kUnitWeights; ++j) *out++ = grads[Cell::kUnitGrad[j]];
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


def step_by_autograd(cell, made, x, products, states, given, w):
    """The new states, and the products of what is not h by their gates, as leaves of the graph."""
    second = {}

    def product(gate):
        def of(operand):
            if operand is states[0]:
                return products[made.recurrent.index(gate)]
            second[gate] = (w * operand).requires_grad_()
            second[gate].retain_grad()
            return second[gate]

        return of

    names = [
        {cell.gates[g]: of(g) for g in gates}
        for gates, of in ((made.input_gates, lambda g: x[made.input_gates.index(g)]), (made.recurrent, product))
    ]
    results = cell.call(*(SimpleNamespace(**by_name) for by_name in names), *states, *given)
    return results if isinstance(results, tuple) else (results,), second


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
def test_struct_is_the_equation_and_its_derivative(cell, tmp_path, monkeypatch):
    """Against autograd in float64, to a few roundings."""
    run = compiled(cell, tmp_path)
    made = record(cell)
    count = len(made.states)
    sizes = [len(made.inputs), len(made.products), count, len(made.given), count, 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
        out = torch.full((200,), torch.nan, dtype=torch.float64)
        run(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        *parts, grads, w = values.split(sizes)
        x, products, states, given = ([v.clone().requires_grad_() for v in part] for part in parts)
        monkeypatch.setattr(cells, "normalized", lambda value, w=w: w[0] * value)
        results, second = step_by_autograd(cell, made, x, products, states, given, w[0])
        sum(d * result for d, result in zip(grads, results, strict=True)).backward()
        assert sorted(second) == made.second
        of_products = [second.get(g, leaf) for g, leaf in zip(made.recurrent, products, strict=True)]
        leaves = [*x, *of_products, *states, *given[: len(cell.unit_weights)]]
        zero = torch.zeros((), dtype=torch.float64)
        expected = [*results, *(zero if leaf.grad is None else leaf.grad for leaf in leaves)]
        found = out[: len(expected)]
        torch.testing.assert_close(found, torch.stack([e.detach() for e in expected]), rtol=1e-11, atol=1e-12)


VECTORS = """
#include "{root}/csrc/cpu/vec.h"
{struct}
using F = fastrnn::cpu::base::Vec<float>;
using D = fastrnn::cpu::base::Vec<double>;
template F fastrnn::{name}::forward(const F*, const F*, F, const F*, F*, F*);
template void fastrnn::{name}::backward(const D*, D, const D*, const D*, const D*, D, D*, D*, D&);
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

    assert codegen.struct(describe(twice, gates="a", states="h")).count("sigmoid(") == 1


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
        assert cost[frozenset(derivatives.minimum_cut(edges, "s", "t"))] == min(cost.values())


def test_rectified_interpolation_keeps_the_state():
    assert "h_prev - " not in codegen.struct(OWN[4])


NAMES = {
    "five gates": ({"gates": "a b c d e"}, "expected at most 4 gates, got 5"),
    "no gates": ({"gates": ""}, "expected at least one gate and one state"),
    "a gate twice": ({"gates": "a a"}, "'a' is no name for a gate"),
    "no identifier": ({"states": "2h"}, "'2h' is no name for a gate, state"),
    "as the input": ({"states": "x"}, "'x' is no name"),
    "another argument": ({"states": "s"}, "expected an equation of x, u, s: "),
    "one argument more": ({"unit_weights": "p"}, "expected an equation of x, u, h, p: "),
    "a name for two": ({"unit_weights": "h"}, "'h' is no name"),
}


@pytest.mark.parametrize(("change", "text"), NAMES.values(), ids=NAMES)
def test_bad_names(change, text):
    with pytest.raises(EquationError, match=re.escape(text)):
        record(describe(without_products, **({"gates": "a", "states": "h"} | change)))


def test_what_is_no_equation():
    for equation in (lambda x, u, h: x.a, math.tanh, functools.partial(without_products)):
        with pytest.raises(TypeError, match="equation: expected a function with a name of its own"):
            describe(equation, gates="a", states="h")
    with pytest.raises(TypeError, match=r"gates: expected names with blanks between them, got \['a'\]"):
        describe(without_products, gates=["a"], states="h")


def test_numbers():
    def scaled(x, u, h, *, k):
        return np.float32(0.5) * x.a + k * u.a(h)

    with pytest.raises(EquationError, match="k: expected a number, got none, nor has the equation a default"):
        record(describe(scaled, gates="a", states="h"))
    for value in ("1", math.nan, True, None):
        with pytest.raises(EquationError, match="k: expected a number, got "):
            record(replace(describe(scaled, gates="a", states="h"), numbers=(("k", value),)))
    assert "V(0.25)" in codegen.struct(replace(describe(scaled, gates="a", states="h"), numbers=(("k", 0.25),)))


def test_functions_of_torch():
    def by_torch(x, u, h, c):
        a = torch.maximum(torch.sigmoid(x.a + u.a(h)), torch.exp(c))
        return torch.tanh(a) * torch.nn.functional.logsigmoid(a), torch.relu(a) + torch.nn.functional.relu(c)

    def by_method(x, u, h, c):
        a = maximum(sigmoid(x.a + u.a(h)), exp(c))
        return tanh(a) * logsigmoid(a), relu(a) + relu(c)

    texts = [codegen.struct(replace(describe(f, gates="a", states="h c"), name="f")) for f in (by_torch, by_method)]
    assert texts[0] == texts[1]


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


def adds_a_string(x, u, h):
    return x.a + "1"


def squares(x, u, h):
    return h**2


def compares(x, u, h):
    return h if h == 0 else x.a


def adds_infinity(x, u, h):
    return x.a + math.inf


def other_function_of_torch(x, u, h):
    return torch.sin(x.a) + u.b(h)


def reduces(x, u, h):
    return torch.sum(x.a + u.b(h))


def never_reads_the_input(x, u, h):
    return u.a(h) + u.b(h)


def forgets_a_gate(x, u, h):
    return x.a + u.a(h)


def only_products_of_something_else(x, u, h):
    return x.a + u.b(tanh(h)) + u.a(tanh(h))


def adds_in_place(x, u, h):
    z = x.a
    z += u.b(h)
    return z


def function_in_place(x, u, h):
    z = x.a + u.b(h)
    torch.tanh_(z)
    return z


def mixes_with_tensors(x, u, h):
    return torch.maximum(torch.tensor(0.1), x.a + u.b(h))


def calls_a_gate(x, u, h):
    return x.a(h) + u.b(h)


def formats(x, u, h):
    return x.a if f"{h:.2f}" else u.b(h)


def one_value_of_two(x, u, h):
    return (x.a + u.b(h)).maximum()


BAD = {
    adds_in_place: ("an operation in place would write", "z += u.b(h)"),
    function_in_place: ("tanh_ is not an operation of a cell", "torch.tanh_(z)"),
    mixes_with_tensors: ("expected a value of the step or a number, got Tensor", "torch.maximum(torch.tensor(0.1)"),
    calls_a_gate: ("expected + - * /", "x.a(h)"),
    formats: ("expected + - * /", 'f"{h:.2f}"'),
    one_value_of_two: ("maximum: expected 2 values, got 1", ".maximum()"),
    squares: ("expected + - * /, sigmoid, tanh, relu, exp, logsigmoid, step, maximum", "h**2"),
    compares: ("cannot branch on a value", "h == 0"),
    adds_infinity: ("inf is no normal number of float32", "x.a + math.inf"),
    other_function_of_torch: ("sin is not an operation of a cell", "torch.sin(x.a)"),
    reduces: ("sum is not an operation of a cell", "torch.sum("),
    never_reads_the_input: ("nothing reads the input", "def never_reads_the_input"),
    forgets_a_gate: ("no product of gate b is asked for", "def forgets_a_gate"),
    only_products_of_something_else: (
        "all products are of something else than h",
        "def only_products_of_something_else",
    ),
    branches: ("cannot branch on a value", "h if x.a else"),
    unknown_operation: ("logsumexp is not an operation of a cell", "logsumexp(-1)"),
    unknown_gate: ("there is no gate b", "u.b(h)"),
    missing_state: ("expected the new h, c, got a value", "def missing_state"),
    returns_a_number: ("expected the new h, got int", "def returns_a_number"),
    two_operands: ("u.a has two operands", "u.a(2 * h)"),
    second_product_first: ("have to be the last ones", "def second_product_first"),
    product_of_its_own: ("u.b has two operands", "u.b(u.b(h))"),
    adds_a_string: ("expected a value of the step or a number, got str", 'x.a + "1"'),
}


@pytest.mark.parametrize("equation", BAD, ids=lambda equation: equation.__name__)
def test_bad_equation_names_its_line(equation):
    what, line = BAD[equation]
    gates = ("a",) if equation is unknown_gate else ("a", "b")
    states = ("h", "c") if "c" in equation.__code__.co_varnames[: equation.__code__.co_argcount] else ("h",)
    with pytest.raises(EquationError, match=re.escape(what)) as error:
        codegen.struct(describe(equation, gates=" ".join(gates), states=" ".join(states)))
    assert line in str(error.value)
    assert f"{__file__}:" in str(error.value)
