"""Truncated backpropagation through time: a character RNN learns a paragraph.

Lectures 000 and 004: a network that reads one character after the other predicts the next one,

    h_t = tanh(W_xh x_t + W_hh h_{t-1} + b_h),    p_t = softmax(W_hy h_t + b_y),    L = -sum_t log p_t[target].

Truncated BPTT goes on from chunk to chunk of 25 characters with the state that it has, but lets no gradient back into
the chunk before. Lecture 000 prints the smoothed loss of a chunk and what the network writes, for two paragraphs; ours
stands beside it, and beside full BPTT, where a step goes back through the whole paragraph. The training is chaotic:
with another seed the losses differ as much as ours do from the lecture's.

The lecture's networks write "probabilities of different vector" and "recurrent nets is optimization over functions", in
place of "classes" and "programs", and it blames truncation. But in this set-up the end of the text, too short for a
chunk, is never read. So there is a second truncated run that reads the end, too.
"""

import math
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

import fastrnn

CHUNK, H = 25, 100
TEXTS = (
    "A glaring limitation of Vanilla Neural Networks (and also Convolutional Networks) is that their API is too "
    "constrained: they accept a fixed-sized vector as input (e.g. an image) and produce a fixed-sized vector as output "
    "(e.g. probabilities of different classes).",
    "If training vanilla neural nets is optimization over functions, training recurrent nets is optimization over "
    "programs.",
)
LECTURE = (  # iteration: smoothed loss
    {0: 89.587973, 500: 79.722071, 2500: 13.077288, 10000: 0.072970},
    {100: 76.656102, 1000: 40.152319, 10000: 0.070277},
)


class CharacterModel(nn.Module):
    """A vanilla RNN over one-hot characters."""

    def __init__(self, characters: int):
        super().__init__()
        self.register_buffer("one_hot", torch.eye(characters))
        self.recurrent = fastrnn.RNN(characters, H)
        self.output = nn.Linear(H, characters)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01 if parameter.dim() == 2 else 0.0)

    def forward(self, codes, h=None):  # [T]
        outputs, h = self.recurrent(self.one_hot[codes].unsqueeze(1), h)
        return self.output(outputs.squeeze(1)), h


def chunks_of(model, codes, chunk: int):
    """What the model makes of each chunk, over and over: values of states go on to the next, gradients stop."""
    while True:
        yield from fastrnn.truncated(model, codes, chunk)


def train(codes, characters: int, read: int, chunk: int, steps: int, name: str):
    """Reads a chunk per step; returns the model and its smoothed losses after 0, 1, 2, ... steps."""
    model = CharacterModel(characters)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    average = CHUNK * math.log(characters)  # of a model to which all characters are equally likely
    losses = [average]
    for scores, _, start, stop in tqdm(islice(chunks_of(model, codes[:read], chunk), steps), desc=name, total=steps):
        loss = nn.functional.cross_entropy(scores, codes[start + 1 : stop + 1], reduction="sum")
        average = 0.999 * average + 0.001 * loss.item() * CHUNK / (stop - start)
        losses.append(average)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 5.0)
        optimizer.step()
    return model, losses


@torch.no_grad()
def write(model, codes, length: int):
    """What the model writes after the first character: each is drawn, and read in turn."""
    code, h, written = codes[:1], None, []
    for _ in range(length):
        scores, h = model(code, h)
        code = torch.multinomial(scores[0].softmax(0), 1)
        written.append(code.item())
    return written


@torch.no_grad()
def loss_of_end(model, codes, count: int):
    """Mean loss of the last characters, where the model has read the whole text before each."""
    scores, _ = model(codes[:-1])
    return nn.functional.cross_entropy(scores[-count:], codes[-count:]).item()


def main(effort: float, out: Path):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steps this small are not worth a second thread
    steps = max(2, round(10_000 * effort))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for text, lecture, axis in zip(TEXTS, LECTURE, axes, strict=True):
        alphabet = sorted(set(text))
        codes = torch.tensor([alphabet.index(character) for character in text])
        read = len(text) - 1  # the last character is predicted only
        unread = read % CHUNK
        sizes = {  # of what is read, and of a chunk
            "truncated": (read - unread, CHUNK),
            "truncated, to the end": (read, CHUNK),
            "full": (read, read),
        }
        runs = {name: train(codes, len(alphabet), *own, steps, name) for name, own in sizes.items()}
        for name, (_, losses) in runs.items():
            axis.plot(losses, label=name)
        axis.plot(lecture.keys(), lecture.values(), "kx", label="lecture")
        axis.set_title(f'"{text[:28]} ..."', fontsize=10)

        print(f"\n{text}\nsmoothed loss of {CHUNK} characters:")
        print("iteration  lecture", *(f"{name:>21}" for name in runs))
        for iteration, loss in lecture.items():
            if iteration <= steps:
                print(f"{iteration:9} {loss:8.3f}", *(f"{losses[iteration]:21.3f}" for _, losses in runs.values()))
        print(f'loss of one character of the end "{text[-unread:]}":')
        for name, (model, _) in runs.items():
            print(f"  {loss_of_end(model, codes, unread):.3f} {name}")
        for name, (model, _) in runs.items():
            written = "".join(alphabet[code] for code in write(model, codes, len(text)))
            print(f"written after {steps} iterations, {name}:\n  {text[0]}{written}")
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xlabel("iteration")
        axis.legend(fontsize=8)
    axes[0].set_ylabel(f"loss of {CHUNK} characters")
    figure.tight_layout()
    figure.savefig(out / "truncated_bptt.png", dpi=100)
