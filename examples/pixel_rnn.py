"""PixelRNN: an image drawn pixel by pixel, by a row LSTM.

Lecture 002's autoregressive models; van den Oord et al. 2016 (arXiv 1601.06759). The probability of an image is a product
over its pixels, each given those above it and to its left:

    p(x) = product over rows r and columns w of p(x_rw | rows before r, x_r1 ... x_r(w-1))

An LSTM goes down the rows. Each column has a state of C channels; what a gate adds up are convolutions along the row,
of the inputs (masked: mask A leaves pixels to the left, mask B, in the second layer, the own column too) and of the row
before's states, column by column w:

    gate_w = sum over v < w of K_x[v - w] x_rv + sum over |v - w| <= 1 of K_h[v - w] h_(r-1)v + b

A convolution is a product with a matrix that repeats its kernel along the diagonal, so that this is an LSTM of W * C units
with such weights. Trained on small binary digits, it completes digits whose lower half is missing.
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
        print(f"row LSTM: {nll(model(test), test):.1f} nats for an image not seen in training, {losses[-1]:.1f} in training")
    print(f"independent pixels: {nll(independent, test):.1f} nats; a coin for each: {W * W * torch.log(torch.tensor(2.0)):.1f}")

    originals = test[:10]
    masked = originals.clone()
    masked[:, W // 2 :] = 0.3
    rows = {"digit": originals, "given": masked, **{f"drawn {i}": model.complete(originals, W // 2) for i in (1, 2, 3)}}
    _, panels = plt.subplots(len(rows), 10, figsize=(8, 4.2))
    for (name, shown), line in zip(rows.items(), panels, strict=True):
        for image, panel in zip(shown, line, strict=True):
            panel.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
        line[0].set_ylabel(name)
    plt.tight_layout()
    plt.savefig(out / "pixel_rnn.png", dpi=100)
