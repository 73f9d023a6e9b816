"""Wrong use: torch.nn's errors where it has them, else one that names the argument, what was expected and what came."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map
from twins import CELLS, LAYERS, TOLERANCE, assert_same, make, noise, results, twins

import fastrnn

randn, zeros = torch.randn, torch.zeros


# ---- with torch.nn's texts


def packed(*shape):
    return pack_padded_sequence(randn(*shape), [shape[0]] * shape[1])


# Name: class, arguments of the constructor, arguments of the call.
LAYER_CALLS = {
    "input-1D": ("RNN", (3, 4), (randn(3),)),
    "input-4D": ("LSTM", (3, 4), (randn(1, 2, 3, 3),)),
    "input-0D": ("GRU", (3, 4), (randn(()),)),
    "input-size": ("LSTM", (3, 4), (randn(5, 2, 4),)),
    "input-size-unbatched": ("GRU", (3, 4), (randn(5, 4),)),
    "input-size-packed": ("GRU", (3, 4), (packed(5, 2, 4),)),
    "input-dtype": ("RNN", (3, 4), (randn(5, 2, 3).double(),)),
    "input-integer": ("LSTM", (3, 4), (zeros(5, 2, 3, dtype=torch.int64),)),
    "input-dtype-packed": ("GRU", (3, 4), (packed(5, 2, 3).to(torch.float64),)),
    "no-steps": ("LSTM", (3, 4), (randn(0, 2, 3),)),
    "no-steps-unbatched": ("GRU", (3, 4), (randn(0, 3),)),
    "hx-2D": ("RNN", (3, 4), (randn(5, 2, 3), zeros(1, 4))),
    "hx-3D-unbatched": ("GRU", (3, 4), (randn(5, 3), zeros(1, 1, 4))),
    "hx-2D-LSTM": ("LSTM", (3, 4), (randn(5, 2, 3), (zeros(1, 4), zeros(1, 2, 4)))),
    "hx-3D-unbatched-LSTM": ("LSTM", (3, 4), (randn(5, 3), (zeros(1, 4), zeros(1, 1, 4)))),
    "hx-batch": ("GRU", (3, 4), (randn(5, 2, 3), zeros(1, 3, 4))),
    "hx-batch-packed": ("GRU", (3, 4), (packed(5, 2, 3), zeros(1, 3, 4))),
    "hx-layers": ("RNN", (3, 4, 2), (randn(5, 2, 3), zeros(1, 2, 4))),
    "hx-size": ("RNN", (3, 4), (randn(5, 2, 3), zeros(1, 2, 5))),
    "h-size-LSTM": ("LSTM", (3, 4), (randn(5, 2, 3), (zeros(1, 2, 5), zeros(1, 2, 4)))),
    "c-size-LSTM": ("LSTM", (3, 4), (randn(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 5)))),
    "h-size-projected": (
        "LSTM",
        (3, 4, 1, True, False, 0.0, False, 2),
        (randn(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4))),
    ),
    "c-size-projected": (
        "LSTM",
        (3, 4, 1, True, False, 0.0, False, 2),
        (randn(5, 2, 3), (zeros(1, 2, 2), zeros(1, 2, 2))),
    ),
    "hx-is-a-tuple": ("GRU", (3, 4), (randn(5, 2, 3), (zeros(1, 2, 4),))),
    "input-is-a-list": ("GRU", (3, 4), ([1.0, 2.0],)),
    "input-is-none": ("LSTM", (3, 4), (None,)),
}
CELL_CALLS = {
    "cell-input-0D": ("GRUCell", (3, 4), (randn(()),)),
    "cell-input-3D": ("LSTMCell", (3, 4), (randn(5, 2, 3),)),
    "cell-input-size": ("RNNCell", (3, 4), (randn(2, 4),)),
    "cell-input-size-unbatched": ("GRUCell", (3, 4), (randn(4),)),
    "cell-hx-3D": ("RNNCell", (3, 4), (randn(2, 3), zeros(1, 2, 4))),
    "cell-c-3D": ("LSTMCell", (3, 4), (randn(2, 3), (zeros(2, 4), zeros(1, 2, 4)))),
    "cell-hx-batch": ("GRUCell", (3, 4), (randn(2, 3), zeros(3, 4))),
    "cell-c-batch": ("LSTMCell", (3, 4), (randn(2, 3), (zeros(2, 4), zeros(3, 4)))),
    "cell-c-size": ("LSTMCell", (3, 4), (randn(2, 3), (zeros(2, 4), zeros(2, 5)))),
    "cell-hx-unbatched": ("GRUCell", (3, 4), (randn(2, 3), zeros(4))),
    "cell-hx-batched": ("GRUCell", (3, 4), (randn(3), zeros(1, 4))),
    "cell-hx-of-one": ("LSTMCell", (3, 4), (randn(2, 3), (zeros(2, 4),))),
    "cell-nonlinearity": ("RNNCell", (3, 4, True, "sine"), (randn(2, 3),)),
}


def error_of(function) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    pytest.fail("no error")


@pytest.mark.parametrize(
    ("name", "construct", "call"), (LAYER_CALLS | CELL_CALLS).values(), ids=LAYER_CALLS | CELL_CALLS
)
def test_calls_fail_as_torch_nn(name, construct, call):
    """The same type and text. Both modules are sound before and after."""
    expected = error_of(lambda: getattr(torch.nn, name)(*construct)(*call))
    found = error_of(lambda: getattr(fastrnn, name)(*construct)(*call))
    assert (type(found), str(found)) == (type(expected), str(expected))


CONSTRUCTIONS = {
    "nonlinearity": ("RNN", {"nonlinearity": "sine"}),
    "dropout-range": ("LSTM", {"dropout": 1.5}),
    "dropout-negative": ("GRU", {"dropout": -0.5}),
    "dropout-bool": ("RNN", {"dropout": True}),
    "dropout-text": ("LSTM", {"dropout": "0.5"}),
    "proj_size-GRU": ("GRU", {"proj_size": 2}),
    "proj_size-RNN": ("RNN", {"proj_size": 2}),
    "proj_size-large": ("LSTM", {"proj_size": 4}),
    "proj_size-negative": ("LSTM", {"proj_size": -1}),
    "num_layers": ("LSTM", {"num_layers": -1}),
    "unknown-option": ("GRU", {"layers": 2}),
    "unknown-option-cell": ("LSTMCell", {"layers": 2}),
}


@pytest.mark.parametrize(("name", "options"), CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_constructors_fail_as_torch_nn(name, options):
    expected = error_of(lambda: getattr(torch.nn, name)(3, 4, **options))
    found = error_of(lambda: getattr(fastrnn, name)(3, 4, **options))
    assert type(found) is type(expected)
    assert str(found) == str(expected) or str(expected).startswith(
        ("RNNBase.", f"{name}.")
    )  # a TypeError names the signature


# ---- with texts of our own

T, B = 5, 2
lengths, resets = torch.tensor([5, 2]), zeros(T, B, dtype=torch.bool)
# Name: class, options, call (input and hx, lengths, resets), error, text.
OWN = {
    "hx-dtype": (
        "GRU",
        {},
        {"hx": zeros(1, B, 4).double()},
        (TypeError, ValueError),
        "(h0|hx).*(Float|float32).*(Double|float64)",
    ),
    "c0-dtype": (
        "LSTM",
        {},
        {"hx": (zeros(1, B, 4), zeros(1, B, 4).half())},
        (TypeError, ValueError),
        "(c0|hx).*(Float|float32).*(Half|float16)",
    ),
    "hx-integer": (
        "RNN",
        {},
        {"hx": zeros(1, B, 4).long()},
        (TypeError, ValueError),
        "(h0|hx).*(Float|float32).*(Long|int64)",
    ),
    "hx-is-one-tensor": (
        "LSTM",
        {"num_layers": 2},
        {"hx": zeros(2, 2, B, 4)},
        TypeError,
        r"hx: expected a tuple \(h_0, c_0\), got Tensor",
    ),
    "hx-of-one": (
        "LSTM",
        {},
        {"hx": (zeros(1, B, 4),)},
        (TypeError, ValueError, RuntimeError),
        "hx.*(2|two|pair).*(1|one)",
    ),
    "hx-of-three": (
        "LSTM",
        {},
        {"hx": (zeros(1, B, 4),) * 3},
        (TypeError, ValueError, RuntimeError),
        "hx.*(2|two|pair).*(3|three)",
    ),
    "input-device": ("LSTM", {}, {"x": randn(T, B, 3, device="meta")}, RuntimeError, "cpu.* meta|meta.* cpu"),
    "hx-device": ("GRU", {}, {"hx": zeros(1, B, 4, device="meta")}, RuntimeError, "(h0|hx|hidden).* cpu.* meta"),
    "hx-device-packed": ("LSTM", {}, {"x": packed(5, 2, 3).to("meta")}, RuntimeError, "cpu.* meta|meta.* cpu"),
    "complex": (
        "LSTM",
        {"dtype": torch.complex64},
        {"x": randn(T, B, 3) + 0j},
        TypeError,
        "expected float32.* got Complex",
    ),
    "lengths-list": ("GRU", {}, {"lengths": [5, 2]}, TypeError, "lengths: expected .*int64, got list"),
    "lengths-int32": (
        "GRU",
        {},
        {"lengths": lengths.int()},
        TypeError,
        r"lengths: expected .*int64, got torch.int32; .*lengths.long\(\)",
    ),
    "lengths-float": (
        "LSTM",
        {},
        {"lengths": lengths.float()},
        TypeError,
        "lengths: expected .*int64, got torch.float32",
    ),
    "lengths-few": ("LSTM", {}, {"lengths": lengths[:1]}, ValueError, r"lengths: expected shape \(2,\), got \(1,\)"),
    "lengths-2D": ("RNN", {}, {"lengths": lengths[None]}, ValueError, r"lengths: expected shape \(2,\), got \(1, 2\)"),
    "lengths-negative": (
        "RNN",
        {},
        {"lengths": lengths - 3},
        ValueError,
        r"lengths: expected .*\[0, 5\], got -1 at index 1",
    ),
    "lengths-long": (
        "LSTM",
        {},
        {"lengths": lengths + 1},
        ValueError,
        r"lengths: expected .*\[0, 5\], got 6 at index 0",
    ),
    "lengths-huge": ("LSTM", {}, {"lengths": lengths - 2**63}, ValueError, r"lengths: expected .*\[0, 5\], got -92"),
    "lengths-long-no-steps": (
        "GRU",
        {},
        {"x": randn(0, B, 3), "lengths": lengths},
        ValueError,
        r"lengths: expected .*\[0, 0\], got 5",
    ),
    "lengths-1D-unbatched": (
        "GRU",
        {},
        {"x": randn(T, 3), "lengths": lengths[:1]},
        ValueError,
        r"lengths: expected shape .*, got",
    ),
    "lengths-device": ("GRU", {}, {"lengths": lengths.to("meta")}, RuntimeError, "lengths.* cpu.* meta"),
    "resets-list": ("GRU", {}, {"resets": [[True]]}, TypeError, "resets: expected .*bool, got list"),
    "resets-uint8": ("LSTM", {}, {"resets": resets.byte()}, TypeError, "resets: expected .*bool, got torch.uint8"),
    "resets-float": (
        "GRU",
        {},
        {"resets": resets.float()},
        TypeError,
        r"resets: expected .*bool, got torch.float32; pass resets.bool\(\)",
    ),
    "resets-turned": ("LSTM", {}, {"resets": resets.t()}, ValueError, r"resets: expected shape \(5, 2\), got \(2, 5\)"),
    "resets-batch-first": (
        "RNN",
        {"batch_first": True},
        {"x": randn(B, T, 3), "resets": resets},
        ValueError,
        r"resets: expected shape \(2, 5\), got \(5, 2\)",
    ),
    "resets-1D": ("RNN", {}, {"resets": resets[0]}, ValueError, r"resets: expected shape \(5, 2\), got \(2,\)"),
    "resets-2D-unbatched": (
        "RNN",
        {},
        {"x": randn(T, 3), "resets": resets},
        ValueError,
        "resets: expected shape .*, got",
    ),
    "resets-device": ("LSTM", {}, {"resets": resets.to("meta")}, RuntimeError, "resets.* cpu.* meta"),
}


@pytest.mark.parametrize(("name", "options", "call", "error", "text"), OWN.values(), ids=OWN)
def test_errors_of_our_own(name, options, call, error, text):
    module = getattr(fastrnn, name)(3, 4, **options)
    given = {"x": randn(T, B, 3), "hx": None} | call
    with pytest.raises(error, match=text):
        module(given.pop("x"), given.pop("hx"), **given)


@pytest.mark.parametrize("value", [0, "no", None])
@pytest.mark.parametrize("name", ["GRU", "GRUCell"])
def test_reset_after_must_be_bool(name, value):
    with pytest.raises(TypeError, match=f"reset_after should be of type bool, got: {type(value).__name__}"):
        getattr(fastrnn, name)(3, 4, reset_after=value)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "RNNCell", "LSTMCell"])
def test_reset_after_is_of_the_gru(name):
    with pytest.raises(TypeError, match="reset_after"):
        getattr(fastrnn, name)(3, 4, reset_after=True)


REPLACED = {
    "shape": (lambda w: zeros(4 * 4, 5), ValueError, r"w_hh: expected .*\[16, 4\], got \[16, 5\]"),
    "dimensions": (lambda w: w[0], ValueError, r"w_hh: expected shape \[16, 4\], got \[4\]"),
    "dtype": (lambda w: w.double(), TypeError, "w_hh: expected dtype .*[Ff]loat.*, got .*([Dd]ouble|float64)"),
}


@pytest.mark.parametrize(("replace", "error", "text"), REPLACED.values(), ids=REPLACED)
def test_replaced_weight_of_wrong(replace, error, text):
    module = fastrnn.LSTM(3, 4, bidirectional=True)
    module.weight_hh_l0_reverse = torch.nn.Parameter(replace(module.weight_hh_l0.detach()))
    with pytest.raises(error, match=text):
        module(randn(T, B, 3))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("rows", [{}, {"lengths": torch.tensor([5, 2])}], ids=["plain", "lengths"])
def test_weights_on_another_device(name, rows):
    """Half a model moved is an error that names both devices, never numbers from nowhere."""
    with pytest.raises(RuntimeError, match=r"cpu.* meta|meta.* cpu"):
        getattr(fastrnn, name)(3, 4, device="meta")(randn(T, B, 3), **rows)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells_with_another_device_or_dtype(name):
    module, x = getattr(fastrnn, name)(3, 4), randn(2, 3)
    state = (zeros(2, 4), zeros(2, 4)) if name == "LSTMCell" else zeros(2, 4)
    with pytest.raises(RuntimeError, match=r"cpu.* meta|meta.* cpu"):
        module(x.to("meta"))
    with pytest.raises(RuntimeError, match=r"cpu.* meta|meta.* cpu"):
        module(x, tree_map(lambda t: t.to("meta"), state))
    with pytest.raises((TypeError, ValueError), match=r"(Float|float32).*(Double|float64)"):
        module(x.double())
    with pytest.raises((TypeError, ValueError), match=r"(h0|hx|hidden).*(Float|float32).*(Double|float64)"):
        module(x, tree_map(lambda t: t.double(), state))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("shape", [(2**56, 1, 1), (1, 2**56, 1), (2**28, 2**28, 1)], ids=["T", "B", "both"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_too_large_for_memory(name, shape, training):
    """2**58 bytes, more than any address space: the allocator's error, and the module works on."""
    module = getattr(fastrnn, name)(1, 1)
    with torch.set_grad_enabled(training), pytest.raises(RuntimeError, match=r"alloc.*memory|not enough memory"):
        module(randn(1, 1, 1).expand(shape))
    assert module(randn(3, 2, 1))[0].isfinite().all()


def test_sizes_that_overflow():
    """More elements than an int64 counts."""
    with pytest.raises(RuntimeError, match=r"overflow|memory"):
        fastrnn.LSTM(1, 4)(randn(1, 1, 1).expand(2**31, 2**31, 1))


# ---- numbers that are none


@pytest.mark.parametrize("case", LAYERS | CELLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300, -1e300], ids=str)
@pytest.mark.parametrize("where", ["input", "weight_ih", "weight_hh", "bias_ih"])
def test_nan_and_extremes_propagate_as_in_torch_nn(case, value, where):
    ours, theirs = twins(case, 5, 7)
    x = noise(2, 5) if case in CELLS else noise(4, 2, 5)
    with torch.no_grad():
        if where == "input":
            x.view(-1)[3] = value
        else:
            for module in (ours, theirs):
                module.get_parameter(where if case in CELLS else f"{where}_l0").view(-1)[3] = value
    torch.testing.assert_close(results(ours, x), results(theirs, x), rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("case", LAYERS | CELLS)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e20], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_saturated_gates(case, scale, dtype):
    """Large inputs drive every gate to its end, where nothing overflows on the way."""
    ours, theirs = twins(case, 5, 7, dtype=dtype)
    x = ((torch.randn(2, 5) if case in CELLS else torch.randn(4, 2, 5)).to(dtype) * scale).requires_grad_()
    found, expected = results(ours, x), results(theirs, x)
    for name in expected:
        assert expected[name].isfinite().all()
        # A slope 1 - y^2 near 0 is wrong by a rounding of 1, and multiplies an x of this scale.
        factor = scale if "gradient" in name or "relu" in case else 1
        atol = factor * TOLERANCE[dtype]["atol"]
        torch.testing.assert_close(found[name], expected[name], rtol=TOLERANCE[dtype]["rtol"], atol=atol, msg=name)


def test_modules_are_sound_after_errors():
    """An error leaves nothing behind."""
    ours, theirs = twins("LSTM", 3, 4)
    with pytest.raises(ValueError, match="lengths"):
        ours(noise(T, B, 3), lengths=lengths + 1)
    assert_same(results(ours, x := noise(T, B, 3)), results(theirs, x))
    assert repr(make(fastrnn, "LSTM", 3, 4)) == repr(ours)
