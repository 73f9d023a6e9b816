"""An update of Stable-Baselines3's RecurrentPPO as it is and with `resets=`: python -m benchmarks.recurrent_ppo

Needs sb3-contrib. Three agents look at the same rollout of CartPole in 8 environments, in turns: with torch.nn's LSTM,
with ours after `convert`, and with ours and a policy that passes the beginnings of episodes as `resets`
(docs/with/sb3.md). A step is a call of `evaluate_actions` on a minibatch, backward, and a step of Adam.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env

import fastrnn


class PolicyWithResets(RecurrentActorCriticPolicy):
    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        rows = lstm_states[0].shape[1]
        x = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)
        resets = episode_starts.reshape(rows, -1).transpose(0, 1).bool()
        output, lstm_states = lstm(x, lstm_states, resets=resets)
        return output.transpose(0, 1).flatten(0, 1), lstm_states


def agent(name: str, steps: int, batch_size: int, units: int) -> RecurrentPPO:
    policy = PolicyWithResets if name == "resets" else "MlpLstmPolicy"
    environments = make_vec_env("CartPole-v1", 8, seed=1)
    made = RecurrentPPO(
        policy,
        environments,
        n_steps=steps,
        batch_size=batch_size,
        n_epochs=1,
        seed=1,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": units},
    )
    if name != "torch.nn":
        fastrnn.convert(made.policy)
    return made


def step(agent: RecurrentPPO, data) -> None:
    values, log_prob, _ = agent.policy.evaluate_actions(
        data.observations, data.actions.long().flatten(), data.lstm_states, data.episode_starts
    )
    agent.policy.optimizer.zero_grad()
    ((values - data.returns[:, None]).square().mean() - log_prob.mean()).backward()
    agent.policy.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=128, help="of a rollout, in each of 8 environments")
    parser.add_argument("--batch-size", type=int, default=128, help="of a minibatch")
    parser.add_argument("--units", type=int, default=256, help="of each of the two LSTMs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    agents = {
        name: agent(name, given.steps, given.batch_size, given.units) for name in ("torch.nn", "converted", "resets")
    }
    first = agents["torch.nn"]
    first.learn(given.steps * 8)
    data = next(iter(first.rollout_buffer.get(given.batch_size)))
    times = {name: [] for name in agents}
    for _ in range(given.repeats + 1):
        for name, each in agents.items():
            begin = time.perf_counter()
            step(each, data)
            times[name].append((time.perf_counter() - begin) * 1e3)
    rows = data.lstm_states.pi[0].shape[1]
    print(f"{rows} sequences, padded to {len(data.episode_starts) // rows} steps, {given.units} units")
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found[1:], n=4)
        print(f"{name:<10} {middle:7.1f} ms (quartiles {low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
