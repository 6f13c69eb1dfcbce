"""Hard negatives: for each picture, others that its captions nearly match, but do not.

Found by the towers as they are now, with the project's own index. The likeliest "negatives" are
often pictures that the caption describes just as well, so whoever matches a caption better than
`margin` times its own picture does is spared (TopK-PercPos of NV-Retriever, arXiv 2407.15831), and
so is whoever has a caption that says the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from clipkit.index import VectorIndex
from clipkit.training.data import CaptionedPictures

__all__ = ["mine"]

Vectors = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_SEARCHED = 10  # candidates looked at for each one asked for


def mine(
    pictures: Vectors, texts: Vectors, data: CaptionedPictures, *, count: int, margin: float = 0.95
) -> Ints:
    """int64 (N, count): each picture's hardest negatives, hardest first; -1 where there are fewer.

    pictures (N, D) and texts (distinct captions, D) are unit rows, `data` what they are of.
    """
    index = VectorIndex.build(np.arange(len(pictures)), pictures)
    having: dict[int, set[int]] = {}  # pictures that have a caption of this meaning
    for picture, numbers in enumerate(data.owned):
        for number in numbers:
            having.setdefault(int(data.meanings[number]), set()).add(picture)
    result = np.full((len(data), count), -1, np.int64)
    for picture, numbers in enumerate(data.owned):
        found: dict[int, float] = {}
        spared = {picture}
        for number, (ids, scores) in zip(
            numbers, index.search(texts[numbers], _SEARCHED * count + 1), strict=True
        ):
            own = float(texts[number] @ pictures[picture])
            limit = own - (1 - margin) * abs(own)
            spared |= having[int(data.meanings[number])]
            spared |= set(ids[scores > limit].tolist())
            for candidate, score in zip(ids.tolist(), scores.tolist(), strict=True):
                found[candidate] = max(score, found.get(candidate, -2.0))
        hardest = sorted((-s, c) for c, s in found.items() if c not in spared)[:count]
        result[picture, : len(hardest)] = [c for _, c in hardest]
    return result
