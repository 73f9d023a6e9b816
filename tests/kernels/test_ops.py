"""The op pair as PyTorch sees it: schemas, fakes, tracing, export, autocast, and what is refused."""

import re

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.optests import opcheck

import fastrnn
from fastrnn import ops
from fastrnn.reference import Weights

FORWARD, BACKWARD = torch.ops.fastrnn.layer_forward.default, torch.ops.fastrnn.layer_backward.default
CELL_VARIANTS = pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def op_arguments(case):
    return [*case.op_inputs(), case.lengths, case.resets, case.masks, case.cell]


@CELL_VARIANTS
@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False)], ids=["bias", "no-bias"])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_opcheck(cell, P, dtype, bias, T):
    case = make_case(cell, T, 2, 3, 4, P=P, D=2, bias=bias, dtype=dtype, lengths=True, resets=True)
    case.tensors[0] = case.tensors[0].transpose(0, 1).contiguous().transpose(0, 1)  # dense, but not in order
    arguments = op_arguments(case)
    opcheck(FORWARD, (*arguments, True))
    opcheck(FORWARD, (*arguments, False))
    y, _, c_n, saved, saved_c = FORWARD(*arguments, True)
    grads = (torch.ones_like(y), None, torch.ones_like(c_n) if case.tensors[2] is not None else None)
    results = 3 + len(arguments[3])
    opcheck(BACKWARD, (*grads, *arguments, y, saved, saved_c, [True] * results))
    opcheck(BACKWARD, (*grads, *arguments, y, saved, saved_c, [False] * results))


def test_raw_ops_refuse_autograd():
    """A direct backward raises; it does not leave a gradient out."""
    case = make_case("gru", 3, 2, 3, 4).to(torch.float64, requires_grad=True)
    y = FORWARD(*op_arguments(case), True)[0]
    with pytest.raises(RuntimeError, match="not implemented"):
        y.sum().backward()


MODULES = {
    "rnn": lambda: fastrnn.RNN(3, 4),
    "gru-stack": lambda: fastrnn.GRU(3, 4, 2, bidirectional=True),
    "lstm-stack": lambda: fastrnn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
    "gru-reset-before": lambda: fastrnn.GRU(3, 4, reset_after=False),
}


@pytest.fixture(params=MODULES.values(), ids=MODULES)
def module(request):
    torch.manual_seed(0)
    return request.param()


@pytest.mark.parametrize("rows", ["plain", "lengths+resets"])
def test_compile(module, rows):
    """One graph, forward and training, with the same bits as eager."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    x = torch.randn(5, 3, 3)
    options = {"lengths": torch.tensor([5, 0, 3]), "resets": torch.rand(5, 3) < 0.3} if ROWS[rows] else {}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, **options)[0], module(x, **options)[0])
    results = []
    for run in (compiled, module):
        module.zero_grad()
        given = x.clone().requires_grad_()
        run(given, **options)[0].square().sum().backward()
        results.append([given.grad, *(p.grad.clone() for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_backward_is_given_no_gradient_that_nobody_has(module):
    """Of the states of every step: zeros as large as they, and there are no kernels of a GPU that take them."""
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=keep)
    torch.compile(module, fullgraph=True, backend=backend)(torch.randn(5, 3, 3))[0].sum().backward()
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.target is BACKWARD]
    assert len(nodes) == module.num_layers
    for node in nodes:
        given = dict(zip((argument.name for argument in BACKWARD._schema.arguments), node.args, strict=False))
        assert given["y"] is not None
        assert given.get("grad_saved_c") is None


def test_compile_with_inductor():
    """Around the ops there is code of inductor's own; T and B change without a new graph."""
    torch._dynamo.reset()
    gru = fastrnn.GRU(3, 4, 2)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda x: gru(x.tanh())[0].relu().sum(), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for T, B in ((5, 6), (7, 2), (9, 4)):
        x = torch.randn(T, B, 3)
        torch.testing.assert_close(compiled(x), gru(x.tanh())[0].relu().sum())
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


def test_export_with_dynamic_time_and_batch(module):
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    exported = torch.export.export(module, (torch.randn(5, 3, 3),), dynamic_shapes=({0: T, 1: B},))
    nodes = [node for node in exported.graph.nodes if node.target is FORWARD]
    assert len(nodes) == module.num_layers
    for shape in ((9, 6, 3), (2, 2, 3)):
        x = torch.randn(shape)
        assert torch.equal(exported.module()(x)[0], module(x)[0])


@pytest.mark.parametrize("strict", [True, False])
def test_exported_layers_keep_nothing_and_refuse_backward(module, strict):
    """Gradients are never left out in silence."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), module)
    exported = torch.export.export(model, (torch.randn(5, 3, 3),), strict=strict)
    saves = [node.args[9] for node in exported.graph.nodes if node.target is FORWARD]
    assert saves == [False] * module.num_layers
    with pytest.raises(RuntimeError, match="derivative for fastrnn::layer_forward is not implemented"):
        exported.module()(torch.randn(5, 3, 3))[0].sum().backward()


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap"])
def test_transforms_inside_of_compiled_code(transform, trained, backend, fullgraph):
    """The right numbers, or an error from whoever notices first: never gradients of zero."""
    torch._dynamo.reset()
    gru, x = fastrnn.GRU(3, 4).requires_grad_(trained), torch.randn(3, 2, 3)
    function = {
        "grad": torch.func.grad(lambda x: gru(x)[0].sum()),
        "vjp": lambda x: torch.func.vjp(lambda x: gru(x)[0], x)[1](torch.ones(3, 2, 4)),
        "jvp": lambda x: torch.func.jvp(lambda x: gru(x)[0], (x,), (x,)),
        "vmap": lambda x: torch.func.vmap(lambda x: gru(x)[0])(x[None]),
    }[transform]
    try:
        found = torch.compile(function, backend=backend, fullgraph=fullgraph)(x)
    except (RuntimeError, torch._dynamo.exc.Unsupported) as error:
        if not re.search(r"torch\.func|functorch|transform|layer_backward is not implemented", str(error)):
            raise
    else:
        torch.testing.assert_close(found, function(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(module, dtype):
    """Outputs in autocast's dtype, close to float32; gradients in the parameters' dtype."""
    x = torch.randn(5, 3, 3)
    exact = module(x)[0]
    with torch.autocast("cpu", dtype=dtype):
        y, _ = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def test_autocast_leaves_float64(module):
    """As torch.nn: autocast never casts float64."""
    x = torch.randn(5, 3, 3).double()
    module.double()
    expected = module(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x)[0], expected)
        with pytest.raises(ValueError, match="does not match weight dtype"):
            module(x.float())


def test_second_derivatives_under_autocast(module):
    """The reference runs in the dtype of the first pass, not in autocast's once more."""
    x = torch.randn(5, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)[0].sum()
        (found,) = torch.autograd.grad(y, x, create_graph=True)
        (expected,) = torch.autograd.grad(module(x)[0].sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)
    assert torch.autograd.grad(found.square().sum(), x)[0].isfinite().all()


W_IH, W_HH, BIAS = torch.zeros(12, 3), torch.zeros(12, 4), torch.zeros(12)
BAD_ARGUMENTS = {
    "cell": ({"cell": "gruu"}, ValueError, "cell: expected one of lstm, gru"),
    "x-dims": ({"x": torch.zeros(3, 2)}, ValueError, r"x: expected 3 dimensions \[T, B, I\], got shape \[3, 2\]"),
    "x-dtype": ({"x": torch.zeros(3, 2, 3, dtype=torch.int32)}, TypeError, "x: expected float32"),
    "w_ih-shape": ({"weights": [BIAS, W_HH]}, ValueError, r"w_ih: expected shape \[12, 3\], got \[12\]"),
    "w_ih-dtype": ({"weights": [W_IH.double(), W_HH]}, TypeError, "w_ih: expected dtype Float, got Double"),
    "w_ih-device": ({"weights": [W_IH.to("meta"), W_HH]}, RuntimeError, "weights: expected device cpu"),
    "w_hh-shape": ({"weights": [W_IH, W_HH[:, :3]]}, ValueError, r"w_hh: expected \[gates\*H, H\], .* got \[12, 3\]"),
    "w_hh-dims": ({"weights": [W_IH, BIAS]}, ValueError, r"w_hh: expected 2 dimensions, got shape \[12\]"),
    "weights-none": ({"weights": []}, ValueError, "weights: expected w_ih, w_hh.* for each of 1 directions, got 0"),
    "weights-one": ({"weights": [W_IH]}, ValueError, "weights: expected .* got 1 tensors"),
    "weights-odd": ({"weights": [W_IH, W_HH] * 2 + [W_IH], "directions": 2}, ValueError, "weights: expected .* got 5"),
    "weights-many": ({"weights": [W_IH, W_HH] * 3}, ValueError, "weights: expected .* got 6 tensors"),
    "one-bias": ({"weights": [W_IH, W_HH, BIAS]}, ValueError, "only with lstm"),
    "directions": ({"weights": [W_IH, W_HH] * 3, "directions": 3}, ValueError, "directions: expected 1 or 2, got 3"),
    "directions-0": ({"directions": 0}, ValueError, "directions: expected 1 or 2, got 0"),
    "b_ih-shape": ({"weights": [W_IH, W_HH, BIAS[1:], BIAS]}, ValueError, r"b_ih: expected shape \[12\], got \[11\]"),
    "h0-shape": ({"h0": torch.zeros(2, 2, 4)}, ValueError, r"h0: expected shape \[1, 2, 4\], got \[2, 2, 4\]"),
    "w_hr-cell": ({"weights": [W_IH, W_HH[:, :3], W_HH[:3]]}, ValueError, "only with lstm"),
    "lengths-range": (
        {"lengths": torch.tensor([1, 4])},
        ValueError,
        r"lengths: expected values in \[0, 3\], got 4 at index 1",
    ),
    "lengths-sign": ({"lengths": torch.tensor([-1, 2])}, ValueError, r"got -1 at index 0"),
    "lengths-dtype": ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths: expected dtype Long, got Float"),
    "resets-shape": ({"resets": torch.zeros(2, 3).bool()}, ValueError, r"resets: expected shape \[3, 2\]"),
}


@pytest.mark.parametrize(("change", "error", "text"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(change, error, text):
    arguments = {
        "x": torch.zeros(3, 2, 3),
        "h0": None,
        "c0": None,
        "weights": [W_IH, W_HH],
        "directions": 1,
        "lengths": None,
        "resets": None,
        "masks": None,
        "cell": "gru",
        "save": False,
    }
    with pytest.raises(error, match=text):
        FORWARD(**(arguments | change))


def test_bad_arguments_of_backward():
    case = make_case("lstm", 3, 2, 3, 4)
    arguments = op_arguments(case)
    y, _, _, saved, saved_c = FORWARD(*arguments, True)
    given = [torch.ones_like(y), None, None, *arguments, y, saved, saved_c, [True] * 7]
    BACKWARD(*given)
    for index, value, text in (
        (0, y[1:], r"grad_y: expected shape \[3, 2, 4\]"),
        (12, y[:, 1:], r"y: expected shape \[3, 2, 4\]"),
        (13, saved[0], "saved: expected 5 dimensions"),
        (13, saved[..., 1:], "saved: expected shape"),
        (14, saved_c[:, 1:], "saved_c: expected shape"),
        (15, [True] * 8, "wanted: expected 7 flags, of x, h0, c0 and each weight, got 8"),
        (15, [], "wanted: expected 7 flags"),
    ):
        with pytest.raises(ValueError, match=text):
            BACKWARD(*given[:index], value, *given[index + 1 :])


@pytest.mark.parametrize("given", [(BIAS, None), (None, BIAS)], ids=["b_ih", "b_hh"])
def test_a_layer_has_both_biases_or_none(given):
    with pytest.raises(ValueError, match="b_ih, b_hh: expected both or none"):
        ops.layer("gru", torch.zeros(3, 2, 3), None, None, [Weights(W_IH, W_HH, *given)])


@pytest.mark.parametrize("index", [0, 3, 12, 13, 14])
def test_one_meta_tensor_among_others_is_an_error_of_backward(index):
    arguments = op_arguments(make_case("lstm", 3, 2, 3, 4))
    y, _, _, saved, saved_c = FORWARD(*arguments, True)
    given = [torch.ones_like(y), None, None, *arguments, y, saved, saved_c, [True] * 7]
    given[index] = given[index].to("meta")
    with pytest.raises(RuntimeError, match=r"expected device (cpu|meta) as x, got (meta|cpu)"):
        BACKWARD(*given)


def test_none_in_the_place_of_a_tensor_is_named():
    arguments = op_arguments(make_case("lstm", 3, 2, 3, 4))
    with pytest.raises(TypeError, match="x: expected a tensor, got None"):
        FORWARD(None, *arguments[1:], True)


def test_fakes_name_what_is_wrong():
    arguments = [a.to("meta") if torch.is_tensor(a) else a for a in op_arguments(make_case("gru", 3, 2, 3, 4))]
    arguments[3] = [weight.to("meta") for weight in arguments[3]]
    with pytest.raises(ValueError, match=r"cell: expected one of lstm, gru, .*, got gur"):
        FORWARD(*arguments[:-1], "gur", True)
    arguments[3] = []
    with pytest.raises(ValueError, match="weights: expected those of each direction, got none"):
        FORWARD(*arguments, True)
