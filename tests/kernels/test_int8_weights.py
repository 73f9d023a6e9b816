"""weights="int8": float32 modules whose products are of integers; test_packs.py has how those are kept."""

import copy
import warnings

import pytest
import torch
from cases import ROWS, VARIANT_IDS, VARIANTS, make_case, packing

import fastrnn
from fastrnn import ops, reference

MODULES = {"LSTM": fastrnn.LSTM, "GRU": fastrnn.GRU, "RNN": fastrnn.RNN}
SIZES = [(1, 3, 4, 6), (1, 17, 33, 37), (1, 1, 20, 40), (1, 2, 7, 300), (1, 50, 130, 65), (1, 7, 1, 1)]


@pytest.fixture
def quantize():
    """torch.ao's dynamic quantization of a model's layers, without its warnings of deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch.ao.quantization.quantize_dynamic


def quantized(tensor):
    """Each row in multiples of a 127th of its largest number, in the roundings of float32."""
    rows = tensor.float()
    range_ = rows.abs().amax(-1, keepdim=True)
    q = torch.where(range_ > 0, rows * (torch.tensor(127.0) / range_), 0).round()
    return q.double() * (range_.double() / 127)


def quantized_linear(x, w, b=None):
    product = quantized(x) @ quantized(w).T
    return (product if b is None else product + b.double()).to(x.dtype)


def run(case, weights="int8"):
    return case.run(packing(ops.PackedLayers(), weights))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_step_is_that_of_rounded_numbers(monkeypatch, cell, P, size, D):
    """The reference with both sides of every product rounded, in float64. Where the cell rounds what it has computed
    (a second product, a projection), the last bit of that decides now and then which way: one number in twenty may then
    be off by what a quantum of an operand makes of a weight.
    """
    case = make_case(cell, *size, P=P, D=D, dtype=torch.float32)
    outputs = run(case)
    monkeypatch.setattr(reference, "linear", quantized_linear)
    expected = case.to(torch.float64).run(reference.layer)
    for actual, exact in zip(outputs, expected, strict=True):
        error = (actual.double() - exact).abs()
        rounds_again = cell == "gru_reset_before" or P is not None
        assert error.max() < (2e-2 if rounds_again else 2e-6)
        assert (error < 2e-6).double().mean() > 0.95


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("cell", "P"), VARIANTS, ids=VARIANT_IDS)
def test_sequences(monkeypatch, cell, P, rows):
    """The same over some steps. A number that is rounded the other way makes others do so in the steps after it."""
    case = make_case(cell, 5, 9, 12, 20, P=P, D=2, **ROWS[rows], dtype=torch.float32)
    outputs = run(case)
    monkeypatch.setattr(reference, "linear", quantized_linear)
    for actual, exact in zip(outputs, case.to(torch.float64).run(reference.layer), strict=True):
        error = (actual.double() - exact).abs()
        assert error.max() < 2e-2
        assert (error < 2e-6).double().mean() > 0.8


@pytest.mark.parametrize("B", [1, 3, 40])
@pytest.mark.parametrize("name", MODULES)
def test_stream_sequence_and_threads_agree(name, B):
    """To the bit: sums of integers have no order."""
    torch.manual_seed(0)
    module = MODULES[name](70, 260, 2, weights="int8")
    x = torch.randn(6, B, 70)
    threads = torch.get_num_threads()
    results = []
    with torch.no_grad():
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(module(x)[0])
            stream = module.stream(B)
            results.append(torch.stack([stream(frame).clone() for frame in x]))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_error_is_less_than_that_of_torch_quantization(quantize, name):
    """torch.ao's dynamic quantization has one scale for a whole matrix and one for all rows of an input."""
    torch.manual_seed(0)
    plain = getattr(torch.nn, name)(64, 64, 2)
    exact = copy.deepcopy(plain).double()
    theirs = quantize(torch.nn.Sequential(plain), {type(plain)})[0]
    module = fastrnn.convert(plain, weights="int8")
    x = torch.randn(30, 4, 64)
    with torch.no_grad():
        expected = exact(x.double())[0]
        error, their_error = ((m(x)[0] - expected).abs().mean() for m in (module, theirs))
    assert 1e-5 < error < their_error
    assert "weights='int8'" in repr(module)


@pytest.mark.parametrize("quanta", [1, 77, 127, 128])
def test_weights_that_are_on_a_grid_keep_it(quanta):
    """A unit vector is exact in int8, and so are its products with weights that some other tool has quantized, whose
    largest number need not be 127 quanta."""
    torch.manual_seed(0)
    q = torch.randint(-quanta, min(quanta, 127) + 1, (40, 16))
    q[:, 3] = -quanta
    scale = 0.001 + torch.rand(40, 1)
    module = fastrnn.RNN(16, 40, nonlinearity="relu", bias=False, weights="int8")
    with torch.no_grad():
        module.weight_ih_l0.copy_(q * scale)
        y, _ = module(torch.eye(16)[None].transpose(0, 1).reshape(1, 16, 16))
    torch.testing.assert_close(y[0].T, (q * scale).relu(), rtol=1e-6, atol=0)


def test_numbers_that_int8_cannot_hold():
    """NaN and infinity make NaN of their own row alone; zeros and numbers below 1e-30 are as zeros."""
    module = fastrnn.LSTM(8, 20, weights="int8")
    x = torch.randn(4, 6, 8)
    x[:, 0], x[:, 1] = 0, 1e-35
    with torch.no_grad():
        plain = module(x)[0]
        x[1, 3, 2], x[1, 4, 2] = float("nan"), float("inf")
        y = module(x)[0]
        zero = module(torch.zeros(4, 1, 8))[0]
    assert y[1:, 3:5].isnan().all()
    assert torch.equal(y[:, [0, 1, 2, 5]], plain[:, [0, 1, 2, 5]])
    assert torch.equal(y[:, 0:2], zero.expand(-1, 2, -1))
    with torch.no_grad():
        module.weight_hh_l0[7, 3] = float("nan")
        assert module(x[:, :1])[0][:, :, 7].isnan().all()


def test_changed_weights_are_seen():
    module = fastrnn.GRU(30, 40, weights="int8")
    x = torch.randn(3, 2, 30)
    with torch.no_grad():
        before = module(x)[0]
        module.weight_ih_l0.data[5, 5] += 1.0
        after = module(x)[0]
        fresh = fastrnn.GRU(30, 40, weights="int8")
        fresh.load_state_dict(module.state_dict())
        assert torch.equal(after, fresh(x)[0])
    assert not torch.equal(before, after)


def test_memory_of_a_stream():
    """A quarter of the weights, and 8 bytes for each of their rows."""
    plain, small = (fastrnn.LSTM(256, 512, weights=w).stream().nbytes for w in (None, "int8"))
    weights = 4 * 512 * (256 + 512)
    assert plain > 4 * weights
    assert small < 1.2 * weights + 16 * 4 * 512 + 2**16


def test_compiles_and_traces_shapes():
    module = fastrnn.LSTM(8, 24, weights="int8")
    x = torch.randn(5, 2, 8)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(x)[0], module(x)[0])
        assert fastrnn.GRU(8, 24, weights="int8", device="meta")(x.to("meta"))[0].shape == (5, 2, 24)


def test_other_dtypes_are_as_without_the_option():
    for dtype in (torch.float64, torch.bfloat16):
        module, plain = (fastrnn.GRU(8, 24, dtype=dtype, weights=weights) for weights in ("int8", None))
        plain.load_state_dict(module.state_dict())
        x = torch.randn(5, 2, 8, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(module(x)[0], plain(x)[0])


def test_training_is_an_error():
    with pytest.raises(RuntimeError, match="weights='int8' is for inference"):
        fastrnn.LSTM(8, 24, weights="int8")(torch.randn(5, 2, 8))


def test_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="weights: expected None, 'bf16' or 'int8', got 'int4'"):
        fastrnn.LSTM(8, 24, weights="int4")
    case = make_case("gru", 2, 2, 3, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="rounded: expected 'bf16' or 'int8', got 'int4'"):
        run(case, "int4")


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_convert_takes_quantized_weights_over(quantize, name, per_channel):
    """To the bit: a unit vector is exact in int8, so its products with weights that lost nothing are, too."""
    torch.manual_seed(0)
    kind = getattr(torch.nn, name)
    qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
    kinds = {kind: qconfig} if per_channel else {kind}
    plain = torch.nn.Sequential(kind(12, 40, 2, batch_first=True, bidirectional=True))
    theirs = quantize(plain, kinds)
    weights = {**theirs[0].get_weight(), **theirs[0].get_bias()}
    layer, calls = theirs[0], []
    layer.register_forward_hook(lambda *_: calls.append(1))
    converted = fastrnn.convert(theirs)
    assert converted[0] is layer
    assert type(layer) is getattr(fastrnn, name)
    assert (layer.weights, layer.batch_first, layer.bidirectional, layer.num_layers) == ("int8", True, True, 2)
    for key, tensor in weights.items():
        assert torch.equal(getattr(layer, key), tensor.dequantize().float())
    rounded, exact = (getattr(fastrnn, name)(12, 40, weights=option) for option in ("int8", None))
    for module in (rounded, exact):
        module.load_state_dict({key: layer.state_dict()[key] for key in module.state_dict()})
    units = torch.eye(12)[None]  # [1, 12, 12]
    with torch.no_grad():
        torch.testing.assert_close(rounded(units)[0], exact(units)[0], rtol=0, atol=1e-6)
    y, _ = converted(torch.randn(3, 5, 12))  # not under no_grad: there is no gradient to record, as before
    assert calls == [1]
    assert y.shape == (3, 5, 80)


def test_converted_is_as_close_to_the_float_model(quantize):
    torch.manual_seed(0)
    plain = torch.nn.LSTM(48, 64)
    x = torch.randn(20, 3, 48)
    with torch.no_grad():
        expected = plain(x)[0]
        theirs = quantize(torch.nn.Sequential(plain), {torch.nn.LSTM})
        their_error = (theirs(x)[0] - expected).abs().mean()
        error = (fastrnn.convert(theirs)(x)[0] - expected).abs().mean()
    assert error < 1.1 * their_error


def test_float16_and_cells(quantize, caplog):
    half = quantize(torch.nn.Sequential(torch.nn.LSTM(4, 6)), {torch.nn.LSTM}, dtype=torch.float16)
    assert fastrnn.convert(half)[0].weights is None
    cell = quantize(torch.nn.Sequential(torch.nn.GRUCell(4, 6)), {torch.nn.GRUCell})
    kind = type(cell[0])
    fastrnn.convert(cell)
    assert type(cell[0]) is kind
    assert "a quantized cell" in caplog.text


def test_a_converted_layer_below_a_trainable_one(quantize):
    """Its output may be computed without torch.no_grad(), as before; its gradient not, as before."""
    theirs = quantize(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LSTM(8, 16)), {torch.nn.LSTM})
    model, x = fastrnn.convert(theirs), torch.randn(4, 2, 8)
    with torch.no_grad():
        expected = model(x)[0]
    y = model(x)[0]
    assert torch.equal(y, expected)
    assert "products of int8" in fastrnn.explain(model, x)
    with pytest.raises(RuntimeError, match="derivative for fastrnn::packed_forward is not implemented"):
        y.sum().backward()


def test_convert_keeps_what_else_a_quantized_layer_has(quantize):
    layer = quantize(torch.nn.Sequential(torch.nn.LSTM(8, 16)), {torch.nn.LSTM})[0]
    layer.note, layer.child = "mine", torch.nn.Linear(2, 2)
    layer.register_buffer("mask", torch.ones(2))
    layer.eval()
    fastrnn.convert(layer)
    assert (layer.note, layer.training) == ("mine", False)
    assert "mask" in layer.state_dict()
    assert isinstance(layer.child, torch.nn.Linear)
    assert not hasattr(layer, "_all_weight_values")
    assert type(fastrnn.revert(layer)) is torch.nn.LSTM


def test_convert_leaves_what_it_cannot_take_over(quantize, caplog):
    def quantized_lstm(**options):
        return quantize(torch.nn.Sequential(torch.nn.LSTM(8, 16, **options)), {torch.nn.LSTM})[0]

    patched, projected, derived = quantized_lstm(), quantized_lstm(proj_size=4), quantized_lstm()
    patched.forward = lambda x: x
    derived.__class__ = type("Derived", (type(derived),), {})
    model = torch.nn.ModuleList([patched, projected, derived])
    kinds = [type(module) for module in model]
    fastrnn.convert(model)
    assert [type(module) for module in model] == kinds
    for reason in ("a forward of its own", "without its projection", "a subclass of a quantized layer"):
        assert reason in caplog.text


def test_sums_that_do_not_fit_are_an_error():
    at_most = fastrnn.RNN(131072, 1, nonlinearity="relu", bias=False, weights="int8").requires_grad_(False)
    at_most.weight_ih_l0.fill_(0.01)
    torch.testing.assert_close(at_most(torch.ones(1, 1, 131072))[0], torch.tensor([[[1310.72]]]), rtol=1e-5, atol=0)
    too_many = fastrnn.RNN(131073, 1, weights="int8").requires_grad_(False)
    with pytest.raises(ValueError, match="weights='int8': expected at most 131072 inputs and units, got 131073"):
        too_many(torch.ones(1, 1, 131073))
    with pytest.raises(ValueError, match="weights='int8': expected at most 131072"):
        too_many.stream()


def test_explain_names_the_option():
    x = torch.randn(9, 4, 8)
    for option, text in (("int8", "products of int8"), ("bf16", "weights rounded to bfloat16")):
        layer = fastrnn.LSTM(8, 16, weights=option)
        assert f"weights={option!r} is for inference" in fastrnn.explain(layer, x)
        with torch.no_grad():
            found = fastrnn.explain(layer, x)
        assert text in found
        assert "keeps the packed weights" in found
    torch.backends.mkldnn.rnn.fp32_precision = "bf16"
    try:
        with torch.no_grad():
            assert "exact" not in fastrnn.explain(fastrnn.LSTM(8, 16, weights="int8"), x)
    finally:
        torch.backends.mkldnn.rnn.fp32_precision = "none"
