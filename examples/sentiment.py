"""Sentiment of a sentence: many to one.

Lectures 000, 001 and 002: a sequence goes in, one answer comes out, as in sentiment analysis. Sentences are judgements
such as "the plot was not good but the acting was never boring", and the last one counts. A bag of words sees that there
is a "not", but not what it negates. A recurrent network reads in order, and its state after the last word is what the
answer is made of:

    p(positive) = sigmoid(w h_T + b)

The sentences of a batch differ in length: they are padded to the longest, and told apart by `lengths`.
"""

import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

import fastrnn

GOOD, BAD = ["good", "great", "funny", "clever", "moving"], ["bad", "awful", "boring", "silly", "slow"]
NEGATION, ADVERB = ["not", "never", "hardly"], ["really", "so", "quite"]
NOUN = ["plot", "acting", "music", "ending", "film"]
WORDS = [*GOOD, *BAD, *NEGATION, *ADVERB, *NOUN, "the", "was", "and", "but"]
INDEX = {word: i for i, word in enumerate(WORDS)}


def sentence():
    """Its words, and whether the last judgement is a good one. "And" keeps the opinion, "but" turns it."""
    positive, words = random.random() < 0.5, []
    for clause in range(random.randint(1, 4)):
        if clause:
            turns = random.random() < 0.5
            positive ^= turns
            words.append("but" if turns else "and")
        negated = random.random() < 0.4
        words += ["the", random.choice(NOUN), "was"]
        words += [random.choice(NEGATION)] * negated + [random.choice(ADVERB)] * (random.random() < 0.3)
        words.append(random.choice(GOOD if positive ^ negated else BAD))
    return words, positive


def encode(sentences):
    """Padded word numbers `[T, B]` and lengths `[B]`."""
    rows = [torch.tensor([INDEX[word] for word in words]) for words in sentences]
    return pad_sequence(rows), torch.tensor([len(row) for row in rows])


def batch(size):
    sentences, labels = zip(*(sentence() for _ in range(size)), strict=True)
    return *encode(sentences), torch.tensor(labels).float()


class BagOfWords(nn.Module):
    """A linear classifier of how often each word occurs."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(len(WORDS), 1)

    def forward(self, words, lengths):
        real = torch.arange(len(words))[:, None] < lengths
        counts = (nn.functional.one_hot(words, len(WORDS)) * real[:, :, None]).sum(0)
        return self.output(counts.float())[:, 0]


class Reader(nn.Module):
    """A classifier of the state after the last word."""

    def __init__(self):
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(len(WORDS), 16), fastrnn.GRU(16, 32)
        self.output = nn.Linear(32, 1)

    def forward(self, words, lengths):
        _, h_n = self.recurrent(self.embedding(words), lengths=lengths)  # h_n: each row's at its own last word
        return self.output(h_n[0])[:, 0]


def main(effort: float, out: Path):
    torch.manual_seed(0)
    random.seed(0)
    test = batch(2000)
    for name, model in {"bag of words": BagOfWords(), "GRU": Reader()}.items():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in trange(max(2, round(600 * effort)), desc=name):
            words, lengths, positive = batch(64)
            loss = nn.functional.binary_cross_entropy_with_logits(model(words, lengths), positive)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = (model(test[0], test[1]) > 0) == (test[2] > 0)
        print(f"{name}: {right.float().mean():.1%} of 2000 new sentences are understood")

    _, panels = plt.subplots(2, 1, figsize=(9, 5), sharey=True)
    examples = ["the plot was not really good but the acting was never boring"]
    examples.append("the music was great and the film was never slow but the ending was so silly")
    for panel, text in zip(panels, examples, strict=True):
        words, _ = encode([text.split()])
        with torch.no_grad():  # the first t words of the sentence, for each t
            score = model(words.expand(-1, len(words)), torch.arange(len(words)) + 1).sigmoid()
        ends = [word in GOOD + BAD for word in text.split()]  # the rest, in gray, is no sentence: it was not trained on
        colors = [("C2" if s > 0.5 else "C3") if end else "0.85" for s, end in zip(score, ends, strict=True)]
        panel.bar(range(len(words)), score - 0.5, bottom=0.5, color=colors)
        panel.axhline(0.5, color="gray", linewidth=0.8)
        panel.set_xticks(range(len(words)), text.split(), rotation=35)
        panel.set_ylabel("p(positive)\nso far")
        panel.set_ylim(0, 1)
    plt.tight_layout()
    plt.savefig(out / "sentiment.png", dpi=100)
