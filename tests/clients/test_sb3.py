"""sb3-contrib's RecurrentPPO: a converted policy plays and learns the same."""

import copy
import inspect
import io
from pathlib import Path

import pytest
import torch

sb3_contrib = pytest.importorskip("sb3_contrib")

import numpy as np  # noqa: E402
from twins import assert_same  # noqa: E402

import fastrnn  # noqa: E402

POLICIES = {
    "two-lstms": ({}, ["lstm_actor", "lstm_critic"]),
    "shared": ({"shared_lstm": True, "enable_critic_lstm": False}, ["lstm_actor"]),
    "actor-only": ({"enable_critic_lstm": False}, ["lstm_actor"]),
    "two-layers": ({"n_lstm_layers": 2}, ["lstm_actor", "lstm_critic"]),
}


def learned(policy: str, convert: bool, steps: int = 144):
    """An agent after `steps` steps of CartPole, 48 to an update. The seed is torch's global one: one at a time."""
    options, names = POLICIES[policy]
    agent = sb3_contrib.RecurrentPPO(
        "MlpLstmPolicy",
        "CartPole-v1",
        n_steps=48,
        batch_size=24,
        n_epochs=2,
        learning_rate=1e-3,
        seed=1,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 16, "net_arch": [8], **options},
    )
    if convert:
        assert fastrnn.convert(agent.policy) is agent.policy
    for name in names:
        assert type(getattr(agent.policy, name)) is (fastrnn if convert else torch.nn).LSTM
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    agent.learn(steps)
    assert all((value - before[name]).abs().max() > 1e-4 for name, value in agent.policy.state_dict().items())
    return agent


def play(agent, steps: int = 60) -> dict[str, torch.Tensor]:
    """The likeliest actions and the states over `steps` steps of noise, an episode of 20 after the other."""
    rng = np.random.default_rng(2)
    state, actions, states = None, [], []
    for t in range(steps):
        observation = rng.normal(size=(1, 4)).astype(np.float32)
        action, state = agent.predict(observation, state, episode_start=np.array([t % 20 == 0]), deterministic=True)
        actions.append(torch.from_numpy(action))
        states.append(torch.from_numpy(np.stack(state)))
    return {"actions": torch.stack(actions), "states": torch.stack(states)}


@pytest.mark.parametrize("policy", POLICIES)
def test_learning(policy):
    """Three rollouts of 48 steps, which are several episodes, and 12 steps of Adam.

    The tolerance is float32's roundings: from the first action that one agent draws differently, the two would see
    other episodes, and their parameters be apart by 1e-3, the learning rate.
    """
    theirs, ours = learned(policy, convert=False), learned(policy, convert=True)
    assert len(theirs.ep_info_buffer) > 3
    for name in ("actions", "episode_starts"):
        assert (getattr(ours.rollout_buffer, name) == getattr(theirs.rollout_buffer, name)).all()
    assert_same(dict(ours.policy.state_dict()), dict(theirs.policy.state_dict()), torch.float32)
    assert_same(play(ours), play(theirs), torch.float32)


def test_saved_and_loaded():
    """The file is that of an agent that was never converted: what is loaded has torch.nn's LSTM, to convert again."""
    agent = learned("two-lstms", convert=True, steps=48)
    file = io.BytesIO()
    agent.save(file)
    file.seek(0)
    loaded = sb3_contrib.RecurrentPPO.load(file, device="cpu")
    assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
    assert_same(play(loaded), play(agent), torch.float32)
    fastrnn.convert(loaded.policy)
    assert_same(play(loaded), play(agent), torch.float32)


def test_policy_with_resets():
    """That of docs/with/sb3.md, which is the one that is measured: the same gradients, with one call of an LSTM where
    the library's own has one for each step."""
    from benchmarks import recurrent_ppo

    page = Path(__file__).parents[2] / "docs" / "with" / "sb3.md"
    assert inspect.getsource(recurrent_ppo.PolicyWithResets) in page.read_text()
    agents = {name: recurrent_ppo.agent(name, 16, 64, 8) for name in ("converted", "resets")}
    agents["converted"].learn(256)
    data = next(iter(agents["converted"].rollout_buffer.get(64)))
    parameters = copy.deepcopy(agents["converted"].policy.state_dict())
    calls, gradients = dict.fromkeys(agents, 0), {}
    for name, agent in agents.items():
        agent.policy.load_state_dict(parameters)
        agent.policy.lstm_actor.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
        recurrent_ppo.step(agent, data)
        gradients[name] = {key: parameter.grad for key, parameter in agent.policy.named_parameters()}
    assert calls["resets"] == 1
    assert calls["converted"] > 4
    assert_same(gradients["resets"], gradients["converted"], torch.float32)
