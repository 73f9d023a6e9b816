"""What ONNX's exporters make of our layers."""

import subprocess
import sys

import onnx
import onnx.reference
import pytest
import torch
from onnx_files import B, H, I, T, assert_same, each_node, export, export_older, run
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import fastrnn

BUILT_IN = [name for name, cell in fastrnn.cells.CELLS.items() if name == cell.equation.__name__]
LENGTHS, RESETS = torch.tensor([5, 3, 0, 1]), torch.rand(T, B) < 0.4


def operators(program) -> list[str]:
    return [node.op_type for node in program.model_proto.graph.node]


def attributes_of(node) -> dict:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def first_states(module, batch=B):
    """A random `hx` of a layer."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or module.hidden_size)
    return (h, torch.randn(rows, batch, module.hidden_size)) if isinstance(module, nn.LSTM) else h


# ---- one node for a layer


@each_node
def test_a_layer_is_one_node_whose_weights_are_in_the_file(name, options, attributes):
    """Also large ones, which the exporter's own optimizer leaves as they are."""
    for units in (H, 160):
        module, x = getattr(fastrnn, name)(I, units, **options), torch.randn(T, B, I)
        program = export(module, (x,))
        after = ["Transpose", "Reshape"] if module.bidirectional else ["Squeeze"]
        assert operators(program) == [name, *after]
        graph = program.model_proto.graph
        onnx.checker.check_model(program.model_proto, full_check=True)
        found = attributes_of(graph.node[0])
        assert {name: found[name] for name in attributes} == attributes
        assert found["hidden_size"] == units
        weights = [given for given in graph.node[0].input[1:] if given]
        assert len(weights) == 2 + module.bias + bool(options.get("peephole"))
        assert {*weights} <= {tensor.name for tensor in graph.initializer}
        assert_same(run(program, x), module, x)


@each_node
def test_lengths_states_and_other_sizes(name, options, attributes):
    """A row of length 0 keeps its state, where the runtime alone would put 0."""
    module = getattr(fastrnn, name)(I, H, **options)
    x, hx = torch.randn(T, B, I), first_states(module)
    steps, rows = Dim("T"), Dim("B")
    states = [{1: rows}] * len(tree_leaves(hx))
    shapes = {"input": {0: steps, 1: rows}, "hx": tuple(states) if name == "LSTM" else states[0], "lengths": {0: rows}}
    program = export(module, (x, hx), {"lengths": LENGTHS}, dynamic_shapes=shapes)
    found = operators(program)
    assert found.count(name) == 1
    assert len(found) < 10
    for T_, B_ in ((T, B), (8, 2), (1, 1)):
        x, hx = torch.randn(T_, B_, I), first_states(module, B_)
        lengths = LENGTHS if B_ == B else torch.randint(0, T_ + 1, (B_,))
        assert_same(run(program, x, hx, lengths=lengths), module, x, hx, lengths=lengths)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("LSTM", {"num_layers": 2, "batch_first": True, "dropout": 0.5}, 2),
        ("GRU", {"num_layers": 3, "bidirectional": True}, 3),
        ("RNN", {"num_layers": 2, "nonlinearity": "relu"}, 2),
    ],
    ids=["LSTM", "GRU", "RNN"],
)
def test_stacks(name, options, expected):
    module, x = getattr(fastrnn, name)(I, H, **options), torch.randn(T, T, I)
    hx = first_states(module, T)
    program = export(module, (x, hx))
    assert operators(program).count(name) == expected
    assert "Dropout" not in operators(program)
    assert_same(run(program, x, hx), module, x, hx)


def test_unbatched():
    module, x, length = fastrnn.GRU(I, H, bidirectional=True), torch.randn(T, I), torch.tensor(3)
    program = export(module, (x,), {"lengths": length})
    assert operators(program).count("GRU") == 1
    assert_same(run(program, x, lengths=length), module, x, lengths=length)


@pytest.mark.parametrize(
    ("name", "options"),
    [("RNNCell", {}), ("LSTMCell", {}), ("GRUCell", {}), ("GRUCell", {"reset_after": False})],
    ids=["RNN", "LSTM", "GRU", "GRU-reset-before"],
)
def test_single_steps(name, options):
    module, x, h = getattr(fastrnn, name)(I, H, **options), torch.randn(B, I), torch.randn(B, H)
    hx = (h, torch.randn(B, H)) if name == "LSTMCell" else h
    program = export(module, (x, hx))
    assert operators(program).count(name.removesuffix("Cell")) == 1
    assert_same(run(program, x, hx), module, x, hx)


def test_packed_sequences_say_what_to_do():
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(T, B, I), torch.tensor([5, 3, 2, 1]))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastrnn.GRU(I, H)

        def forward(self, x):
            return self.layer(packed._replace(data=packed.data + x))[1]

    with pytest.raises(torch.onnx.OnnxExporterError, match=r"GRU: input: expected a tensor, got a Packed.*lengths="):
        export(Model(), (torch.zeros(1),))


class Shared(nn.Module):
    """A layer that is used twice, one with a weight that is an argument, and one with a computed weight."""

    def __init__(self):
        super().__init__()
        self.twice, self.given = fastrnn.GRU(I, H), fastrnn.RNN(H, H)
        self.computed = nn.utils.parametrizations.weight_norm(fastrnn.LSTM(H, H), "weight_hh_l0")

    def forward(self, x, weight):
        y = self.twice(x)[0] + self.twice(x.flip(0))[0]
        y = torch.func.functional_call(self.given, {"weight_ih_l0": weight}, (y,))[0]
        return self.computed(y)[0]


def test_weights_that_are_shared_given_or_computed():
    model, args = Shared(), (torch.randn(T, B, I), torch.randn(H, H))
    program = export(model, args)
    assert [operators(program).count(name) for name in ("GRU", "RNN", "LSTM")] == [2, 1, 1]
    assert_same(run(program, *args), model, *args)


# ---- what has no node: a Scan


@pytest.mark.parametrize("name", BUILT_IN)
def test_cells_and_resets_are_scans(name):
    module, x = fastrnn.Recurrent(name, I, H, bidirectional=True), torch.randn(T, B, I)
    rows = {"lengths": LENGTHS, "resets": RESETS}
    program = export(module, (x,), rows)
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert operators(program).count("Scan") == 2
    assert_same(run(program, x, **rows), module, x, **rows)


@pytest.mark.parametrize("rows", [{}, {"lengths": LENGTHS}, {"resets": RESETS}], ids=["plain", "lengths", "resets"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}), ("RNN", {"leak": 0.3, "bias": False})],
    ids=["projection", "leak"],
)
def test_options_without_an_operator_of_their_own(name, options, rows):
    module, x = getattr(fastrnn, name)(I, H, **options), torch.randn(T, B, I)
    hx = first_states(module)
    program = export(module, (x, hx), rows)
    assert operators(program).count("Scan") == module.num_layers * (2 if module.bidirectional else 1)
    assert not {"LSTM", "RNN"} & {*operators(program)}
    assert_same(run(program, x, hx, **rows), module, x, hx, **rows)


def test_a_scan_takes_other_sizes():
    module = fastrnn.LSTM(I, H, proj_size=2, bidirectional=True, batch_first=True)
    steps, rows = Dim("T"), Dim("B")
    shapes = {"input": {0: rows, 1: steps}, "lengths": {0: rows}, "resets": {0: rows, 1: steps}}
    program = export(
        module, (torch.randn(B, T, I),), {"lengths": LENGTHS, "resets": RESETS.T.clone()}, dynamic_shapes=shapes
    )
    for T_, B_ in ((8, 2), (1, 3)):
        x, resets = torch.randn(B_, T_, I), torch.rand(B_, T_) < 0.4
        given = {"lengths": torch.randint(0, T_ + 1, (B_,)), "resets": resets}
        assert_same(run(program, x, **given), module, x, **given)


@fastrnn.cell(gates="f n", states="h", unit_weights="rate", masks="m k")
def masked(x, u, h, rate, m, k, *, scale=2.5):
    f = torch.sigmoid(x.f + u.f(h) + rate)
    return m * ((1 - f) * h + f * torch.tanh(x.n + u.n(f * h))) + (1 - m) * h * k * scale


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = fastrnn.Recurrent(masked, I, H, num_layers=2, bidirectional=True, scale=0.5)

    def forward(self, x, m, k):
        return self.layer(x, masks={"m": m, "k": k})


@pytest.mark.parametrize("steps", [(), (T,)], ids=["shared", "of-each-step"])
def test_a_cell_of_ones_own_with_masks(steps):
    model = Masked()
    args = torch.randn(T, B, I), torch.rand(4, *steps, B, H), torch.rand(4, B, H)
    assert_same(run(export(model, args), *args), model, *args)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastrnn.Stack(fastrnn.GRU(I, H), fastrnn.LSTM(H, H), residual=True),
        lambda: fastrnn.Skip(fastrnn.GRU(I + H, H), steps=2),
        lambda: fastrnn.Dilated(fastrnn.GRU(I, H), steps=2),
        lambda: fastrnn.LMU(I, H, 4, 5.0),
        lambda: fastrnn.DiagonalSSM(I, H),
        lambda: fastrnn.RecurrentCell("mgu", I, H),
    ],
    ids=["Stack", "Skip", "Dilated", "LMU", "DiagonalSSM", "RecurrentCell"],
)
def test_modules_that_are_built_of_layers(make):
    module = make()
    x = torch.randn(B, I) if isinstance(module, fastrnn.RecurrentCell) else torch.randn(T, B, I)
    assert_same(run(export(module, (x,)), x), module, x)


# ---- the exporter's options, and other types


@pytest.mark.parametrize("options", [{"proj_size": 2}, {"peephole": True}], ids=["Scan", "LSTM"])
@pytest.mark.parametrize("how", [{"optimize": False}, {"opset_version": 18}, {"opset_version": 23}], ids=str)
def test_options_of_the_exporter(how, options):
    module, x = fastrnn.LSTM(I, H, bidirectional=True, **options), torch.randn(T, B, I)
    program = export(module, (x,), **how)
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert_same(run(program, x), module, x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program(strict):
    module, x = fastrnn.GRU(I, H).eval(), torch.randn(T, B, I)
    program = export(torch.export.export(module, (x,), strict=strict))
    assert operators(program) == ["GRU", "Squeeze"]
    assert_same(run(program, x), module, x)


@pytest.mark.parametrize("records", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights_are_written_as_they_are(weights, records):
    module, x = fastrnn.LSTM(I, H, weights=weights), torch.randn(T, B, I)
    with torch.set_grad_enabled(records):
        program = export(module, (x,))
    assert operators(program) == ["LSTM", "Squeeze"]
    module.weights = None
    assert_same(run(program, x), module, x)


def test_an_exported_program_of_rounded_weights():
    module, x = fastrnn.GRU(I, H, weights="int8").eval(), torch.randn(T, B, I)
    with torch.no_grad():
        program = export(torch.export.export(module, (x,)))
    module.weights = None
    assert_same(run(program, x), module, x)


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}], ids=["LSTM", "Scan"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
def test_16_bit_types(dtype, tolerance, options):
    """bfloat16, which runtimes lack, is computed in float32."""
    module, x = fastrnn.LSTM(I, H, dtype=dtype, **options), torch.randn(T, B, I, dtype=dtype)
    program = export(module, (x,))
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert_same([*program(x)], module, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_float64(name):
    """ONNX Runtime has no kernels for it; ONNX's own evaluator has."""
    module, x = getattr(fastrnn, name)(I, H, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    evaluator = onnx.reference.ReferenceEvaluator(export(module, (x,)).model_proto)
    found = [torch.from_numpy(y) for y in evaluator.run(None, {"input": x.numpy()})]
    assert_same(found, module, x, rtol=1e-11, atol=1e-12)


def run_alone(code: str) -> str:
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fastrnn_imports_nothing_of_onnx():
    found = run_alone("import sys, fastrnn\nprint([name for name in sys.modules if name.split('.')[0][:4] == 'onnx'])")
    assert found.strip() == "[]"


def test_the_exporter_may_be_used_before_fastrnn_is_imported():
    code = (
        "import torch\n"
        "def operators(model):\n"
        "    program = torch.onnx.export(model, (torch.randn(5, 2, 3),), dynamo=True, verbose=False)\n"
        "    return [node.op_type for node in program.model_proto.graph.node]\n"
        "before = operators(torch.nn.Linear(3, 4))\n"
        "import fastrnn\n"
        "print(before == operators(torch.nn.Linear(3, 4)), operators(fastrnn.LSTM(3, 4).eval()))\n"
    )
    assert run_alone(code).strip() == "True ['LSTM', 'Squeeze']"


# ---- the older exporter


@pytest.mark.parametrize(
    ("name", "options"),
    [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("LSTM", {"num_layers": 2, "bidirectional": True}), ("GRUCell", {})],
    ids=["LSTM", "GRU", "RNN", "LSTM-all", "GRUCell"],
)
def test_the_older_exporter(name, options):
    """It gets torch.nn's operations."""
    module = getattr(fastrnn, name)(I, H, **options)
    x = torch.randn(B, I) if name == "GRUCell" else torch.randn(T, B, I)
    assert_same(run(export_older(module, x), x), module, x)


@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_the_older_exporter_refuses_what_torch_nn_lacks(name):
    module = getattr(fastrnn, name)(I, H, reset_after=False)
    x = torch.randn(B, I) if name == "GRUCell" else torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match=f"{name}: reset_after=False: expected what torch.nn.*dynamo=True"):
        export_older(module, x)
