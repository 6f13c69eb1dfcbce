"""Drift: the tests' calibration and power by simulation, figures by hand, and what is said of them."""

from __future__ import annotations

import math
import threading
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference_metrics
from colours import ColourModel, paint

from clipkit.errors import InputError
from clipkit.metrics import compare_batches
from eval.data import open_labelled
from eval.drift import (
    add_batch_drift,
    add_model_drift,
    drift_between_batches,
    drift_between_encoders,
    linear_cka,
)
from eval.features import Stopped
from eval.session import Results, Session

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def unit(rows: Any) -> Float32:
    values = np.asarray(rows, np.float64)
    result: Float32 = (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)
    return result


def batch(n: int, random: np.random.Generator, dim: int = 8) -> Float64:
    """Unit rows about a common direction, wider in the first dimensions than in the last."""
    rows = random.standard_normal((n, dim)) * np.linspace(2, 0.2, dim) + 1
    unit_rows: Float64 = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit_rows


def rotation(dim: int, seed: int = 0) -> Float64:
    turned: Float64 = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]
    return turned


def drift_of_embeddings(a: Any, b: Any, **options: Any) -> Results:
    results = Results("drift")
    session = Session(stop=options.pop("stop", threading.Event()))
    add_model_drift(results, a, b, session=session, **options)
    return results


def drift_of_vectors(before: Any, after: Any, **options: Any) -> Results:
    results = Results("drift")
    session = Session(stop=options.pop("stop", threading.Event()))
    add_batch_drift(results, before, after, session=session, **options)
    return results


# ---- the tests of two batches


def test_statistics_are_those_of_the_metrics() -> None:
    """Computed for all shuffles at once by matrix products, row 0 is the plain definition."""
    random = np.random.default_rng(0)
    x, y = batch(40, random), batch(25, random) + 0.1
    tests = compare_batches(x, y, permutations=19).statistics
    assert tests["mean_shift"].value == pytest.approx(reference_metrics.mean_shift(x, y))
    assert tests["mmd2"].value == pytest.approx(reference_metrics.mmd2(x, y))
    assert tests["energy_distance"].value == pytest.approx(reference_metrics.energy_distance(x, y))


def test_p_values_are_those_of_all_splits() -> None:
    """Of 4 + 4 rows there are 70 splits, here listed one by one; 3,000 shuffles come within 0.03."""
    random = np.random.default_rng(1)
    x, y = batch(4, random), batch(4, random) + 0.3
    pooled = np.concatenate([x, y])
    splits = [np.isin(np.arange(8), chosen) for chosen in combinations(range(8), 4)]
    tests = compare_batches(x, y, permutations=3000).statistics
    for name in ("mean_shift", "energy_distance"):
        statistic = getattr(reference_metrics, name)
        values = np.array([statistic(pooled[s], pooled[~s]) for s in splits])
        exact = (values >= statistic(x, y) - 1e-9).mean()
        assert tests[name].p_value == pytest.approx(exact, abs=0.03)


def test_equal_batches_are_found_different_in_one_of_twenty_cases() -> None:
    """800 pairs from one distribution: 5 % +- 2 % at a level of 5 %, and 20 % +- 4 % at 20 %. The
    smallest of three p-values taken as it is would reject more often."""
    random = np.random.default_rng(2)
    p = np.array(
        [
            compare_batches(batch(30, random), batch(22, random), permutations=99, seed=i).p_value
            for i in range(800)
        ]
    )
    assert 0.03 < (p <= 0.05).mean() < 0.07
    assert 0.16 < (p <= 0.2).mean() < 0.24


@pytest.mark.parametrize(("of_detectable", "least", "most"), [(1.0, 0.8, 1.0), (0.4, 0.0, 0.6)])
def test_the_detectable_shift_is_found_nine_times_in_ten(
    of_detectable: float, least: float, most: float
) -> None:
    """100 shifts of that length, along the widest direction, where they are hardest to see; four
    tenths of it are mostly missed, so it is not a figure on the safe side either."""
    random = np.random.default_rng(3)
    found = []
    for i in range(100):
        x, y = batch(40, random), batch(40, random)
        shift = compare_batches(x, y, permutations=99, seed=i).detectable * of_detectable
        other = batch(40, random) + shift * np.linalg.eigh(np.cov(x.T))[1][:, -1]
        found.append(compare_batches(x, other, permutations=99, seed=i).p_value <= 0.05)
    assert least <= np.mean(found) <= most


def test_a_change_of_shape_alone_is_found() -> None:
    """Opposite pairs have mean 0 in both batches: only the spread's shape differs."""
    random = np.random.default_rng(4)
    wide, flat = (
        random.standard_normal((60, 6)),
        random.standard_normal((60, 6)) * [1, 1, 1, 0, 0, 0],
    )
    verdict = compare_batches(*(unit(np.concatenate([v, -v])) for v in (wide, flat)))
    assert verdict.statistics["mean_shift"].value == pytest.approx(0, abs=1e-6)
    assert verdict.statistics["mean_shift"].p_value > 0.9 and verdict.p_value < 0.02


def test_large_batches_are_sampled_and_say_so() -> None:
    random = np.random.default_rng(5)
    verdict = compare_batches(batch(300, random), batch(90, random), permutations=19, sample=100)
    assert verdict.sizes == (100, 90)


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.eye(3), np.eye(4), {}, "3 and 4 dimensions"),
        (np.eye(3), np.eye(3)[:1], {}, "batches of 3 and 1 vectors"),
        (np.eye(3), np.full((3, 3), np.nan), {}, "vector 0 is not finite"),
        (np.eye(3), np.eye(3), {"permutations": 9}, "take at least 19 for a level of 0.05"),
        (np.eye(3), np.eye(3), {"level": 0.0}, "level is 0.0"),
    ],
)
def test_refused_batches(x: Float64, y: Float64, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare_batches(x, y, **options)


# ---- two batches


class Named:
    """Pictures that have names only."""

    def __init__(self, prefix: str, count: int) -> None:
        self.prefix, self.count = prefix, count

    def __len__(self) -> int:
        return self.count

    def name(self, row: int) -> str:
        return f"{self.prefix}{row}.jpg"

    def read(self, row: int) -> bytes:
        from clipkit.errors import ImageError

        raise ImageError(f"{self.name(row)} is gone", reason="missing")


def test_no_drift_says_what_would_have_been_seen() -> None:
    random = np.random.default_rng(6)
    before, after = (batch(n, random).astype(np.float32) for n in (150, 120))
    report = drift_of_vectors(before, after, permutations=199)
    words = report.details["words"][0]
    p = report.metrics["p_value"].value
    assert p > 0.05 and words.startswith(f"No drift detected (p = {p:.3f})")
    assert "would be detected nine times in ten" in words
    assert report.metrics["novel_share"].low < 0.05 < report.metrics["novel_share"].high
    assert math.isnan(report.metrics["mean_shift"].low), "no honest interval"


def test_drift_is_found_and_what_drives_it_is_named() -> None:
    """Dimension 5 moves, and rows 7 and 70 of the new pictures point where no known one does."""
    random = np.random.default_rng(7)
    before, after = batch(150, random), batch(120, random)
    after[:, 5] += 0.4
    after[[7, 70]] = -np.eye(8)[7]
    report = drift_of_vectors(
        unit(before), unit(after), reference=Named("old", 150), pictures=Named("new", 120)
    )
    assert report.metrics["p_value"].value == pytest.approx(1 / 500)
    assert report.details["words"][0].startswith("Drift: the batches differ")
    assert report.details["tables"][1]["rows"][0][0] == 5
    items = report.details["mistakes"][0]["items"]
    assert {item["name"] for item in items[:2]} == {"new7.jpg", "new70.jpg"}
    nearest = int(np.argmax(-before[:, 7]))
    assert items[0]["got"] == f"old{nearest}.jpg"
    assert items[0]["score"] == pytest.approx(-before[nearest, 7], abs=2e-3)


def test_novel_pictures_by_hand() -> None:
    """Known: 100 directions in a plane, one degree apart. New: nine between them, and one across the
    plane, which alone is farther from all than they are from each other: a tenth is novel."""
    degrees = np.deg2rad(np.arange(100.0))
    plane = np.stack([np.cos(degrees), np.sin(degrees), 0 * degrees], axis=1)
    between = np.deg2rad(np.arange(9.0) * 10 + 0.5)
    new = np.stack([np.cos(between), np.sin(between), 0 * between], axis=1)
    report = drift_of_vectors(unit(plane), unit(np.concatenate([new, [[0, 0, 1]]])))
    assert report.metrics["novel_share"].value == pytest.approx(0.1)
    assert "10.0 % of the new pictures" in report.details["words"][1]


def test_a_batch_against_itself_has_not_drifted() -> None:
    rows = unit(batch(60, np.random.default_rng(8)))
    report = drift_of_vectors(rows, rows)
    assert report.metrics["p_value"].value > 0.9
    assert report.metrics["mean_shift"].value == pytest.approx(0, abs=1e-7)
    assert report.metrics["novel_share"].value == 0


def test_collapsed_batches_are_the_same() -> None:
    same = np.repeat(unit([[3.0, 4.0]]), 30, axis=0)
    assert drift_of_vectors(same, same).metrics["p_value"].value == 1


def test_rows_that_are_not_unit_vectors_are_refused() -> None:
    with pytest.raises(InputError, match="vector after 2 has length 2"):
        drift_of_vectors(np.eye(3, dtype=np.float32), np.diag([1, 1, 2]).astype(np.float32))


# ---- two models


def test_a_rotated_space_is_the_same() -> None:
    """Neighbours and CKA stay, though the vectors' own cosine says nothing is alike."""
    a = unit(np.random.default_rng(9).standard_normal((200, 16)))
    report = drift_of_embeddings(a, unit(a @ rotation(16)))
    # half-precision codes may swap a last neighbour
    assert report.metrics["neighbour_overlap@10"].value > 0.99
    assert report.metrics["linear_cka"].value == pytest.approx(1, abs=1e-5)
    assert abs(report.metrics["cosine"].value) < 0.3
    assert report.details["words"][0] == "The two models find nearly the same pictures."


def test_unrelated_spaces_are_at_chance() -> None:
    """Of 10 neighbours among 79 others 10 x 10 / 79 = 1.27 are in common by chance. CKA without its
    bias is about 0; the plain one is about 0.5 here, with hardly more rows than dimensions."""
    random = np.random.default_rng(10)
    a, b = (unit(random.standard_normal((80, 64))) for _ in range(2))
    report = drift_of_embeddings(a, b)
    overlap = report.metrics["neighbour_overlap@10"]
    assert overlap.low < 10 / 79 < overlap.high
    assert abs(report.metrics["linear_cka"].value) < 0.05
    assert report.details["words"][0].startswith("The two models find different pictures")
    assert "chance is 1.27" in report.details["words"][1]


def test_two_collapsed_models_do_not_agree() -> None:
    """All neighbours tie: were ties in the order of the rows, the first ones would be everyone's
    neighbours in both models, and the overlap 1."""
    a, b = (np.repeat(unit([row]), 60, axis=0) for row in ([1.0, 2], [3.0, -1, 1]))
    report = drift_of_embeddings(a, b, ks=(10,))
    assert report.metrics["neighbour_overlap@10"].value == pytest.approx(10 / 59, abs=0.08)
    assert math.isnan(report.metrics["linear_cka"].value)
    assert "cosine" not in report.metrics, "2 and 3 dimensions"
    assert len(report.warnings) == 2


def test_changed_pictures_are_shown_first() -> None:
    """Two clusters; picture 3 moves from the first to the second: all its neighbours change, of the
    others few."""
    random = np.random.default_rng(11)
    centres = np.repeat(np.eye(12)[:2] * 3, 30, axis=0)
    a = unit(centres + 0.3 * random.standard_normal((60, 12)))
    b = a.copy()
    b[3] = unit(3 * np.eye(12)[1] + 0.3 * random.standard_normal(12))
    report = drift_of_embeddings(a, b, pictures=Named("p", 60))
    item = report.details["mistakes"][0]["items"][0]
    assert (item["name"], item["got"]) == ("p3.jpg", "0 of 10")
    for name, values in report.samples.items():
        assert values.shape == (60,) and values.mean() == pytest.approx(report.metrics[name].value)


def test_cka_is_the_unbiased_estimators() -> None:
    """Song et al. 2012, equation 4, on Gram matrices with an empty diagonal, written out."""
    random = np.random.default_rng(12)
    x, y = random.standard_normal((12, 5)), random.standard_normal((12, 3))
    y[:, 0] += x[:, 0]
    n = 12

    def hsic(a: Float64, b: Float64) -> float:
        k, low = ((v - v.mean(axis=0)) @ (v - v.mean(axis=0)).T for v in (a, b))
        np.fill_diagonal(k, 0)
        np.fill_diagonal(low, 0)
        inner = np.trace(k @ low) + k.sum() * low.sum() / ((n - 1) * (n - 2))
        return float(inner - 2 / (n - 2) * (k @ low).sum()) / (n * (n - 3))

    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert linear_cka(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (np.eye(4), np.eye(5), {}, r"shapes \(4, 4\) and \(5, 5\); the same pictures"),
        (np.eye(3), np.eye(3), {}, "at least 4"),
        (np.eye(4), 2 * np.eye(4), {}, "vector 0 has length 2"),
        (np.eye(4), np.eye(4), {"ks": ()}, r"K is \[\]"),
    ],
)
def test_refused_embeddings(a: Float64, b: Float64, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        drift_of_embeddings(a.astype(np.float32), b.astype(np.float32), **options)


def test_stopping() -> None:
    stop = threading.Event()
    stop.set()
    rows = unit(batch(30, np.random.default_rng(0)))
    for run in (drift_of_embeddings, drift_of_vectors):
        with pytest.raises(Stopped):
            run(rows, rows, stop=stop)


# ---- with models


class Colours(ColourModel):
    precision = "float32"
    logit_scale = 100.0

    def towers(self) -> Any:
        return self


class Turned(Colours):
    """The same, its space rotated: another model by its id."""

    encoder_id = "7042" * 4
    spec = "turned"

    def encode_images(self, images: Any) -> Any:
        turned: Float32 = (super().encode_images(images) @ rotation(3)).astype(np.float32)
        return turned


def folder(path: Path, colours: str) -> str:
    for number, colour in enumerate(colours.split()):
        paint(path / "any" / f"{number}-{colour}.png", colour, number=number)
    return str(path)


def test_between_two_models(tmp_path: Path) -> None:
    data = folder(tmp_path, "red red green green blue blue yellow yellow")
    (tmp_path / "any" / "0-broken.png").write_bytes(b"no picture")
    report = drift_between_encoders(Colours(), Turned(), open_labelled(data), ks=(1, 3))
    assert report.model == "colours → turned" and report.n == {"pictures": 8}
    assert report.metrics["neighbour_overlap@1"].value == 1
    assert report.metrics["linear_cka"].value == pytest.approx(1, abs=1e-4)
    assert "must be rebuilt" in report.details["words"][-1]
    assert sum("left out" in warning for warning in report.warnings) == 1, (
        "said once, not per model"
    )
    same = drift_between_encoders(Colours(), Colours(), open_labelled(data), ks=(1,))
    assert "must be rebuilt" not in " ".join(same.details["words"])


def test_between_two_batches(tmp_path: Path) -> None:
    before = open_labelled(folder(tmp_path / "a", "red green " * 12))
    after = open_labelled(folder(tmp_path / "b", "red green " * 4 + "blue " * 16))
    report = drift_between_batches(Colours(), before, after)
    assert report.metrics["p_value"].value < 0.05
    assert report.metrics["novel_share"].value == pytest.approx(16 / 24)
    assert report.dataset == f"{tmp_path / 'a'} → {tmp_path / 'b'}" and report.split is None
    items = report.details["mistakes"][0]["items"]
    assert all("blue" in item["name"] for item in items)
    assert items[0]["thumbnail"].startswith("data:image/jpeg;base64,")
    assert report.fingerprint != drift_between_batches(Colours(), after, before).fingerprint
