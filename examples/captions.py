"""Captions of images: one to many.

Lectures 000, 001 and 003: one vector goes in, a sequence comes out, as when an image is described in words. A small
convolutional network turns it into the first state of an LSTM, which writes the caption word by word, from BOS to EOS:

    h_0, c_0 = encoder(image),  p(y_t | y_1 ... y_{t-1}, image) = softmax(V h_t + b)

The images are handwritten digits. A caption such as "a bold seven heavy at the top" tells the digit and, where they are
unusual, the amount of ink and the centre of mass: captions differ in length. Encoder and decoder are trained together.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

import fastrnn

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["<bos>", "<eos>", "a", "an", *DIGITS, "faint", "bold", "heavy", "at", "the", "top", "bottom"]
BOS, EOS, LONGEST = 0, 1, 8


def captions(images, classes):
    """A list of words for each image `[N, 8, 8]`: the outer quarters of ink and height are called by name."""
    ink = images.sum((1, 2))
    height = (images * torch.arange(8.0).flip(0)[:, None]).sum((1, 2)) / ink  # of the centre of mass
    (faint, bold), (low, high) = (torch.quantile(each, torch.tensor([0.25, 0.75])) for each in (ink, height))
    result = []
    for n, digit in enumerate(classes):
        adjective = ["faint"] if ink[n] < faint else ["bold"] if ink[n] > bold else []
        where = ["bottom"] if height[n] < low else ["top"] if height[n] > high else []
        words = [*adjective, DIGITS[digit], *(["heavy", "at", "the", *where] if where else [])]
        result.append(["an" if words[0] == "eight" else "a", *words])
    return result


class Captioner(nn.Module):
    """Image encoder and LSTM decoder."""

    def __init__(self, units=128):
        super().__init__()
        convolutions = nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()
        self.encoder = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 4 * 4, 2 * units))
        self.embedding, self.decoder = nn.Embedding(len(WORDS), 32), fastrnn.LSTM(32, units)
        self.output = nn.Linear(units, len(WORDS))

    def encode(self, images):
        """The first h and c, `[1, B, H]` each."""
        h, c = self.encoder(images[:, None])[None].chunk(2, -1)
        return h.contiguous(), c.contiguous()

    def decode(self, words, state):
        y, state = self.decoder(self.embedding(words), state)
        return self.output(y), state

    @torch.no_grad()
    def describe(self, images):
        """Captions as lists of words, by the likeliest word in each step."""
        state, word, written = self.encode(images), torch.full((1, len(images)), BOS), []
        for _ in range(LONGEST):
            scores, state = self.decode(word, state)
            word = scores.argmax(-1)
            written.append(word)
        rows = torch.cat(written).T.tolist()
        return [[WORDS[i] for i in (row[: row.index(EOS)] if EOS in row else row)] for row in rows]


def main(effort: float, out: Path):
    torch.manual_seed(0)
    digits = load_digits()
    images, order = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.randperm(1797)
    train, test = order[:1400], order[1400:]
    texts = captions(images, digits.target)
    target = pad_sequence([torch.tensor([BOS, *map(WORDS.index, text), EOS]) for text in texts], padding_value=-1)
    model = Captioner()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in trange(max(2, round(1000 * effort))):
        rows = train[torch.randint(len(train), (64,))]
        words = target[:, rows]
        scores, _ = model.decode(words[:-1].clamp(min=0), model.encode(images[rows]))  # reads the right words so far
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), words[1:].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    found, wanted = model.describe(images[test]), [texts[n] for n in test]
    share = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(found)
    print(f"{share:.0%} of {len(found)} captions of new images are right in every word")
    for what, names in {"digit": DIGITS, "ink": ["faint", "bold"], "centre of mass": ["top", "bottom"]}.items():
        parts = [[[word for word in text if word in names] for text in side] for side in (found, wanted)]
        right = sum(a == b for a, b in zip(*parts, strict=True)) / len(found)
        guess = max(map(parts[1].count, parts[1])) / len(found)
        print(f"  the {what} is right in {right:.0%} (the most frequent answer: {guess:.0%})")

    _, panels = plt.subplots(2, 3, figsize=(7, 4.5))
    for n, panel in enumerate(panels.flat):
        panel.imshow(images[test][n], cmap="gray_r")
        mark = "" if found[n] == wanted[n] else f"\n(rule: {' '.join(wanted[n])})"
        panel.set_title(" ".join(found[n]) + mark, fontsize=9)
        panel.axis("off")
    plt.tight_layout()
    plt.savefig(out / "captions.png", dpi=100)
