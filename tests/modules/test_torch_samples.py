"""PyTorch's own conformance samples of its recurrent modules (`module_db`), run on ours."""

from copy import deepcopy

import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from twins import assert_same, results

import fastrnn

# How many samples torch 2.13 has per setting: plain, with packed sequences as well, and erroneous ones. LSTM has none
# with packed sequences; test_packed.py tests those.
COUNTS = {
    "RNN": (32, 64, 14),
    "GRU": (16, 32, 14),
    "LSTM": (32, 32, 14),
    "RNNCell": (3, 3, 6),
    "GRUCell": (2, 2, 6),
    "LSTMCell": (2, 2, 4),
}
INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in COUNTS}

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
each_requires_grad = pytest.mark.parametrize("requires_grad", [False, True], ids=["plain-input", "input-grad"])
each_training = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def packs(sample) -> bool:
    return isinstance(sample.forward_input.args[0], torch.nn.utils.rnn.PackedSequence)


def run(module, sample):
    """`results` with a copy of the sample's input, which keeps its requires_grad."""
    return results(module, *deepcopy(sample.forward_input.args), **deepcopy(sample.forward_input.kwargs))


@pytest.mark.parametrize("name", COUNTS)
@each_dtype
@each_requires_grad
@each_training
def test_samples(name, dtype, requires_grad, training, threads):
    """Outputs and all gradients are torch.nn's, for all 87 plain and 48 packed samples of the six modules."""
    threads(1)  # the samples are tiny; torch's own threads would take longer to meet than to work
    info = INFOS[name]
    samples = info.module_inputs_func(info, "cpu", dtype, requires_grad, training, with_packed_sequence=True)
    assert samples
    for sample in samples:
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **kwargs, dtype=dtype).train(training)
        ours = getattr(fastrnn, name)(*args, **kwargs, dtype=dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        found = run(ours, sample)
        assert_same(found, run(theirs, sample), dtype)
        assert sum(key.startswith("gradient") for key in found) >= len(list(ours.parameters()))
        if not packs(sample):
            output = ours(*sample.forward_input.args, **sample.forward_input.kwargs)
            expected = sample.reference_fn(ours, *sample.forward_input.args, **sample.forward_input.kwargs)
            assert_same(output, expected, dtype)


@pytest.mark.parametrize("name", COUNTS)
@each_dtype
def test_error_samples(name, dtype):
    """All 58 erroneous uses raise torch.nn's error type with torch.nn's text."""
    info = INFOS[name]
    samples = info.module_error_inputs_func(info, "cpu", dtype, False, False)
    assert samples
    for sample in samples:
        construct, forward = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        if sample.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex) as raised:
                getattr(fastrnn, name)(*construct.args, **construct.kwargs)
        else:
            module = getattr(fastrnn, name)(*construct.args, **construct.kwargs)
            with pytest.raises(sample.error_type, match=sample.error_regex) as raised:
                module(*forward.args, **forward.kwargs)
        assert raised.type is sample.error_type


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the counts are those of torch 2.13")
@pytest.mark.parametrize("name", COUNTS)
def test_sample_counts(name):
    """Nothing above ran on fewer samples than it says: 87 plain, 48 packed and 58 errors in all."""
    info = INFOS[name]
    setting = (info, "cpu", torch.float64, True, True)
    samples = info.module_inputs_func(*setting, with_packed_sequence=True)
    plain = sum(not packs(sample) for sample in samples)
    assert (plain, len(samples), len(info.module_error_inputs_func(*setting))) == COUNTS[name]
