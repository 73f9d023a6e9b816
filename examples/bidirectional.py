"""Bidirectional networks: a label that depends on later words.

Lectures 001, 003 and 004: in "He needs to work more, Pavlos said about Patrick", who he is comes later. Here sentences
are names with a pronoun somewhere, and the label of a pronoun is the name nearest to it, before it or after it: half of
the answers lie in what a forward network has not read yet.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import trange

import fastrnn

NAMES, FILLERS, PRONOUN = 8, 20, 28  # words 0-7 are names, 8-27 say nothing, 28 is the pronoun
T, B = 24, 64


class Tagger(nn.Module):
    """Which name each word means, by a GRU of one or two directions."""

    def __init__(self, bidirectional: bool):
        super().__init__()
        self.embedding = nn.Embedding(PRONOUN + 1, 32)
        self.recurrent = fastrnn.GRU(32, 64, bidirectional=bidirectional)
        self.output = nn.Linear(128 if bidirectional else 64, NAMES)

    def forward(self, words):  # [T, B]
        return self.output(self.recurrent(self.embedding(words))[0])


def sentences():
    """Words `[T, B]`, where the pronoun stands `[B]`, whom it means `[B]`: the name one to four words away from it."""
    words, rows = torch.randint(NAMES, NAMES + FILLERS, (T, B)), torch.arange(B)
    place, who = torch.randint(4, T - 4, (B,)), torch.randint(NAMES, (B,))
    distance = torch.randint(1, 5, (B,)) * (torch.randint(2, (B,)) * 2 - 1)
    words[place, rows] = PRONOUN
    words[place + distance, rows] = who
    return words, place, who


def main(effort: float, out: Path):
    torch.manual_seed(0)
    rows, curves = torch.arange(B), {}
    for name, bidirectional in {"forward": False, "bidirectional": True}.items():
        model = Tagger(bidirectional)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        right = []
        for _ in trange(max(2, round(600 * effort)), desc=name):
            words, place, who = sentences()
            scores = model(words)[place, rows]
            loss = nn.functional.cross_entropy(scores, who)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right.append((scores.argmax(-1) == who).float().mean().item())
        curves[name] = right
        share = torch.tensor(right[-50:]).mean()
        print(f"{name}: {share:.0%} of the pronouns are understood")
    chance = 0.5 + 0.5 / NAMES
    print(f"expected of a network that reads forward alone: at most {chance:.0%}, the names before and a guess")

    plt.figure(figsize=(6, 3.5))
    for name, right in curves.items():
        plt.plot(right, label=name)
    plt.axhline(chance, color="gray", linestyle=":", label="all that a forward network can know")
    plt.xlabel("step of training")
    plt.ylabel("pronouns understood")
    plt.legend()
    plt.tight_layout()
    plt.savefig(out / "bidirectional.png", dpi=100)
