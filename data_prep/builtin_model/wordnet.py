"""Read the nouns of WordNet 3.0 (Fellbaum 1998; Debian's package `wordnet-base`): names, kinds, counts.

The files' format is that of wndb(5WN). Libraries that read it want files that Debian leaves out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("/usr/share/wordnet")
NAMED = "named"  # in place of a lexicographer's file: a single person, place or thing


@dataclass(frozen=True, slots=True)
class Synset:
    """A meaning: its names, the usual one first, the kinds it is of, and the lexicographer's file."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]  # offsets of hypernyms
    file: str  # "05" animals, "06" artifacts, "13" food, ...; NAMED


@dataclass(frozen=True, slots=True, eq=False)
class WordNet:
    """All nouns."""

    synsets: Mapping[str, Synset]  # by offset, 8 digits
    meanings: Mapping[str, tuple[str, ...]]  # of each noun: offsets, the most frequent first
    counts: Counter[str]  # of each noun in the texts that were tagged for WordNet

    @classmethod
    def read(cls, folder: Path = FOLDER) -> WordNet:
        """Raises FileNotFoundError where WordNet is not installed."""
        synsets, meanings = {}, {}
        for fields in _lines(folder / "data.noun"):
            n_names = int(fields[3], 16)
            names = tuple(name.replace("_", " ") for name in fields[4 : 4 + 2 * n_names : 2])
            rest = fields[5 + 2 * n_names :]
            pointers = [rest[i : i + 4] for i in range(0, 4 * int(fields[4 + 2 * n_names]), 4)]
            kinds = tuple(offset for sign, offset, *_ in pointers if sign in ("@", "@i"))
            single = any(sign == "@i" for sign, *_ in pointers)
            synsets[fields[0]] = Synset(names, kinds, NAMED if single else fields[1])
        for word, _, n_meanings, n_signs, *rest in _lines(folder / "index.noun"):
            offsets = rest[int(n_signs) + 2 :][: int(n_meanings)]
            meanings[word.replace("_", " ")] = tuple(offsets)
        counts: Counter[str] = Counter()
        for key, _, count in _lines(folder / "cntlist.rev"):
            word, meaning = key.split("%")
            if meaning.startswith("1:"):  # nouns
                counts[word.replace("_", " ")] += int(count)
        return cls(synsets, meanings, counts)

    def kinds(self, offset: str) -> Iterator[str]:
        """Yield the offsets of all kinds that a meaning is of, the nearest first."""
        seen, waiting = {offset}, [offset]
        for each in waiting:
            new = [kind for kind in self.synsets[each].kinds if kind not in seen]
            seen.update(new)
            waiting += new
            yield from new

    def covered(self, offsets: list[str]) -> Mapping[str, list[int]]:
        """Return each kind's share of some meanings: the numbers of those that are of the kind."""
        covered: defaultdict[str, list[int]] = defaultdict(list)
        for number, offset in enumerate(offsets):
            for kind in self.kinds(offset):
                covered[kind].append(number)
        return covered


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield the fields of each line, without the licence at the top and the gloss at the end."""
    with path.open(encoding="latin-1") as lines:
        for line in lines:
            if not line.startswith("  "):
                yield line.partition(" | ")[0].split()
