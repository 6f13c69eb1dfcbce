"""Corruptions as ImageNet-C defines them, and what an evaluation makes of them."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numbered import Numbered, Told, captioned, collapsed, labelled, number_in, one_hot, oracle
from PIL import Image

from clipkit.errors import InputError
from clipkit.metrics import Interval
from clipkit.wording import percent
from eval.corruptions import CORRUPTIONS, SIDE, corruption
from eval.data import Labelled
from eval.features import FeatureCache
from eval.prompts import Templates
from eval.reports.html import render_report
from eval.reports.wording import direction, interval_text, value_text
from eval.robustness import evaluate_robustness
from eval.session import Session

pytestmark = pytest.mark.end_to_end

PLAIN = Templates("plain", ("a photo of {}",))
Picture = Callable[..., Image.Image]


def corrupted(picture: Image.Image, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """float (H, W, 3) in 0..1."""
    changed = corruption(name, severity).apply(picture, np.random.default_rng(seed))
    assert changed.mode == "RGB"
    return np.asarray(changed, np.float64) / 255


def grey(level: int = 128, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    return Image.new("RGB", size, (level,) * 3)


# ---- the corruptions


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_worsens_with_severity(name: str) -> None:
    """Ever further from a picture of coloured squares (saturate, by definition, goes both ways)."""
    squares = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    picture = Image.fromarray(squares).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    clean = np.asarray(picture, np.float64) / 255
    away = [np.abs(corrupted(picture, name, s) - clean).mean() for s in (1, 2, 3, 4, 5)]
    assert min(away) > 0.001
    if name != "saturate":
        assert away == sorted(away)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (900, 300), (1, 4000)])
def test_pictures_are_corrupted_at_one_size(name: str, size: tuple[int, int]) -> None:
    """Shorter side 224, so that severities mean the same; a strip is cut to 1:16, not blown up."""
    changed = corruption(name, 3).apply(grey(size=size), np.random.default_rng(0))
    assert min(changed.size) == SIDE
    assert max(changed.size) <= 16 * SIDE


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_seed_gives_the_same_picture(name: str, noise_picture: Picture) -> None:
    picture = noise_picture(SIDE, SIDE, 2)
    assert np.array_equal(corrupted(picture, name, 3, 5), corrupted(picture, name, 3, 5))
    if name.endswith("_noise") or name == "motion_blur":
        assert not np.array_equal(corrupted(picture, name, 3, 5), corrupted(picture, name, 3, 6))


def test_noise_has_its_strength() -> None:
    """On grey 0.5: Gaussian sigma 0.08; shot noise of 60 photons sqrt(0.5 / 60) = 0.0913; impulses
    hit 9 % of the values at severity 3; speckle 0.15 x 0.5."""
    assert corrupted(grey(), "gaussian_noise", 1).std() == pytest.approx(0.08, rel=0.02)
    assert corrupted(grey(), "shot_noise", 1).std() == pytest.approx(0.0913, rel=0.03)
    assert corrupted(grey(), "speckle_noise", 1).std() == pytest.approx(0.075, rel=0.03)
    impulses = corrupted(grey(), "impulse_noise", 3)
    assert (impulses != impulses[0, 0, 0]).mean() < 0.2
    assert np.isin(impulses, (0.0, 1.0)).mean() == pytest.approx(0.09, rel=0.05)
    assert (impulses == 1).mean() == pytest.approx(0.045, rel=0.1)


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n.endswith("_blur")])
def test_blurs_keep_the_light(name: str) -> None:
    """A blur is a weighted mean: grey stays grey up to the border, edges soften."""
    assert np.abs(corrupted(grey(100), name, 5) - 100 / 255).max() < 1.5 / 255
    edge = grey(0)
    edge.paste((255,) * 3, (SIDE * 3 // 4, 0, SIDE, SIDE))
    blurred = corrupted(edge, name, 3)
    assert blurred.mean() == pytest.approx(0.25, abs=0.05)
    assert ((blurred > 0.1) & (blurred < 0.9)).any()


def test_defocus_is_a_disk() -> None:
    """One white pixel becomes a disk of radius 3: 29 pixels of the grid, each 1/29."""
    point = grey(0)
    point.putpixel((100, 80), (255,) * 3)
    spread = corrupted(point, "defocus_blur", 1)[:, :, 0] * 255
    ys, xs = np.nonzero(spread)
    assert len(ys) == 29
    assert np.hypot(ys - 80, xs - 100).max() == pytest.approx(3)
    assert set(spread[ys, xs]) == {8.0}  # 255 / 29 = 8.8, truncated


def test_contrast_and_brightness() -> None:
    half = grey(50)
    half.paste((150,) * 3, (0, 0, SIDE, SIDE // 2))
    # severity 3 keeps 0.2 of the distance from the mean 100: 90 and 110
    assert set(np.unique(np.round(corrupted(half, "contrast", 3) * 255))) <= {89, 90, 109, 110}
    # severity 2 adds 0.2 of 255 = 51 to the value
    assert set(np.unique(np.round(corrupted(half, "brightness", 2) * 255))) <= {100, 101, 200, 201}
    assert corrupted(grey(0), "brightness", 5).mean() == pytest.approx(0.5, abs=1 / 255)


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", [1, 3, 4, 5])
def test_colours_are_changed_as_in_hsv(name: str, severity: int) -> None:
    """The closed forms against the standard library's conversions, colour by colour."""
    rng = np.random.default_rng(severity)
    parameter = CORRUPTIONS[name][1][severity - 1]
    for colour in [
        (0, 0, 0),
        (255, 255, 255),
        (90, 90, 90),
        *rng.integers(0, 256, (12, 3)).tolist(),
    ]:
        h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
        if name == "brightness":
            v = min(1, v + parameter)
        else:
            s = min(1, max(0, s * parameter[0] + parameter[1]))
        picture = Image.new("RGB", (SIDE, SIDE), tuple(colour))
        got = corrupted(picture, name, severity)[3, 3]
        np.testing.assert_allclose(got, colorsys.hsv_to_rgb(h, s, v), atol=1.01 / 255)


def test_pixelate_makes_squares() -> None:
    """0.25 of 224 are 56 squares of 4 pixels."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    squares = corrupted(picture, "pixelate", 5).reshape(56, 4, 56, 4, 3)
    assert (np.ptp(squares, axis=(1, 3)) == 0).all()


def test_unknown_corruptions_and_severities() -> None:
    with pytest.raises(InputError, match="'gausian_noise'; did you mean 'gaussian_noise'"):
        corruption("gausian_noise", 1)
    for severity in (0, 6):
        with pytest.raises(InputError, match="must be a whole number from 1 to 5"):
            corruption("pixelate", severity)
    names = {corruption(n, s).name for n in CORRUPTIONS for s in (1, 2, 3, 4, 5)}
    assert len(names) == 5 * len(CORRUPTIONS), "features are kept by the name"


# ---- the evaluation


def reds(labels: list[int], classes: int = 25) -> Labelled:
    """Class c is the colour (10 c, 0, 0), which brightness 5 makes 127.5 brighter: class c + 13."""
    return labelled(labels, classes, pictures=Numbered([(c, 0) for c in labels]))


def test_what_brightness_takes_away() -> None:
    """The model knows the colour it sees, so no brightened picture is right; JPEG leaves most plain
    colours alone."""
    report = evaluate_robustness(
        oracle(25),
        reds(list(range(10)) * 4),
        corruptions=("brightness", "jpeg_compression"),
        severities=(1, 5),
        templates=PLAIN,
    )
    value = {name: interval.value for name, interval in report.metrics.items()}
    assert value["clean/acc@1"] == 1
    assert value["brightness@5/acc@1"] == 0
    assert value["jpeg_compression@1/acc@1"] > 0.7
    corrupted_mean = np.mean(
        [value[f"{n}@{s}/acc@1"] for n in report.settings["corruptions"] for s in (1, 5)]
    )
    assert value["corrupted/acc@1"] == pytest.approx(corrupted_mean)
    assert value["relative/acc@1"] == pytest.approx(corrupted_mean)
    assert report.samples["brightness@5/acc@1"].shape == (40,)
    (curve,) = report.details["curves"]
    assert [s["name"] for s in curve["series"]] == ["mean of all corruptions"]
    assert curve["series"][0]["x"] == [0, 1, 5]
    at_5 = value["jpeg_compression@5/acc@1"] / 2  # none is right under brightness
    assert curve["series"][0]["y"][0] == 1 and curve["series"][0]["y"][-1] == pytest.approx(at_5)
    assert "Worst is brightness" in report.details["words"][0]


def test_what_answers_comes_first() -> None:
    """The terminal shows the three headline figures of 18; the page their cards, then the matrix with
    its means, then the rest folded."""
    report = evaluate_robustness(
        oracle(25),
        reds(list(range(10)) * 2),
        corruptions=("brightness", "contrast", "jpeg_compression"),
        severities=(1, 2, 3, 4, 5),
        templates=PLAIN,
    )
    assert list(report.headline) == ["clean/acc@1", "corrupted/acc@1", "relative/acc@1"]
    lines = report.lines()
    assert (
        len(report.metrics) == 18 and len(lines) == 8
    )  # title, head, 3 figures, sentence, warning, this:
    assert lines[-1] == "15 more figures in the report"
    page = render_report(report)
    places = [
        page.index(text)
        for text in (
            'class="cards',
            "acc@1 under corruption",
            'class="heat-',
            "<details>",
            "brightness@1",
        )
    ]
    assert places == sorted(places)
    (table,) = report.details["tables"]
    assert table["columns"] == ["corruption", *(f"severity {s}" for s in range(1, 6)), "mean"]
    assert [row[0] for row in table["rows"]] == [
        "brightness",
        "contrast",
        "jpeg compression",
        "mean",
    ]
    values = {name: interval.value for name, interval in report.metrics.items()}
    assert table["rows"][-1][-1] == percent(values["corrupted/acc@1"])
    assert table["rows"][1][-1] == percent(
        np.mean([values[f"contrast@{s}/acc@1"] for s in range(1, 6)])
    )
    assert table["heat"][0][4] == values["brightness@5/acc@1"] / values["clean/acc@1"]


def test_a_ratio_is_no_share() -> None:
    """Corruptions may help: 101.7 % of pictures do not exist, 1.02 times the clean figure does."""
    ratio = Interval(0.95, 0.888, 1.017, 60)
    assert value_text("relative/acc@1", ratio.value) == "0.950"
    assert interval_text("relative/acc@1", ratio) == "0.888 to 1.017"
    assert direction("relative/acc@1") == 1


def test_relative_is_to_the_clean_figure() -> None:
    """The model calls one colour, class 1's, class 1, and all others class 0. Clean, it is right on
    classes 0 and 1: 20 of 40. Brightened, class 1 looks otherwise: 10 of 40. Half is left."""
    model = Told(
        lambda c, _: one_hot(1 if c == 1 else 0, 3), lambda text: one_hot(number_in(text), 3)
    )
    data = reds([0] * 10 + [1] * 10 + [2] * 20, 3)
    report = evaluate_robustness(
        model, data, corruptions=("brightness",), severities=(5,), templates=PLAIN
    )
    assert report.metrics["clean/acc@1"].value == pytest.approx(0.5)
    assert report.metrics["corrupted/acc@1"].value == pytest.approx(0.25)
    relative = report.metrics["relative/acc@1"]
    assert relative.value == pytest.approx(0.5)
    assert relative.low < 0.5 < relative.high


def test_recall_of_captions() -> None:
    report = evaluate_robustness(
        oracle(25), captioned(12), corruptions=("brightness",), severities=(5,)
    )
    for way in ("text_to_image", "image_to_text"):
        assert report.metrics[f"clean/{way}/R@1"].value == 1
        assert report.metrics[f"clean/{way}/R@1"].n == 12
        assert report.metrics[f"brightness@5/{way}/R@1"].value < 0.2
    assert len(report.details["curves"]) == 2


def test_recall_with_unequal_numbers_of_captions() -> None:
    """Pictures with 1 and 3 captions; only the first is found by its caption. The mean over captions
    is 1/4, not the mean over pictures 1/2, and the samples' mean is the same."""
    data = replace(
        captioned(2, 1),
        captions=("kind0", "kind5", "kind5", "kind5"),
        owner=np.array([0, 1, 1, 1]),
    )
    model = Told(
        lambda c, _: one_hot(c, 6),
        lambda text: one_hot(0, 6) if "5" not in text else one_hot(0, 6) - one_hot(1, 6),
    )
    report = evaluate_robustness(model, data, corruptions=(), severities=())
    assert report.metrics["clean/text_to_image/R@1"].value == pytest.approx(0.25)
    assert report.samples["clean/text_to_image/R@1"].tolist() == [0.5, 0]


def test_a_collapsed_model_scores_chance_everywhere() -> None:
    data = labelled(list(range(5)) * 4, 5)
    report = evaluate_robustness(
        collapsed(5), data, corruptions=("contrast",), severities=(3,), templates=PLAIN
    )
    assert report.metrics["clean/acc@1"].value == pytest.approx(0.2)
    assert report.metrics["contrast@3/acc@1"].value == pytest.approx(0.2)
    assert report.metrics["relative/acc@1"].value == pytest.approx(1)


def test_domains() -> None:
    """Right on every photo, on no sketch (seen as the next class)."""
    labels = list(range(4)) * 6
    domains = tuple("photo" if i < 12 else "sketch" for i in range(24))
    model = Told(
        lambda c, i: one_hot(c if i < 12 else (c + 1) % 4, 4),
        lambda text: one_hot(number_in(text), 4),
    )
    data = labelled(labels, 4, domains=domains)
    report = evaluate_robustness(model, data, corruptions=(), templates=PLAIN)
    assert report.metrics["domain photo/acc@1"].value == 1
    assert report.metrics["domain photo/acc@1"].n == 12
    assert report.metrics["domain sketch/acc@1"].value == 0
    assert set(report.metrics) == {"clean/acc@1", "domain photo/acc@1", "domain sketch/acc@1"}
    assert report.details["tables"][0]["rows"] == [
        ["photo", 12, "100.0 %"],
        ["sketch", 12, "0.0 %"],
    ]
    assert (
        "lowest on “sketch” (0.0 %) and highest on “photo” (100.0 %)" in report.details["words"][0]
    )


def test_corrupted_features_are_kept_apart(tmp_path: Path) -> None:
    """A cache that ignores the corruption would give the clean figure for all of them."""
    data = reds(list(range(10)) * 2)
    options = {"corruptions": ("brightness",), "severities": (5,), "templates": PLAIN}
    first = evaluate_robustness(
        oracle(25), data, session=Session(FeatureCache(tmp_path)), **options
    )
    again = oracle(25)
    second = evaluate_robustness(again, data, session=Session(FeatureCache(tmp_path)), **options)
    assert again.loads == 0
    assert first.metrics["brightness@5/acc@1"].value == 0
    assert dict(second.metrics) == dict(first.metrics)


def test_pictures_that_cannot_be_read_are_left_out_of_all_runs() -> None:
    pictures = Numbered([(0, 0), None, (1, 2), (1, 3)])
    data = labelled([0, 1, 1, 1], 2, pictures=pictures)
    report = evaluate_robustness(
        oracle(25),
        replace(data, classes=("kind0", "kind1")),
        corruptions=("contrast",),
        severities=(1,),
    )
    assert report.n == {"pictures": 3, "skipped": 1}
    assert report.metrics["contrast@1/acc@1"].n == 3


def test_what_cannot_be_measured() -> None:
    several = labelled([0, 1], 2, labels=None, targets=np.eye(2, dtype=bool))
    with pytest.raises(InputError, match="several labels per picture"):
        evaluate_robustness(oracle(2), several)
    with pytest.raises(InputError, match="has no captions"):
        empty = replace(captioned(2), captions=(), owner=np.array([], np.int64))
        evaluate_robustness(oracle(2), empty)
    with pytest.raises(InputError, match="unknown corruption 'fog'"):
        evaluate_robustness(oracle(2), labelled([0, 1], 2), corruptions=("fog",))
    nan = Told(lambda c, _: [np.nan, 1] if c > 9 else [1, 0], lambda _: [1, 0])
    with pytest.raises(InputError, match="no finite vector"):
        evaluate_robustness(
            nan, labelled([0, 1], 2), corruptions=("brightness",), severities=(5,), templates=PLAIN
        )
