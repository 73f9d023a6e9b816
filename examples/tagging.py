"""Parts of speech: many to many, a label for each word.

Lecture 003: in "Don't desert me in the desert!" the same word is a verb and then a noun. A classifier that sees each
word alone can only learn its most frequent label. A recurrent network has read the words before, a bidirectional one
also those after: in "the light" there is a noun, unless another one follows ("the light boat"). With h_t the state of
the forward network, and that of the backward one beside it if there is one,

    p(tag_t | x_1 ... x_T) = softmax(V h_t + b)
"""

import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange

import fastrnn

NOUN_OR_VERB = ["desert", "watch", "guard", "man", "ship", "book", "duck", "play"]
ADJECTIVE_OR_NOUN = ["light", "old", "cold", "secret", "dark", "young"]
AMBIGUOUS = [*NOUN_OR_VERB, *ADJECTIVE_OR_NOUN]
CHOICES = {  # of each tag; half of the verbs, adjectives and nouns have one tag alone
    "DET": ["the", "a", "this"],
    "ADJ": [*ADJECTIVE_OR_NOUN, "big", "green", "strange", "quiet", "new", "red"],
    "NOUN": [*NOUN_OR_VERB, *ADJECTIVE_OR_NOUN, "boat", "dog", "river", "house", "teacher", "garden"],
    "VERB": [*NOUN_OR_VERB, "see", "know", "follow", "find", "keep", "hear", "love", "paint"],
    "PRON": ["me", "you", "them", "it"],
    "ADP": ["in", "near", "behind"],
    "AUX": ["don't", "can", "must"],
}
TAGS = list(CHOICES)
WORDS = sorted({word for words in CHOICES.values() for word in words})


def noun_phrase():
    return ["PRON"] if random.random() < 0.3 else ["DET"] + ["ADJ"] * (random.random() < 0.5) + ["NOUN"]


def sentence():
    """Its words and their tags: [subject] [auxiliary] verb object [preposition object]."""
    tags = (noun_phrase() if random.random() < 0.7 else ["AUX"]) + ["AUX"] * (random.random() < 0.2)
    tags += ["VERB", *noun_phrase()] + (["ADP", *noun_phrase()] if random.random() < 0.5 else [])
    return [random.choice(CHOICES[tag]) for tag in tags], tags


def pad(rows, names):
    """Names to numbers `[T, B]`, -1 after the end of a row."""
    return pad_sequence([torch.tensor([names.index(name) for name in row]) for row in rows], padding_value=-1)


def batch(size):
    words, tags = zip(*(sentence() for _ in range(size)), strict=True)
    return pad(words, WORDS), pad(tags, TAGS)


class Tagger(nn.Module):
    """The tags of words, each alone or by an LSTM of one or two directions."""

    def __init__(self, directions: int):
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(len(WORDS), 32), None
        if directions:
            self.recurrent = fastrnn.LSTM(32, 32, bidirectional=directions == 2)
        self.output = nn.Linear(32 * max(1, directions), len(TAGS))

    def forward(self, words):
        h = self.embedding(words.clamp(min=0))
        if self.recurrent is not None:
            h, _ = self.recurrent(h, lengths=(words >= 0).sum(0))  # backward starts at each row's last word
        return self.output(h)


def main(effort: float, out: Path):
    random.seed(0)
    torch.manual_seed(0)
    tested, wanted = batch(1000)
    is_ambiguous = torch.isin(tested, torch.tensor([WORDS.index(word) for word in AMBIGUOUS]))
    lecture = ["don't", "desert", "me", "in", "the", "desert"]
    plt.figure(figsize=(6, 3.5))
    for name, directions in {"each word alone": 0, "LSTM": 1, "bidirectional LSTM": 2}.items():
        model, curve = Tagger(directions), []
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        steps = max(2, round(200 * effort))
        for step in trange(steps, desc=name):
            words, tags = batch(64)
            loss = nn.functional.cross_entropy(model(words).flatten(0, 1), tags.flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0 or step == steps - 1:
                with torch.no_grad():
                    right = model(tested).argmax(-1) == wanted
                curve.append((step, right[is_ambiguous].float().mean().item()))
        others = right[(tested >= 0) & ~is_ambiguous].float().mean()
        print(f"{name}: {curve[-1][1]:.1%} of the ambiguous words are right, {others:.1%} of the others")
        tags = model(pad([lecture], WORDS)).argmax(-1)[:, 0]
        print("   ", " ".join(f"{word}/{TAGS[tag]}" for word, tag in zip(lecture, tags, strict=True)))
        plt.plot(*zip(*curve, strict=True), label=name)
    plt.xlabel("step of training")
    plt.ylabel("ambiguous words that are right")
    plt.legend()
    plt.tight_layout()
    plt.savefig(out / "tagging.png", dpi=100)
