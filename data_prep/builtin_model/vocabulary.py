"""Names of what pictures may show, each with the share that the photo classifier's classes have in it.

Three lists: the classes themselves, the kinds that they are of ("dog", "vehicle"), and everyday nouns
that are near to some class in meaning ("puppy", "spaniel"; ConSE, Norouzi et al. 2013, arXiv 1312.5650).
A picture shows a name with probability `p @ names.classes.T`, where p are the classifier's own.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from clipkit.arrays import Float32
from data_prep.builtin_model.sources import ART_PROMPTS, PHOTO_PROMPTS, fill, read_rows
from data_prep.builtin_model.wordnet import WordNet

Embed = Callable[[Sequence[str]], Float32]  # texts -> unit rows, in which similar meanings are near

_FEWEST, _MOST = 2, 120  # classes that a kind has: "thing" says nothing
_NEAR = 0.5  # cosine to the nearest class that makes a noun one of ours
_TEMPERATURE = 0.05  # of the softmax over the classes
# Animals, artifacts, bodies, food, objects of nature, people, plants, substances.
_VISIBLE = frozenset(("05", "06", "08", "13", "17", "18", "20", "27"))
_WORD = re.compile(r"[a-z][a-z' -]+")
_SEED, DRAWS = 1234, 10  # of the classes that are held out
_PROMPTS, _PHOTOS = 3, 0.7  # of each name, beside itself; the share that speak of a photo
_WEIGHTS = (1.0, 0.5, 0.7)  # in the loss


@dataclass(frozen=True, slots=True, eq=False)
class Class:
    """One class of the classifier."""

    names: tuple[str, ...]
    offset: str  # in WordNet
    photo: Path


@dataclass(frozen=True, slots=True, eq=False)
class Names:
    """N things, each with some texts that name it."""

    texts: tuple[tuple[str, ...], ...]
    classes: Float32  # (N, C): how much of each class's probability is the thing's
    weight: float  # in the loss

    def draw(self, rng: random.Random, most: int) -> tuple[list[int], list[str]]:
        """Draw at most so many things, and a text of each."""
        chosen = range(len(self.texts))
        drawn = sorted(rng.sample(chosen, most)) if most < len(chosen) else list(chosen)
        return drawn, [rng.choice(self.texts[number]) for number in drawn]


def held_out(draw: int) -> list[int]:
    """Return a tenth of the classes, the same ones whenever a draw (0 to 9) is asked for."""
    order = np.random.default_rng(_SEED).permutation(len(IMAGENET_CLASSNAMES))
    return sorted(np.split(order, DRAWS)[draw].tolist())


def read_classes(data: Path) -> list[Class]:
    """Read the classes with a photo of each, in the classifier's order.

    The name that OpenCLIP's benchmarks use comes first, and as often as all of WordNet's.
    """
    folder = data / "imagenet_sample"
    rows = sorted(read_rows(folder / "classes.jsonl"), key=lambda row: row["class"])
    classes = []
    for row, name in zip(rows, IMAGENET_CLASSNAMES, strict=True):
        names = (name,) * len(row["names"]) + tuple(row["names"])
        classes.append(Class(names, row["wnid"].removeprefix("n"), folder / row["image"]))
    return classes


def make(
    classes: Sequence[Class],
    wordnet: WordNet,
    common: Collection[str],
    embed: Embed,
    *,
    rng: random.Random,
    without: Collection[int] = (),
) -> list[Names]:
    """Make the lists: classes, kinds, everyday nouns.

    common: words that everybody knows, for the everyday nouns.
    without: classes that are not to be learnt; no name of theirs is used, nor their probability.
    """
    kept = [number for number in range(len(classes)) if number not in without]
    eye = np.eye(len(classes), dtype=np.float32)
    own = [classes[number].names for number in kept]

    covered = wordnet.covered([each.offset for each in classes])
    parts = {kind: [c for c in cs if c not in without] for kind, cs in covered.items()}
    parts = {kind: cs for kind, cs in parts.items() if _FEWEST <= len(cs) <= _MOST}
    kinds = [wordnet.synsets[kind].names[:2] for kind in parts]

    unknown = {name.lower() for number in without for name in classes[number].names}
    words = [word for word in everyday_nouns(wordnet, common) if word not in unknown]
    nearness = near(words, classes, wordnet, embed)
    nearness[:, list(without)] = -np.inf
    is_near = nearness.max(1) >= _NEAR
    shares = np.exp((nearness[is_near] - 1) / _TEMPERATURE)
    shares /= shares.sum(1, keepdims=True)
    nouns = [(word,) for word, it_is in zip(words, is_near, strict=True) if it_is]

    of_kinds = np.array([eye[cs].sum(0) for cs in parts.values()]).reshape(-1, len(classes))
    return [
        Names(_in_prompts(own, rng), eye[kept], _WEIGHTS[0]),
        Names(_in_prompts(kinds, rng), of_kinds, _WEIGHTS[1]),
        Names(_in_prompts(nouns, rng), shares, _WEIGHTS[2]),
    ]


def _in_prompts(things: Sequence[Sequence[str]], rng: random.Random) -> tuple[tuple[str, ...], ...]:
    """Return each thing's texts: every name alone and in some prompts."""

    def texts(name: str) -> Iterator[str]:
        yield name
        for _ in range(_PROMPTS):
            prompts = PHOTO_PROMPTS if rng.random() < _PHOTOS else ART_PROMPTS
            yield fill(prompts, name, rng)

    return tuple(tuple(text for name in names for text in texts(name)) for names in things)


def everyday_nouns(wordnet: WordNet, common: Collection[str]) -> list[str]:
    """Return the nouns that usually mean something visible: common words, and frequent pairs of them."""
    nouns = []
    for word, meanings in wordnet.meanings.items():
        words = word.split()
        known = all(w in common for w in words) and (len(words) == 1 or wordnet.counts[word] > 0)
        visible = wordnet.synsets[meanings[0]].file in _VISIBLE
        if known and visible and _WORD.fullmatch(word):
            nouns.append(word)
    return nouns


def near(words: Sequence[str], classes: Sequence[Class], wordnet: WordNet, embed: Embed) -> Float32:
    """Return the cosine of each word to the nearest name of each class and its kinds, (words, C)."""
    names: dict[str, list[int]] = {}
    for number, each in enumerate(classes):
        kinds = [
            name for kind in wordnet.kinds(each.offset) for name in wordnet.synsets[kind].names
        ]
        for name in dict.fromkeys((*each.names, *kinds)):
            names.setdefault(name, []).append(number)
    cosines = embed(words) @ embed(list(names)).T
    nearness = np.full((len(words), len(classes)), -1, np.float32)
    for column, numbers in zip(cosines.T, names.values(), strict=True):
        nearness[:, numbers] = np.maximum(nearness[:, numbers], column[:, None])
    return nearness


def save(lists: Sequence[Names], path: Path) -> None:
    """Write the lists as an .npz without pickles."""
    arrays: dict[str, Any] = {"weights": np.array([each.weight for each in lists])}
    for number, each in enumerate(lists):
        arrays[f"texts{number}"] = np.array(json.dumps(each.texts))
        arrays[f"classes{number}"] = each.classes.astype(np.float16)
    np.savez_compressed(path, **arrays)


def load(path: Path) -> list[Names]:
    """Read what `save` has written."""
    with np.load(path) as arrays:
        return [
            Names(
                tuple(map(tuple, json.loads(str(arrays[f"texts{number}"])))),
                arrays[f"classes{number}"].astype(np.float32),
                float(weight),
            )
            for number, weight in enumerate(arrays["weights"])
        ]
