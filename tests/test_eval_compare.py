"""Models side by side: what is tested, what is marked, and what is never compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colours import ColourModel, paint
from numbered import Numbered, Told, labelled, one_hot, oracle

from clipkit.errors import InputError
from clipkit.metrics import Interval, mean_interval
from clipkit.sources import PictureFile
from eval.compare import compare, compare_reports
from eval.data import Captioned, Labelled, SourcePictures
from eval.features import FeatureCache
from eval.prompts import Templates
from eval.reports import EvalReport, load, save
from eval.reports.comparison import Comparison
from eval.session import Session

N = 200


def hits(rate: float, seed: int = 0, n: int = N) -> np.ndarray:
    """n hits and misses at about this rate. With one seed, a higher rate hits wherever a lower did."""
    return (np.random.default_rng(seed).random(n) < rate).astype(np.float64)


def report(
    samples: Mapping[str, np.ndarray], model: str = "a", **changes: Any
) -> EvalReport:  # ranks are no fractions
    metrics = {
        name: mean_interval(values, fraction="rank" not in name) for name, values in samples.items()
    }
    values: dict[str, Any] = {
        "task": "retrieval",
        "dataset": "photos",
        "split": None,
        "model": model,
        "encoder_id": f"{model:0<16}",
        "n": {"pictures": N},
        "metrics": metrics,
        "settings": {"ks": [1]},
        "fingerprint": "f" * 16,
        "samples": samples,
    }
    return EvalReport(**{**values, **changes})


def rows(comparison: Comparison) -> dict[str, Any]:
    return {row.metric: row for row in comparison.sections[0].rows}


# ---- tests and marks


def test_a_real_difference_is_found_and_marked() -> None:
    """0.7 hits wherever 0.5 does, and some 40 pictures more: no sign pattern comes near."""
    made = compare_reports([[report({"t/R@1": hits(0.5)})], [report({"t/R@1": hits(0.7)}, "b")]])
    row = rows(made)["t/R@1"]
    gain = hits(0.7).mean() - hits(0.5).mean()
    assert row.against_first(1).paired.difference == pytest.approx(gain)
    assert row.against_first(1).significant and row.best == 1
    assert made.sentences == (
        f"Retrieval on photos, t R@1: b is better than a (+{100 * gain:.1f}, p < 0.001).",
    )


def test_what_else_moved_is_told_with_its_direction() -> None:
    """R@1 is noise; R@10 rises, and the mean rank falls, which is better: neither may be missed."""
    ranks = np.random.default_rng(0).integers(5, 50, N).astype(float)
    first = report({"R@1": hits(0.5, 1), "R@10": hits(0.5), "mean_rank": ranks})
    second = report({"R@1": hits(0.5, 2), "R@10": hits(0.7), "mean_rank": ranks - 2}, "b")
    made = compare_reports([[first], [second]])
    gain = 100 * (hits(0.7).mean() - hits(0.5).mean())
    assert "b is not significantly different from a" in made.sentences[0]
    assert made.sentences[0].endswith("; of 2 other figures, 2 better by more than chance.")
    assert made.sections[0].changes(1) == ([f"R@10 +{gain:.1f}", "mean_rank −2"], [])
    other = compare_reports([[second], [first]], names=("a", "b"))
    assert other.sentences[0].endswith("; of 2 other figures, 2 worse by more than chance.")
    assert other.sections[0].changes(1) == ([], [f"R@10 −{gain:.1f}", "mean_rank +2"])


def test_a_difference_by_chance_is_not_marked() -> None:
    """Independent models of one rate: the greater figure is no better model."""
    made = compare_reports([[report({"R@1": hits(0.5, 1)})], [report({"R@1": hits(0.5, 2)}, "b")]])
    row = rows(made)["R@1"]
    assert not row.against_first(1).significant and row.best is None
    assert "not significantly different from a" in made.sentences[0]
    assert " *" not in made.to_markdown() and "★" not in made.to_markdown()


def test_smaller_ranks_are_better_and_temperatures_neither() -> None:
    ranks = np.random.default_rng(0).integers(5, 50, N).astype(float)
    first = report({"mean_rank": ranks, "temperature": ranks})
    second = report({"mean_rank": ranks / 2, "temperature": ranks / 2}, "b")
    made = rows(compare_reports([[first], [second]]))
    assert made["mean_rank"].best == 1
    assert made["temperature"].best is None and made["temperature"].against_first(1).significant


def test_the_best_of_three_beats_both() -> None:
    """c over b by chance only: both beat a, neither is the best."""
    a, b, c = hits(0.2), hits(0.5, 3), hits(0.52, 4)
    made = compare_reports([[report({"R@1": v}, m)] for m, v in zip("abc", (a, b, c), strict=True)])
    row = rows(made)["R@1"]
    assert len(row.pairs) == 3 and row.best is None
    assert row.against_first(1).significant and row.against_first(2).significant
    d = hits(0.9, 3)
    made = compare_reports([[report({"R@1": v}, m)] for m, v in zip("abd", (a, b, d), strict=True)])
    assert rows(made)["R@1"].best == 2


def test_many_tests_are_corrected_together() -> None:
    """20 metrics without any difference: uncorrected, one of them would be expected below 0.05."""
    first = {f"m{i}/R@1": hits(0.5, 100 + i) for i in range(20)}
    second = {f"m{i}/R@1": hits(0.5, 200 + i) for i in range(20)}
    made = compare_reports([[report(first)], [report(second, "b")]])
    pairs = [row.against_first(1) for row in made.sections[0].rows]
    assert min(pair.paired.p_value for pair in pairs) < 0.1
    assert not any(pair.significant for pair in pairs)
    assert made.sections[0].tested == 20


# ---- what may not be compared


def test_other_data_is_never_tested_against() -> None:
    """The same name but other pictures: figures side by side, a warning, no p-value."""
    second = report({"R@1": hits(0.9)}, "b", fingerprint="0" * 16)
    made = compare_reports([[report({"R@1": hits(0.1)})], [second]])
    section = made.sections[0]
    assert section.tested == 0 and section.rows[0].best is None
    assert section.warnings == (
        "b was measured on different data than a (fingerprint 000000000000, not ffffffffffff): "
        "their difference was not tested",
    )
    assert "No difference was tested" in made.to_markdown()


@pytest.mark.parametrize(
    "values", [hits(0.9, n=N - 1), np.full(N, np.nan), np.empty(0)], ids=["short", "nan", "none"]
)
def test_samples_that_do_not_match_are_not_tested(values: np.ndarray) -> None:
    metrics = {"R@1": Interval(0.9, 0.8, 1.0, N)}
    second = replace(report({}, "b", metrics=metrics), samples={"R@1": values})
    made = compare_reports([[report({"R@1": hits(0.5)})], [second]])
    assert made.sections[0].tested == 0


def test_settings_that_change_the_meaning_are_told() -> None:
    first = report({"R@1": hits(0.5)}, settings={"templates": "simple", "precision": "float32"})
    second = report({"R@1": hits(0.5)}, "b", settings={"templates": "plain", "precision": "bf16"})
    made = compare_reports([[first], [second]])
    assert made.sections[0].warnings == ("templates differs: simple for a, plain for b",)


def test_a_model_may_lack_a_data_set_or_a_metric() -> None:
    other = report({"acc@1": hits(0.4)}, dataset="cats", task="zeroshot")
    second = report({"R@5": hits(0.6)}, "b")
    made = compare_reports([[report({"R@1": hits(0.5)}), other], [second]])
    assert [section.title for section in made.sections] == [
        "Retrieval on photos",
        "Zero-shot classification on cats",
    ]
    assert [row.intervals[1] is None for row in made.sections[0].rows] == [True, False]
    assert made.sections[1].reports[1] is None
    made.lines()
    assert "–" in made.to_markdown()


def test_names_tell_models_apart() -> None:
    one = report({"R@1": hits(0.5)})
    two = report({"R@1": hits(0.5)}, encoder_id="b" * 16)
    assert compare_reports([[one], [two]]).names == ("a a0000000", "a bbbbbbbb")
    assert compare_reports([[one], [one]]).names == ("a a0000000 #1", "a a0000000 #2")
    assert compare_reports([[one], [two]], names=["before", "after"]).title == (
        "before and after compared"
    )
    with pytest.raises(InputError, match="give each its own name"):
        compare_reports([[one], [two]], names=["x", "x"])
    for models in ([[one]], [], [[one], []]):
        with pytest.raises(InputError, match="at least two models"):
            compare_reports(models)


# ---- what is shown


def curve(name: str, y: float) -> dict[str, Any]:
    series = [{"name": name, "x": [1, 5], "y": [y, y]}]
    return {"title": "Recall by K", "x_label": "K", "y_label": "recall", "series": series}


def test_curves_of_one_title_lie_over_each_other() -> None:
    first = report({"R@1": hits(0.5)}, details={"curves": [curve("x", 0.1)]})
    second = report({"R@1": hits(0.5)}, "b", details={"curves": [curve("x", 0.2)]})
    (shared,) = compare_reports([[first], [second]]).sections[0].curves
    assert [series["name"] for series in shared["series"]] == ["a", "b"]
    assert first.details["curves"][0]["series"][0]["name"] == "x"  # left as it was


def test_pictures_that_changed_most_are_shown() -> None:
    before, after = np.full(N, 0.5), np.full(N, 0.5)
    after[[7, 9]], after[3] = (1.0, 0.8), 0.1
    made = compare_reports(
        [[report({"R@1": before, "MRR": before})], [report({"R@1": before, "MRR": after}, "b")]],
        examples={"f" * 16: labelled([0] * N, 1)},
    )
    better, worse = made.sections[0].changed
    assert [item["name"] for item in better["items"]] == ["7.png", "9.png"]
    assert [(item["name"], item["got"]) for item in worse["items"]] == [
        ("3.png", "50.0 % → 10.0 %")
    ]


def test_a_card_shows_the_pictures_own_mean() -> None:
    """Picture 0 has five captions, the others one each. The first model ranks all pictures in one
    tie, the second the right one first: MRR goes from (1 + 1/2 + 1/3) / 3 to 1. Picture 0 weighs
    5 x 3 / 7 = 2.14 in the sample, whose mean over pictures is the mean over captions."""
    owner = np.array([0, 0, 0, 0, 0, 1, 2])
    texts = tuple(f"kind{i} {letter}" for i, letter in zip(owner, "abcdefg", strict=True))
    data = Captioned("uneven", None, Numbered([(i, i) for i in range(3)]), texts, owner, ((),) * 3)
    tied = Told(lambda *_: one_hot(0, 3), lambda _: one_hot(0, 3), name="tied")
    made = compare([tied, oracle(3)], [data], ks=(1,))
    sample = made.sections[0].reports[1].samples["text_to_image/MRR"]
    assert sample == pytest.approx([15 / 7, 3 / 7, 3 / 7]) and sample.mean() == pytest.approx(1)
    (better,) = made.sections[0].changed[:1]
    assert {item["got"] for item in better["items"]} == {"61.1 % → 100.0 %"}
    assert len(better["items"]) == 3


def test_a_comparison_is_four_files(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    second = report({"R@1": hits(0.7)}, evil, details={"curves": [curve(evil, 0.2)]})
    first = report({"R@1": hits(0.5)}, details={"curves": [curve("x", 0.1)]})
    made = compare_reports([[first], [second]], command="clipkit eval compare a b")
    save(made, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["figures.csv", "report.html", "report.json", "report.md"]
    figures = (tmp_path / "figures.csv").read_text().splitlines()
    assert [line.split(",")[3] for line in figures[1:]] == ["a", evil]
    page = (tmp_path / "report.html").read_text()
    assert evil not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert 'class="best"' in page and "p &lt; 0.001" in page
    told = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    (row,) = told["sections"][0]["rows"]
    assert row["best"] == 1 and row["tests"][0]["p_value_corrected"] < 0.001
    with pytest.raises(InputError, match="not a report of one evaluation"):
        load(tmp_path)


def test_saved_reports_compare_like_new_ones(tmp_path: Path) -> None:
    made = [report({"R@1": hits(0.5)}), report({"R@1": hits(0.7)}, "b")]
    for number, one in enumerate(made):
        save(one, tmp_path / str(number))
    again = [[load(tmp_path / str(number))] for number in (0, 1)]
    new = compare_reports([[one] for one in made]).lines()
    assert compare_reports(again).lines() == new
    assert "*" in new[4]


# ---- from models and data


class Model(ColourModel):
    """Knows colours; a blind one takes every picture for red."""

    precision = "float32"
    logit_scale = 10.0
    encoded = 0

    def __init__(self, spec: str, *, blind: bool = False) -> None:
        self.spec = spec
        self.blind = blind
        self.encoder_id = ("b" if blind else "c") * 16

    def encode_images(self, images: Any) -> np.ndarray:
        self.encoded += len(images)
        if self.blind:
            return self.encode_texts(["red"] * len(images))
        return super().encode_images(images)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Captioned, Labelled]:
    """Twelve pictures in three colours, each with its colour as caption and as class."""
    colours = ("red", "green", "blue")
    names = [f"{colour}{number}.png" for number in range(4) for colour in colours]
    for number, name in enumerate(names):
        paint(tmp_path / name, colours[number % 3], number=number)
    pictures = SourcePictures(tuple(names), tuple(PictureFile(tmp_path / n) for n in names))
    owner = np.arange(12)
    texts = tuple(colours[row % 3] for row in range(12))
    captioned = Captioned("captions", None, pictures, texts, owner, ((),) * 12)
    return captioned, Labelled("classes", None, pictures, colours, owner % 3, None)


def test_models_are_measured_and_compared(data: tuple[Captioned, Labelled], tmp_path: Path) -> None:
    """The seeing model names all twelve, the blind one scores a third: Fisher's test over the 8
    that differ has p = 2 / 2^8. The second run encodes no picture."""
    models = [Model("blind", blind=True), Model("seeing")]
    cache = FeatureCache(tmp_path / "cache")
    options: dict[str, Any] = {
        "ks": (1,),
        "session": Session(cache),
        "templates": Templates("plain", ("{}",)),
    }
    made = compare(models, data, **options)
    assert [section.title for section in made.sections] == [
        "Retrieval on captions",
        "Zero-shot classification on classes",
    ]
    accuracy = next(row for row in made.sections[1].rows if row.metric == "acc@1")
    assert accuracy.intervals[1].value == 1.0
    assert accuracy.intervals[0].value == pytest.approx(1 / 3, abs=1e-6)
    assert accuracy.against_first(1).paired.p_value == pytest.approx(2 / 2**8)
    shown = made.sections[1].changed[0]
    assert len(shown["items"]) == 8
    assert all(item["expected"] in ("green", "blue") for item in shown["items"])
    assert all(item["thumbnail"].startswith("data:image/jpeg") for item in shown["items"])
    before = [model.encoded for model in models]
    assert compare(models, data, **options).lines() == made.lines()
    assert [model.encoded for model in models] == before
