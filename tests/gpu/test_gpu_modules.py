"""The modules against torch.nn's on the GPU, with the same weights."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map
from twins import CELLS, LAYERS, assert_same, initial_state, noise, results, twins

import fastrnn

pytestmark = pytest.mark.quick

OPTIONS = {
    "default": {},
    "bidirectional": {"bidirectional": True},
    "stacked": {"num_layers": 2},
    "no-bias": {"bias": False},
    "all": {"bidirectional": True, "num_layers": 2, "batch_first": True},
}

each_layer = pytest.mark.parametrize("case", LAYERS)
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_float = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def on_gpu(value, dtype=None):
    """The tensors of a nested value as leaves on the GPU."""
    return tree_map(lambda t: t.detach().to("cuda", dtype).requires_grad_(t.requires_grad), value)


@each_layer
@each_options
@each_float
@pytest.mark.parametrize("with_hx", [False, True], ids=["no-hx", "hx"])
def test_layers(case, options, dtype, with_hx):
    """Outputs and every gradient. In float32 both are compared with torch.nn in float64: of a tensor's scale, we may be
    off by three times what torch.nn is, as the largest of many errors varies, and by some roundings."""
    ours, theirs = twins(case, 37, 65, device="cuda", dtype=dtype, **options)
    x = noise(3, 9, 37) if options.get("batch_first") else noise(9, 3, 37)
    args = on_gpu((x, initial_state(ours, 3)) if with_hx else (x,), dtype)
    found, expected = results(ours, *args), results(theirs, *args)
    if dtype == torch.float64:
        return assert_same(found, expected)
    truth = results(theirs.double(), *on_gpu(args, torch.float64))
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        off, others = ((each[name] - exact).abs().max() / exact.abs().max() for each in (found, expected))
        assert off <= 3 * others + 16 * torch.finfo(dtype).eps, f"{name}: {off:.1e} of its scale, torch.nn {others:.1e}"
    return None


@pytest.mark.parametrize("case", CELLS)
def test_cells(case):
    ours, theirs = twins(case, 37, 65, device="cuda")
    args = on_gpu((noise(3, 37), initial_state(ours, 3)))
    assert_same(results(ours, *args), results(theirs, *args))


@each_layer
def test_a_module_may_move(case):
    """From the CPU and back, with its state_dict in both directions between the libraries."""
    ours, theirs = twins(case, 5, 7)
    x = noise(4, 2, 5)
    ours.cuda(), theirs.cuda()
    assert_same(results(ours, on_gpu(x)), results(theirs, on_gpu(x)))
    theirs.reset_parameters()
    ours.load_state_dict(theirs.state_dict())
    assert_same(results(ours, on_gpu(x)), results(theirs, on_gpu(x)))
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    assert_same(results(ours.cpu(), x), results(theirs.cpu(), x))


@each_layer
@pytest.mark.parametrize("lengths", [[5, 3, 3, 1], [3, 5, 1, 3]], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["plain", "all"])
def test_packed_sequences(case, options, lengths):
    ours, theirs = twins(case, 5, 7, device="cuda", **options)
    packed = pack_padded_sequence(on_gpu(noise(5, 4, 5).detach()), lengths, enforce_sorted=False)
    packed.data.requires_grad_()
    args = (packed, on_gpu(initial_state(ours, 4)))
    assert_same(results(ours, *args), results(theirs, *args))


@each_layer
def test_lengths_and_resets_are_those_of_the_cpu(case):
    """What torch.nn does not have: against the same module on the CPU."""
    module, _ = twins(case, 5, 7, bidirectional=True, num_layers=2)
    x, hx = noise(6, 4, 5), initial_state(module, 4)
    rows = {"lengths": torch.tensor([6, 0, 3, 5]), "resets": torch.rand(6, 4) < 0.3}
    expected = results(module, x, hx, **rows)
    found = results(module.cuda(), *on_gpu((x, hx)), **tree_map(torch.Tensor.cuda, rows))
    assert_same({name: tensor.cpu() for name, tensor in found.items()}, expected)


def test_no_steps_are_refused_as_by_torch_nn():
    ours, theirs = twins("LSTM", 5, 7, device="cuda")
    messages = []
    for module in (ours, theirs):
        with pytest.raises(RuntimeError) as refused:
            module(torch.zeros(0, 2, 5, device="cuda", dtype=torch.float64))
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


@each_layer
def test_no_rows(case):
    ours, theirs = twins(case, 5, 7)
    output, state = ours.cuda()(torch.zeros(4, 0, 5, device="cuda", dtype=torch.float64))
    assert_same(tree_map(torch.Tensor.cpu, (output, state)), theirs(torch.zeros(4, 0, 5, dtype=torch.float64)))


def test_dropout_is_drawn_between_layers_in_training_alone():
    module = fastrnn.GRU(5, 7, num_layers=2, dropout=0.5, device="cuda")
    x = torch.randn(4, 3, 5, device="cuda")
    torch.manual_seed(1)
    first = module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], first)
    assert not torch.equal(module(x)[0], first)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_layer
def test_autocast(case, dtype):
    """The dtype that is asked for, where cuDNN's layers take float16 whatever it is; values within the rounding of four
    steps."""
    ours, theirs = twins(case, 5, 7, device="cuda", dtype=torch.float32)
    x = torch.randn(4, 3, 5, device="cuda")
    with torch.autocast("cuda", dtype):
        found = ours(x)
    expected = tree_map(lambda t: t.to(dtype), theirs(x))
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_convert():
    """A model on the GPU keeps its parameters and its results."""
    model = torch.nn.Sequential(torch.nn.GRU(5, 7, batch_first=True)).cuda()
    x = torch.randn(3, 4, 5, device="cuda")
    parameters, expected = list(model.parameters()), model(x)
    fastrnn.convert(model)
    assert isinstance(model[0], fastrnn.GRU)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert_same(model(x), expected, torch.float32)
