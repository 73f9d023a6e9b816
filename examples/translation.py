"""Translation: an encoder and a decoder, many to many of another length and order.

Lectures 000, 001 and 003: one recurrent network reads the whole sentence; from its last state a second one writes the
translation, word by word, from BOS to EOS:

    p(y_1 ... y_n | x) = product over t of p(y_t | y_1 ... y_{t-1}, encoder's h_T)

English numbers become German ones, whose order is another: "forty two" is "zweiundvierzig", two and forty. In training
the decoder reads the right words so far (teacher forcing), in use its own: the likeliest one in each step (greedy), or
several beginnings are kept, and at last the likeliest is taken (beam search).
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

import fastrnn

BOS, EOS = "<bos>", "<eos>"
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
ONES = [*ONES.split(), "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
EINS = "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn"
EINS = [*EINS.split(), "achtzehn", "neunzehn"]
ZEHN = ["", "", "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig"]
LONGEST = 10


def english(n):
    """As a list of words."""
    if n >= 100:
        head = [ONES[n // 1000], "thousand"] if n >= 1000 else []
        head += [ONES[n // 100 % 10], "hundred"] if n // 100 % 10 else []
        return head + (english(n % 100) if n % 100 else [])
    return [ONES[n]] if n < 20 else [TENS[n // 10]] + ([ONES[n % 10]] if n % 10 else [])


def german(n):
    """As a list of the parts that are written as one word."""
    if n >= 100:
        head = [EINS[n // 1000], "tausend"] if n >= 1000 else []
        head += [EINS[n // 100 % 10], "hundert"] if n // 100 % 10 else []
        return head + (german(n % 100) if n % 100 else [])
    if n < 20:
        return ["eins"] if n == 1 else [EINS[n]]
    return ([EINS[n % 10], "und"] if n % 10 else []) + [ZEHN[n // 10]]


SOURCE = [*ONES, *TENS[2:], "hundred", "thousand"]
TARGET = [BOS, EOS, *EINS, "eins", "und", *ZEHN[2:], "hundert", "tausend"]


def numbered(sentences, vocabulary, padding):
    """`[T, B]`, padded."""
    rows = [torch.tensor([vocabulary.index(word) for word in sentence]) for sentence in sentences]
    return pad_sequence(rows, padding_value=padding)


class Translator(nn.Module):
    """Encoder and decoder, which is called for one step or for all."""

    def __init__(self, units=128):
        super().__init__()
        self.read, self.encoder = nn.Embedding(len(SOURCE), 32), fastrnn.GRU(32, units)
        self.write, self.decoder = nn.Embedding(len(TARGET), 32), fastrnn.GRU(32, units)
        self.output = nn.Linear(units, len(TARGET))

    def encode(self, source):
        return self.encoder(self.read(source.clamp(min=0)), lengths=(source >= 0).sum(0))[1]

    def decode(self, words, h):
        """The logarithms of the next word's probabilities `[T, B, V]`, and the state."""
        y, h = self.decoder(self.write(words), h)
        return self.output(y).log_softmax(-1), h


@torch.no_grad()
def translate(model, source, width):
    """Beam search; greedy if `width` is 1. Words `[T, B]`, the first is BOS, and EOS follows the last."""
    B, V = source.shape[1], len(TARGET)
    h = model.encode(source).repeat_interleave(width, 1)  # the beginnings of a sentence lie side by side
    words = torch.full((1, B * width), TARGET.index(BOS))
    score = torch.full((B, width), -torch.inf)
    score[:, 0] = 0  # all beginnings are the same at first
    for _ in range(LONGEST):
        log_p, h = model.decode(words[-1:], h)
        finished = words[-1] == TARGET.index(EOS)
        log_p[0, finished] = -torch.inf
        log_p[0, finished, TARGET.index(EOS)] = 0  # what is finished stays as it is
        score, best = (score[:, :, None] + log_p.view(B, width, V)).flatten(1).topk(width)
        rows = (torch.arange(B)[:, None] * width + best // V).flatten()
        words = torch.cat([words[:, rows], (best % V).view(1, -1)])
        h = h[:, rows]
    return words[:, ::width]  # topk sorts: each sentence's first is its likeliest


def spelled(words):
    """A column of `translate` as one German word."""
    parts = [TARGET[word] for word in words[1:]]
    return "".join(parts[: parts.index(EOS)] if EOS in parts else parts)


def main(effort: float, out: Path):
    torch.manual_seed(0)
    numbers = torch.randperm(10000).tolist()
    train, test = numbers[:1000], numbers[-2000:]
    source = numbered(map(english, train), SOURCE, -1)
    target = numbered(([BOS, *german(n), EOS] for n in train), TARGET, -1)
    unseen, wanted = numbered(map(english, test), SOURCE, -1), ["".join(german(n)) for n in test]

    def exact(found):
        return sum(a == b for a, b in zip(found, wanted, strict=True)) / len(test)

    model, losses, curve = Translator(), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = max(2, round(600 * effort))
    for step in trange(steps):
        rows = torch.randint(len(train), (64,))
        words = target[:, rows]
        log_p, _ = model.decode(words[:-1].clamp(min=0), model.encode(source[:, rows]))  # teacher forcing
        loss = nn.functional.nll_loss(log_p.flatten(0, 1), words[1:].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 40 == 0 or step == steps - 1:
            curve.append((step, exact([spelled(row) for row in translate(model, unseen, 1).T])))
    for width in (1, 2, 5):
        found = [spelled(row) for row in translate(model, unseen, width).T]
        name = f"beam of {width}" if width > 1 else "greedy"
        print(f"{name}: {exact(found):.1%} of {len(test)} unseen numbers are exactly right")
    translations = list(zip(test, found, wanted, strict=True))
    wrong = [row for row in translations if row[1] != row[2]]
    for n, word, correct in translations[:4] + wrong[:3]:
        print(f"  {' '.join(english(n))}: {word}" + ("" if word == correct else f" (right: {correct})"))

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    left.semilogy(losses)
    left.set_ylabel("loss on training numbers (nats per word)")
    right.plot(*zip(*curve, strict=True))
    right.set_ylabel("unseen numbers right (greedy)")
    for panel in (left, right):
        panel.set_xlabel("step of training")
    plt.tight_layout()
    plt.savefig(out / "translation.png", dpi=100)
