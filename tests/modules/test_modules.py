"""The modules against torch.nn's with the same seed or weights: construction, options, layouts, dropout, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map
from twins import CELLS, LAYERS, assert_same, initial_state, make, noise, results, twins

import fastrnn

OPTIONS = {
    "default": {},
    "bidirectional": {"bidirectional": True},
    "stacked": {"num_layers": 3},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "all": {"bidirectional": True, "num_layers": 2, "bias": False, "batch_first": True},
    "all-but-bias": {"bidirectional": True, "num_layers": 2, "batch_first": True},
}

each_layer = pytest.mark.parametrize("case", LAYERS)
each_cell = pytest.mark.parametrize("case", CELLS)
each_case = pytest.mark.parametrize("case", LAYERS | CELLS)
each_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def same_seed(case, *sizes, **options):
    """Ours and torch.nn's, each built from the same seed."""
    modules = []
    for namespace in (fastrnn, torch.nn):
        torch.manual_seed(3)
        modules.append(make(namespace, case, *sizes, **options))
    return modules


def sample(case, module=None):
    """A batched input for a module of input size 5."""
    return noise(2, 5) if case in CELLS else noise(4, 2, 5)


# ---- what a module is


@each_case
def test_same_seed_gives_the_same_module(case):
    """Names, order and bits of the parameters, state_dict and printed form are torch.nn's, and so is the base class."""
    ours, theirs = same_seed(case, 5, 7)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, torch.nn.RNNCellBase if case in CELLS else torch.nn.RNNBase)


@each_layer
@each_options
def test_attributes_are_torch_nn_s(case, options):
    """What other code reads off a layer: all_weights, sizes, options, printed form, `flatten_parameters`."""
    ours, theirs = same_seed(case, 5, 7, **options)
    assert repr(ours) == repr(theirs)
    assert all(getattr(ours, name) == getattr(theirs, name) for name in torch.nn.RNNBase.__constants__)
    assert ours.flatten_parameters() is None
    for weights, expected in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
    assert [id(w) for weights in ours.all_weights for w in weights] == [id(w) for w in ours.parameters()]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("RNN", (3, 4, 2, "relu", False, True, 0.5, True)),
        ("LSTM", (3, 4, 2, False, True, 0.5, True, 2)),
        ("GRU", (3, 4, 2, False, True, 0.5, True)),
        ("RNNCell", (3, 4, False, "relu")),
        ("LSTMCell", (3, 4, False)),
        ("GRUCell", (3, 4, False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_positional_arguments(name, args):
    ours, theirs = getattr(fastrnn, name)(*args), getattr(torch.nn, name)(*args)
    assert repr(ours) == repr(theirs)
    assert getattr(ours, "nonlinearity", None) == getattr(theirs, "nonlinearity", None)


def test_reset_after_is_printed_only_when_false():
    assert repr(fastrnn.GRU(3, 4, reset_after=False)) == "GRU(3, 4, reset_after=False)"
    assert repr(fastrnn.GRUCell(3, 4, reset_after=False)) == "GRUCell(3, 4, reset_after=False)"
    assert "reset_after" not in repr(fastrnn.GRU(3, 4))


@each_case
def test_state_dict_goes_both_ways(case):
    ours, theirs = make(fastrnn, case, 5, 7), make(torch.nn, case, 5, 7)
    x = sample(case)
    theirs.load_state_dict(ours.state_dict())
    assert_same(results(ours, x), results(theirs, x))
    theirs.reset_parameters()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(results(ours, x), results(theirs, x))


# ---- copies and moves


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy": copy.deepcopy,
    "torch.save": through_torch_save,
}


@each_case
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same_and_stands_alone(case, copied):
    module = make(fastrnn, case, 5, 7)
    x = sample(case)
    before = results(module, x)
    twin = copied(module)
    assert type(twin) is type(module)
    assert_same(results(twin, x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(results(module, x), before)
    assert not results(twin, x)["output 0"].any()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_a_copy_keeps_reset_after(name, copied):
    assert copied(getattr(fastrnn, name)(3, 4, reset_after=False)).reset_after is False


@each_case
def test_dtype_moves(case):
    """`.float()`, `.double()` and `.to(dtype)` change the parameters in place, also after a call."""
    ours, theirs = twins(case, 5, 7)
    x = sample(case)
    for move in (lambda m: m.float(), lambda m: m.double(), lambda m: m.to(torch.float32)):
        ours, theirs = move(ours), move(theirs)
        dtype = ours.weight_hh.dtype if case in CELLS else ours.weight_hh_l0.dtype
        inputs = x.detach().to(dtype).requires_grad_()
        assert_same(results(ours, inputs), results(theirs, inputs), dtype)


@each_case
def test_meta_device(case):
    """Built without memory, it gives shapes; `to_empty` and a state_dict make it whole."""
    theirs = make(torch.nn, case, 5, 7)
    ours = make(fastrnn, case, 5, 7, device="meta")
    x = sample(case)
    shapes = [output.shape for output in tree_leaves(ours(x.to("meta")))]
    assert shapes == [output.shape for output in tree_leaves(theirs(x))]
    ours.to_empty(device="cpu").load_state_dict(theirs.state_dict())
    assert_same(results(ours, x), results(theirs, x))
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in make(fastrnn, case, 5, 7).parameters())


# ---- forward and backward


@each_layer
@each_options
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,)], ids=["unbatched", "B0", "B1", "B3"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["no-hx", "hx"])
def test_layouts(case, options, batch, with_hx):
    """Outputs and every gradient for every shape of input, with and without an initial state."""
    ours, theirs = twins(case, 5, 7, **options)
    first = options.get("batch_first") and batch
    x = noise(*batch, 4, 5) if first else noise(4, *batch, 5)
    args = (x, initial_state(ours, *batch)) if with_hx else (x,)
    assert_same(results(ours, *args), results(theirs, *args))


@each_cell
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("batch", [(), (0,), (3,)], ids=["unbatched", "B0", "B3"])
@pytest.mark.parametrize("with_hx", [False, True], ids=["no-hx", "hx"])
def test_cells(case, bias, batch, with_hx):
    ours, theirs = twins(case, 5, 7, bias=bias)
    state = (noise(*batch, 7), noise(*batch, 7)) if case == "LSTMCell" else noise(*batch, 7)
    args = (noise(*batch, 5), state) if with_hx else (noise(*batch, 5),)
    assert_same(results(ours, *args), results(theirs, *args))


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_sizes_beyond_one_tile(case, dtype):
    """Sizes that no vector or tile width divides, large enough for several tiles and threads."""
    ours, theirs = twins(case, 37, 65, bidirectional=True, dtype=dtype)
    x = noise(9, 19, 37, dtype=dtype)
    assert_same(results(ours, x), results(theirs, x), dtype)


@each_layer
def test_dense_or_not(case):
    """Strided and broadcast inputs, states and weights."""
    ours, theirs = twins(case, 5, 7, bidirectional=True)
    for module in (ours, theirs):
        for weight in module.parameters():
            weight.data = (
                weight.data.t().contiguous().t() if weight.dim() == 2 else torch.stack([weight.data] * 2, 1)[:, 0]
            )
    assert not any(weight.is_contiguous() for weight in ours.parameters())
    strided = torch.randn(3, 5, 8, dtype=torch.float64).permute(2, 0, 1)[::2].requires_grad_()
    broadcast = noise(1, 1, 5).expand(4, 3, 5)
    state = tree_map(lambda t: t.detach().mT.contiguous().mT, initial_state(ours, 3))
    for x in (strided, broadcast):
        assert not x.is_contiguous()
        assert_same(results(ours, x, state), results(theirs, x, state))


# ---- dropout


@each_layer
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=["plain", "batch-first", "bidirectional"]
)
def test_dropout_draws_torch_nn_s_masks(case, options):
    """With the same seed a layer in training drops the same elements as torch.nn's on the CPU."""
    ours, theirs = twins(case, 5, 7, num_layers=3, dropout=0.4, **options)
    x = noise(4, 3, 5)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        found.append(results(module, x))
    assert_same(*found)
    assert not torch.allclose(found[0]["output 0"], results(ours.eval(), x)["output 0"])


def test_dropout_only_between_layers_in_training():
    ours, theirs = twins("LSTM", 5, 7, num_layers=2, dropout=0.5)
    x = noise(4, 3, 5)
    assert_same(results(ours.eval(), x), results(theirs.eval(), x))
    with pytest.warns(UserWarning, match="dropout"):
        single = fastrnn.LSTM(5, 7, dropout=0.5, dtype=torch.float64)
    assert_same(results(single, x), results(single.eval(), x))


def test_dropout_may_be_changed_live():
    """`m.dropout = p` holds from the next call on; with 1 the second layer reads nothing of the first."""
    ours, theirs = twins("GRU", 5, 7, num_layers=2, dropout=0.5)
    ours.dropout = theirs.dropout = 0.0
    x = noise(4, 3, 5)
    assert_same(results(ours, x), results(theirs, x))
    ours.dropout = 1.0
    assert not torch.autograd.grad(ours(x)[0].sum(), x)[0].any()
