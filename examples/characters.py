"""A character network that writes, at several temperatures.

Lecture 000: what the network has written so far is its state, p(y_t | h_t), and each character that is drawn is read
in turn. Drawn at temperature tau,

    p_t = softmax(scores_t / tau),

low temperatures repeat what is likely, high ones invent. The entropy of p_t tells how free the choice is; the loss on
unread text is smallest near tau = 1 if the network's doubts are as large as they should be. A GRU learns from Python's
own reference, which comes with Python (`help("topics")`; another version, other numbers). It writes one character at a
time with `layer.stream()`, which keeps the state.
"""

import math
import re
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import trange

import fastrnn

# Topics repeat parts of one another: each paragraph once, so that what is held out has not been read elsewhere.
TEXT = "\n\n".join(dict.fromkeys("\n\n".join(topics.values()).split("\n\n")))
ALPHABET = sorted(set(TEXT))
CODES = torch.tensor([ALPHABET.index(character) for character in TEXT])
HELD_OUT = 10_000  # characters at the end
TRAINING = CODES[:-HELD_OUT]
T, B, H = 100, 32, 256


class Writer(nn.Module):
    """Scores of the next character at each step."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 32)
        self.recurrent = fastrnn.GRU(32, H)
        self.output = nn.Linear(H, len(ALPHABET))

    def forward(self, codes):  # [T, B]
        return self.output(self.recurrent(self.embedding(codes))[0])

    @torch.no_grad()
    def write(self, beginning: str, length: int, temperature: float) -> str:
        step = self.recurrent.stream()  # one row, state zero
        for character in beginning:
            y = step(self.embedding(torch.tensor([ALPHABET.index(character)])))
        written = []
        for _ in range(length):
            code = torch.multinomial((self.output(y) / temperature).softmax(-1), 1)[0]  # [1]
            written.append(ALPHABET[code.item()])
            y = step(self.embedding(code))
        return "".join(written)


def known_words(text: str) -> float:
    """Share of the words that occur in the text of training."""
    known = set(re.findall(r"\w+", TEXT[:-HELD_OUT]))
    words = re.findall(r"\w+", text)[1:-1]  # the first and the last may be cut
    return sum(word in known for word in words) / max(1, len(words))


def main(effort: float, out: Path):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steady where other programs run; on an idle machine more may be faster
    model = Writer()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    steps = max(2, round(1000 * effort))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in trange(steps, desc="training"):
        starts = torch.randint(len(TRAINING) - T, (B,))
        codes = TRAINING[starts + torch.arange(T + 1)[:, None]]  # [T + 1, B]
        loss = nn.functional.cross_entropy(model(codes[:-1]).flatten(0, 1), codes[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))

    held_out = CODES[-HELD_OUT:].view(20, -1).T  # 20 rows of 500 characters
    with torch.no_grad():
        scores, targets = model(held_out[:-1]).flatten(0, 1), held_out[1:].flatten()
    temperatures = torch.arange(2, 17) / 10
    entropies, costs = [], []  # in bits per character
    for temperature in temperatures:
        logs = (scores / temperature).log_softmax(-1)
        entropies.append(-(logs.exp() * logs).sum(-1).mean().item() / math.log(2))
        costs.append(nn.functional.nll_loss(logs, targets).item() / math.log(2))

    print(f"bits per character: {math.log2(len(ALPHABET)):.2f} if all {len(ALPHABET)} were equally likely,")
    print(f"{sum(losses[-50:]) / len(losses[-50:]):.2f} at the end of training, {costs[8]:.2f} on unread text")
    print(f"on unread text the temperature {temperatures[costs.index(min(costs))]:.1f} predicts best: {min(costs):.2f}")
    for temperature in (0.3, 0.7, 1.2):
        written = model.write("The ", 1000, temperature)
        print(f"\ntemperature {temperature}: {known_words(written):.0%} of the words were read in training; it writes")
        print("The " + written[:250])

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    axes[0].plot(losses)
    axes[0].set_xlabel("step of training")
    axes[0].set_ylabel("loss, bits per character")
    axes[1].plot(temperatures, entropies, label="entropy of the predictions")
    axes[1].plot(temperatures, costs, label="loss on unread text")
    axes[1].set_ylim(bottom=0)
    axes[1].set_xlabel("temperature")
    axes[1].set_ylabel("bits per character")
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(out / "characters.png", dpi=100)
