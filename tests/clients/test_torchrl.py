"""torchrl's LSTMModule and GRUModule, with each back end for CPUs: the same before and after `convert`."""

import copy

import pytest
import torch

torchrl = pytest.importorskip("torchrl")

from tensordict import TensorDict, from_module  # noqa: E402
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential  # noqa: E402
from torchrl.envs import GymEnv, InitTracker, TransformedEnv  # noqa: E402
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode  # noqa: E402
from twins import assert_same  # noqa: E402

import fastrnn  # noqa: E402

# All comparisons are in float32 within twins.TOLERANCE: both sides add the same products, in another order.
B, T, I, H, L = 3, 9, 4, 8, 2
LAYERS = {"LSTM": LSTMModule, "GRU": GRUModule}
STATES = {"LSTM": ["h", "c"], "GRU": ["h"]}
BACKENDS = {  # triton needs a GPU
    "pad": {"recurrent_backend": "pad"},
    "auto": {"recurrent_backend": "auto"},
    "scan": {"recurrent_backend": "scan"},
    "scan-recompute": {"recurrent_backend": "scan", "recurrent_recompute": "full"},
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def make(layer: str, **options):
    """torchrl's module: `x` and the states -> `y` and the next states."""
    keys = {"in_keys": ["x", *STATES[layer]], "out_keys": ["y", *(("next", name) for name in STATES[layer])]}
    return LAYERS[layer](I, H, **{"num_layers": L} | options, **keys)


def inner(module, layer: str) -> torch.nn.Module:
    return getattr(module, layer.lower())


def converted(module, layer: str):
    """A copy in which `convert` replaced torch.nn's layer."""
    twin = fastrnn.convert(copy.deepcopy(module))
    assert type(inner(twin, layer)) is getattr(fastrnn, layer)
    assert type(inner(module, layer)) is getattr(torch.nn, layer)
    return twin


def batch(module, layer: str, resets: bool = True) -> TensorDict:
    """[B, T] steps in which episodes begin at random, with states at each, as a collector stores them."""
    rnn = inner(module, layer)
    rows = rnn.num_layers * (2 if rnn.bidirectional else 1)
    sizes = {"h": getattr(rnn, "proj_size", 0) or H, "c": H}
    states = {name: torch.randn(B, T, rows, sizes[name]) for name in STATES[layer]}
    is_init = torch.rand(B, T, 1) < (0.3 if resets else 0)
    assert is_init[:, 1:].any() == resets
    return TensorDict({"x": torch.randn(B, T, I), "is_init": is_init, **states}, [B, T])


def results(module, data: TensorDict, recurrent: bool) -> dict[str, torch.Tensor]:
    """All that a call writes, and the gradients of a fixed sum of it."""
    data = data.clone()
    data["x"].requires_grad_()
    x = data["x"]
    with set_recurrent_mode(recurrent):
        written = module(data)
    found = {str(key): written[key] for key in module.out_keys}
    loss = sum((value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in found.values())
    asked = {"x": x} | dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(asked.values()))
    return found | {f"gradient of {name}": grad for name, grad in zip(asked, grads, strict=True)}


@each_layer
@pytest.mark.parametrize("backend", BACKENDS)
def test_recurrent_mode(layer, backend):
    module = make(layer, **BACKENDS[backend])
    data = batch(module, layer)
    assert_same(results(converted(module, layer), data, True), results(module, data, True), torch.float32)


@each_layer
def test_recurrent_mode_without_resets(layer):
    """Then "pad" passes tensors, where it passes packed sequences otherwise."""
    module = make(layer)
    data = batch(module, layer, resets=False)
    assert_same(results(converted(module, layer), data, True), results(module, data, True), torch.float32)


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("LSTM", {"bidirectional": True}),
        ("GRU", {"bidirectional": True}),
        ("LSTM", {"bias": False}),
        ("GRU", {"bias": False}),
        ("LSTM", {"proj_size": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_options_in_recurrent_mode(layer, options):
    module = make(layer, **options)
    data = batch(module, layer)
    assert_same(results(converted(module, layer), data, True), results(module, data, True), torch.float32)


@each_layer
def test_dropout_draws_the_same_numbers(layer):
    module = make(layer, dropout=0.5)
    data = batch(module, layer)
    found = []
    for twin in (converted(module, layer), module):
        torch.manual_seed(1)
        found.append(results(twin, data, True))
    assert_same(*found, torch.float32)


@each_layer
def test_single_steps(layer):
    module = make(layer)
    data = batch(module, layer)[:, 0]
    data["is_init"] = torch.tensor([[True], [False], [False]])  # its state is dropped
    assert_same(results(converted(module, layer), data, False), results(module, data, False), torch.float32)


@each_layer
def test_python_based_and_back(layer, caplog):
    """torchrl replaces the layer by its own, which `convert` leaves with a warning, and by torch.nn's again."""
    module = make(layer)
    data = batch(module, layer)
    expected = results(module, data, True)
    twin = converted(module, layer).make_python_based()
    theirs = type(inner(twin, layer))
    assert theirs.__module__.startswith("torchrl")
    assert_same(results(twin, data, True), expected, torch.float32)
    assert type(inner(fastrnn.convert(twin), layer)) is theirs
    assert "make_cudnn_based() of its LSTMModule or GRUModule, and convert then" in caplog.text
    twin = fastrnn.convert(twin.make_cudnn_based())
    assert type(inner(twin, layer)) is getattr(fastrnn, layer)
    assert_same(results(twin, data, True), expected, torch.float32)


@each_layer
def test_parameters_of_another_module(layer):
    """torchrl's losses call a module with parameters that they keep in a TensorDict."""
    module, other = make(layer), make(layer)
    twin, data = converted(module, layer), batch(module, layer)
    expected = results(other, data, True)
    with from_module(other).to_module(twin):
        assert_same(results(twin, data, True), expected, torch.float32)
    assert_same(results(twin, data, True), results(module, data, True), torch.float32)


@each_layer
def test_primer(layer):
    module = make(layer)
    assert repr(converted(module, layer).make_tensordict_primer()) == repr(module.make_tensordict_primer())


@each_layer
def test_training_with_rollouts(layer):
    """A policy that collects step by step and learns in recurrent mode."""
    found = {}
    for convert in (False, True):
        torch.manual_seed(1)
        names = STATES[layer]
        keys = {"in_keys": ["observation", *names], "out_keys": ["y", *(("next", name) for name in names)]}
        rnn = LAYERS[layer](4, H, **keys)
        head = TensorDictModule(torch.nn.Linear(H, 2), in_keys=["y"], out_keys=["logits"])
        draw = ProbabilisticTensorDictModule(
            ["logits"],
            ["action"],
            distribution_class=torch.distributions.Categorical,
            default_interaction_type="random",
        )
        actor = TensorDictSequential(rnn, head)
        if convert:
            fastrnn.convert(actor)
        env = TransformedEnv(GymEnv("CartPole-v1", categorical_action_encoding=True), InitTracker())
        env.append_transform(rnn.make_tensordict_primer())
        env.set_seed(1)
        optimizer = torch.optim.SGD(actor.parameters(), lr=0.01)
        rewards = []
        for _ in range(3):
            with torch.no_grad():
                data = env.rollout(40, TensorDictSequential(actor, draw), break_when_any_done=False)
            with set_recurrent_mode(True):
                logits = actor(data.exclude("y", "logits").clone())["logits"]
            assert_same(logits.detach(), data["logits"], torch.float32)
            log_prob = torch.distributions.Categorical(logits=logits).log_prob(data["action"])
            reward = data["next", "reward"].squeeze(-1) - data["observation"].square().sum(-1)
            optimizer.zero_grad()
            (-(log_prob * reward).mean()).backward()
            optimizer.step()
            rewards.append(reward)
        assert data["is_init"].sum() > 1
        found[convert] = {"rewards": torch.stack(rewards)} | {n: p.detach() for n, p in actor.named_parameters()}
    assert_same(found[True], found[False], torch.float32)
