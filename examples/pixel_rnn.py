"""PixelRNN: an image drawn pixel by pixel, by a row LSTM.

Lecture 002: autoregressive models; van den Oord et al. 2016 (arXiv 1601.06759). The probability of an image is a
product over its pixels, each given those above it and to its left:

    p(x) = product over rows r and columns w of p(x_rw | rows before r, x_r1 ... x_r(w-1))

An LSTM goes down the rows; its state is C channels in each column. A gate is a sum of two convolutions along the row,
of the input, masked so that it sees columns to the left alone, and of the states of the row above:

    gate_rw = sigmoid(sum over v < w of K_x[v - w] x_rv + sum over |v - w| <= 1 of K_h[v - w] h_(r-1)v + b)

That is mask A; in the second layer mask B also lets column w through, which holds what the first layer made of pixels
to the left. A convolution is the product with a matrix that repeats its kernel along the diagonals: all this is an LSTM
of W * C units with such weights. Trained on small binary digits, it draws lower halves that fit the upper ones.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from tqdm import trange

import fastrnn
from fastrnn.reference import Weights

W, C = 8, 24  # columns (and rows) of an image, channels


def toeplitz(kernel):
    """The matrix `[A*W, B*W]` of a convolution along a row with zeros around it; kernel `[A, B, K]`, K odd."""
    A, B, K = kernel.shape
    columns = torch.arange(W)
    place = columns - columns[:, None] + K // 2  # in the kernel, of input column v for output column w
    matrix = kernel[:, :, place.clamp(0, K - 1)] * ((place >= 0) & (place < K))  # [A, B, W, W]
    return matrix.transpose(1, 2).reshape(A * W, B * W)


class RowLSTM(nn.Module):
    """The parameters of a layer: the gates' kernels of the input, of the state before, and their biases."""

    def __init__(self, inputs: int, mask: str, width: int = 7):
        super().__init__()
        bound = (inputs * width + 3 * C) ** -0.5
        self.k_x = nn.Parameter(torch.empty(4 * C, inputs, width).uniform_(-bound, bound))
        self.k_h = nn.Parameter(torch.empty(4 * C, C, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(4 * C))
        self.register_buffer("mask", (torch.arange(width) < width // 2 + (mask == "B")).float())

    def weights(self):
        bias = self.bias.repeat_interleave(W)
        return Weights(toeplitz(self.k_x * self.mask), toeplitz(self.k_h), bias, torch.zeros_like(bias))


class PixelRNN(nn.Module):
    """Of images `[B, W, W]`, the logit of each pixel given those before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([RowLSTM(1, "A"), RowLSTM(C, "B")])
        self.output = nn.Sequential(nn.Conv1d(C, C, 1), nn.ReLU(), nn.Conv1d(C, 1, 1))  # each column for itself

    def forward(self, images):
        weights = [[layer.weights()] for layer in self.layers]
        h, _, _ = fastrnn.functional.rnn("lstm", images.transpose(0, 1), None, None, weights)  # [rows, B, C * W]
        return self.output(h.reshape(-1, C, W)).view(W, len(images), W).transpose(0, 1)

    @torch.no_grad()
    def complete(self, images, known):
        """Draws all rows from `known` on."""
        images = images.clone()
        images[:, known:] = 0
        for row in range(known, W):
            for column in range(W):
                p = self(images)[:, row, column].sigmoid()
                images[:, row, column] = torch.bernoulli(p)
        return images


def nll(logits, images):
    """In nats per image."""
    return nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def main(effort: float, out: Path):
    torch.manual_seed(0)
    images = (torch.tensor(load_digits().images)[torch.randperm(1797)] > 7).float()
    train, test = images[:1400], images[1400:]
    model, steps = PixelRNN(), max(2, round(1200 * effort))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in trange(steps):
        batch = train[torch.randint(len(train), (64,))]
        loss = nll(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    independent = ((train.sum(0) + 1) / (len(train) + 2)).logit().expand_as(test)  # each pixel's own frequency
    with torch.no_grad():
        print(f"row LSTM: {nll(model(test), test):.1f} nats for an image that it was not trained on")
    print(f"in training: {sum(losses[-50:]) / len(losses[-50:]):.1f} nats")
    print(f"independent pixels: {nll(independent, test):.1f} nats")

    originals = test[:10]
    given = originals.clone()
    given[:, W // 2 :] = 0.3  # gray
    drawn = model.complete(originals.repeat(3, 1, 1), known=W // 2)
    lines = torch.cat([originals, given, drawn]).view(5, 10, W, W)
    lines = nn.functional.pad(lines, (1, 1, 1, 1), value=0.15)  # frames
    plt.figure(figsize=(8, 4.2))
    plt.imshow(lines.transpose(1, 2).flatten(2).flatten(0, 1), cmap="gray_r")
    plt.yticks([(W + 2) * (i + 0.5) for i in range(5)], ["digits", "given", "drawn", "drawn", "drawn"])
    plt.xticks([])
    plt.tight_layout()
    plt.savefig(out / "pixel_rnn.png", dpi=100)
