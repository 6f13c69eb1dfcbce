"""The linear probe: logistic regression on frozen embeddings, and what it is fitted on.

CLIP's protocol (arXiv 2103.00020, A.3): scikit-learn's L-BFGS on the embeddings, the regularisation
chosen on held-out training pictures, first over powers of a hundred, then in finer steps around the
best, and fitted anew. Few-shot: s pictures per class to fit on and min(s, 4) more to choose the
regularisation with, as CoOp's linear probe (Zhou et al. 2022, arXiv 2109.01134).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clipkit.errors import InputError

__all__ = ["MAX_ITERATIONS", "few_shot_rows", "fit_linear", "linear_scores"]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

MAX_ITERATIONS = 1000
_COARSE = (-2, 0, 2, 4)  # powers of ten of C, which unit rows want large
_FINER = (1.0, 0.5)


def fit_linear(
    vectors: Float32, labels: Int64, fitted_on: Int64, validation: Int64, refit_on: Int64
) -> tuple[Any, float, bool]:
    """(logistic regression on rows `refit_on`, its C, whether it converged).

    C is the one that, fitted on `fitted_on`, is right most often on `validation`, the least of equals;
    1 if there is nothing to validate on.
    """
    for rows in (fitted_on, refit_on):
        if len(np.unique(labels[rows])) < 2:
            raise InputError("the training pictures are all of one class; a probe needs at least 2")
    accuracy: dict[float, float] = {}

    def best() -> float:
        return min(accuracy, key=lambda power: (-accuracy[power], power))

    def sweep(powers: Sequence[float]) -> None:
        model = None
        for power in sorted(powers):
            model, _ = _fit(vectors[fitted_on], labels[fitted_on], 10.0**power, model)
            right = model.predict(vectors[validation]) == labels[validation]
            accuracy[power] = float(right.mean())

    if len(validation):
        sweep(_COARSE)
        for step in _FINER:
            sweep([best() - step, best() + step])
    c = 10.0 ** best() if accuracy else 1.0
    model, converged = _fit(vectors[refit_on], labels[refit_on], c, None)
    return model, c, converged


def _fit(vectors: Float32, labels: Int64, c: float, warm: Any) -> tuple[Any, bool]:
    """One logistic regression, begun where `warm`, one on the same rows, ended."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = warm or LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    model.set_params(C=c)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(vectors, labels)
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def linear_scores(model: Any, vectors: Float32, classes: int) -> Float32:
    """float32 (N, C): the model's logits; a class it never saw is below all others."""
    logits = model.decision_function(vectors)
    if logits.ndim == 1:  # scikit-learn gives two classes one column
        logits = np.stack([-logits, logits], axis=1)
    scores = np.full((len(vectors), classes), logits.min() - 1, np.float32)
    scores[:, model.classes_] = logits
    return scores


def few_shot_rows(
    labels: Int64, shots: Sequence[int], *, seed: int = 0, draws: int = 5
) -> tuple[dict[int, list[tuple[Int64, Int64]]], list[str]]:
    """Per number of shots s, `draws` pairs of rows (s per class, min(s, 4) more per class).

    Numbers for which a class is too small are left out, and said in the warnings returned. The draws
    of more shots contain those of fewer.
    """
    present, counts = np.unique(labels, return_counts=True)
    said, chosen = [], {}
    for count in sorted(set(shots)):
        needed = count + min(count, 4)
        if counts.min() < needed:
            said.append(
                f"{count} shots are left out: they take {needed} training pictures per class, and the "
                f"smallest class has {counts.min()}"
            )
            continue
        pairs = []
        for draw in range(draws):
            rng = np.random.default_rng((seed, draw))
            shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in present]
            fit = np.concatenate([rows[:count] for rows in shuffled])
            held_out = np.concatenate([rows[count:needed] for rows in shuffled])
            pairs.append((np.sort(fit), np.sort(held_out)))
        chosen[count] = pairs
    return chosen, said
