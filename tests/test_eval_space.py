"""eval.space: spaces whose figures are known by hand, and what is said of them."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from colours import ColourModel, paint

from clipkit import metrics
from clipkit.errors import InputError
from eval.data import open_captioned, open_labelled
from eval.features import FeatureCache, Stopped
from eval.session import Session
from eval.space import evaluate_space, nearest_known, neighbours, space_of_vectors

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


def unit(rows: Any) -> Float32:
    values = np.asarray(rows, np.float64)
    result: Float32 = (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)
    return result


def directions(n: int, dim: int, seed: int = 0) -> Float32:
    return unit(np.random.default_rng(seed).standard_normal((n, dim)))


def paired(n: int = 120, dim: int = 24, *, noise: float = 0.5) -> tuple[Float32, Float32, Int64]:
    """Pictures in all directions, and two captions of each near it."""
    pictures, owner = directions(n, dim), np.repeat(np.arange(n), 2)
    return pictures, unit(pictures[owner] + noise * directions(2 * n, dim, seed=1)), owner


# ---- by hand


def test_axes_are_as_even_as_can_be() -> None:
    """The 8 signed axes of 4 dimensions: mean 0, so variance 1, a quarter in each direction, and
    effective rank exp(ln 4) = 4. |x - y|^2 is 4 for the opposite axis, 2 for the six others:
    uniformity = ln((e^-8 + 6 e^-4) / 7)."""
    report = space_of_vectors(np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32), k=3)
    value = {name: interval.value for name, interval in report.metrics.items()}
    assert value["pictures/variance"] == pytest.approx(1)
    assert value["pictures/effective_rank"] == pytest.approx(4)
    uniformity = math.log((math.exp(-8) + 6 * math.exp(-4)) / 7)
    assert value["pictures/uniformity"] == pytest.approx(uniformity)
    assert report.details["curves"][0]["series"][0]["y"] == pytest.approx([0.25] * 4)
    assert report.details["tables"][0]["rows"] == [["pictures", 4, 0.25, 0.25, 0.25, 0]]
    assert "effective rank of 4 of at most 4" in report.details["words"][0]
    assert math.isnan(report.metrics["pictures/effective_rank"].low), "no honest interval"


def test_pairs_across_a_gap() -> None:
    """Pictures (0.6, +-0.8, 0), captions (-0.6, +-0.8, 0): each pair is 1.2 apart, squared 1.44, its
    cosine -0.36 + 0.64 = 0.28, and so are the centres (0.6, 0, 0) and (-0.6, 0, 0)."""
    pictures = np.array([[0.6, 0.8, 0], [0.6, -0.8, 0]] * 6, np.float32)
    texts = pictures * np.array([-1, 1, 1], np.float32)
    report = space_of_vectors(pictures, texts, np.arange(12), k=2)
    value = {name: interval.value for name, interval in report.metrics.items()}
    assert value["pairs/alignment"] == pytest.approx(1.44) == metrics.alignment(pictures, texts)
    assert value["pairs/matched_cosine"] == pytest.approx(0.28)
    assert value["pairs/modality_gap"] == pytest.approx(1.2)
    assert "The modality gap, between the means of pictures and captions, is 1.20" in " ".join(
        report.details["words"]
    )


def test_figures_are_means_over_pictures() -> None:
    """Picture 0 has three captions of cosine 1, the others one of cosine 0 each, among three pictures:
    a third, not the 3/5 that a mean over captions gives; the samples' mean is the figure."""
    pictures = np.eye(6, dtype=np.float32)[:3]
    texts = np.eye(6, dtype=np.float32)[[4, 0, 0, 5, 0]]  # not in the order of the pictures
    report = space_of_vectors(pictures, texts, np.array([1, 0, 0, 2, 0]), k=1)
    assert report.metrics["pairs/matched_cosine"].value == pytest.approx(1 / 3)
    assert report.metrics["pairs/matched_cosine"].n == 3
    assert report.samples["pairs/matched_cosine"].tolist() == [1, 0, 0]
    for name, values in report.samples.items():
        assert values.mean() == pytest.approx(report.metrics[name].value)
    # means: (1, 1, 1, 0, 0, 0) / 3 and (1, 0, 0, 0, 1, 1) / 3
    assert report.metrics["pairs/modality_gap"].value == pytest.approx(2 / 3)
    lacking = space_of_vectors(pictures, texts[1:3], np.array([0, 0]), k=1)
    assert lacking.samples == {} and lacking.metrics["pairs/matched_cosine"].n == 1


# ---- good, random and collapsed models


def test_a_perfect_model_has_no_distance_left() -> None:
    pictures, _, owner = paired()
    report = space_of_vectors(pictures, pictures[owner], owner)
    value = {name: interval.value for name, interval in report.metrics.items()}
    assert value["pairs/accuracy"] == 1 and value["pairs/alignment"] == pytest.approx(0, abs=1e-6)
    assert value["pairs/modality_gap"] == pytest.approx(0, abs=1e-6)
    assert report.warnings == ()


def test_a_collapsed_model_is_at_chance_and_called_so() -> None:
    """All cosines tie: a caption is as close to any picture, which counts half."""
    same = np.repeat(unit([[1.0, 2.0, 3.0]]), 40, axis=0)
    report = space_of_vectors(same, same, np.arange(40))
    assert report.metrics["pairs/accuracy"].value == 0.5
    assert report.metrics["pictures/variance"].value == pytest.approx(0, abs=1e-9)
    assert not any("hubness" in name for name in report.metrics), "neighbours would be chance"
    assert report.warnings == (
        "the pictures have collapsed into one vector and cannot be told apart",
        "the texts have collapsed into one vector and cannot be told apart",
        "captions are no nearer to their own picture than to another",
    )


def test_shuffled_captions_are_at_chance_within_the_interval() -> None:
    pictures, texts, owner = paired(300)
    shuffled = np.random.default_rng(3).permutation(texts)
    report = space_of_vectors(pictures, shuffled, owner)
    accuracy = report.metrics["pairs/accuracy"]
    assert accuracy.low < 0.5 < accuracy.high
    assert report.warnings == ("captions are no nearer to their own picture than to another",)
    assert space_of_vectors(pictures, texts, owner).warnings == ()


def test_a_narrow_cone_and_a_flat_space_are_warned_of() -> None:
    """The cone's rows are 5 along one axis and 1 across it: cosine 25 / 26 of two, variance 1 / 26."""
    across = np.concatenate([np.zeros((500, 1)), directions(500, 63)], axis=1)
    cone = across + np.eye(64)[0] * 5
    (narrow,) = space_of_vectors(unit(cone), k=3).warnings
    assert "narrow cone" in narrow and "cosine 0.96" in narrow and "variance 0.038" in narrow
    flat = np.zeros((500, 128))
    flat[:, :3] = directions(500, 3)
    (few,) = space_of_vectors(unit(flat), k=3).warnings
    assert "the pictures use few directions: effective rank 3.0 of at most 128" in few


# ---- hubs


def hubby() -> Float32:
    """299 rows about one direction, and the direction itself, row 299: nearest to nearly all."""
    rows = np.concatenate([directions(299, 64), np.zeros((1, 64))])
    return unit(rows + 0.6 * np.eye(64)[0])


def test_the_worst_hub_is_named_and_counted() -> None:
    rows = hubby()
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    listed = np.argsort(-cosines, axis=1)[:, :10]
    of = int((listed == 299).sum())
    assert of > 200, "the premise: far more than ten"
    report = space_of_vectors(rows, k=10, pictures=Named())
    words = report.details["words"][1]
    assert f"One picture is among the 10 nearest of {of} of 300 pictures (mean: 10.0)" in words
    assert report.metrics["pictures/hubness@10"].value == pytest.approx(
        metrics.hubness(listed, 300), abs=0.05
    ), "but for what half-precision codes swap"
    (group,) = report.details["mistakes"]
    assert group["items"][0]["name"] == "299.jpg" and group["items"][0]["got"] == f"{of} pictures"
    assert any("and crowd out others" in warning for warning in report.warnings)


class Named:
    """Pictures that have names and cannot be read any more."""

    def __len__(self) -> int:
        return 300

    def name(self, row: int) -> str:
        return f"{row}.jpg"

    def read(self, row: int) -> bytes:
        from clipkit.errors import ImageError

        raise ImageError(f"{self.name(row)} is gone", reason="missing")


def test_sampled_hubs_keep_their_names() -> None:
    """Of 300 pictures 100 are looked at: the items' rows are of all pictures, not of the sample."""
    rows = hubby()
    report = space_of_vectors(rows, sample=100, pictures=Named())
    assert report.settings["neighbours_among"] == 100
    drawn = np.sort(np.random.default_rng(0).permutation(300)[:100])
    found = neighbours(rows[drawn], 10)[0]
    worst = drawn[np.argmax(np.bincount(found.ravel(), minlength=100))]
    assert report.details["mistakes"][0]["items"][0]["name"] == f"{worst}.jpg"


def test_neighbours_are_those_of_brute_force() -> None:
    rows = directions(1500, 8)  # more than one block
    cosines = rows.astype(np.float64) @ rows.T
    np.fill_diagonal(cosines, -2)
    found, scores = neighbours(rows, 5)
    true = -np.sort(-cosines, axis=1)[:, :5]
    np.testing.assert_allclose(scores, true, atol=2e-3)  # half-precision codes
    np.testing.assert_allclose(np.take_along_axis(cosines, found, axis=1), true, atol=2e-3)
    assert not (found == np.arange(1500)[:, None]).any()


def test_a_row_is_not_its_own_neighbour_even_among_copies() -> None:
    """Six copies: with ties by row, the last ones are not even among their own four nearest."""
    found, scores = neighbours(np.repeat(unit([[1.0, 0.0]]), 6, axis=0), 3)
    assert found.shape == (6, 3) and not (found == np.arange(6)[:, None]).any()
    assert (scores == 1).all()


def test_nearest_known_of_a_text() -> None:
    rows, scores = nearest_known(unit([[1.0, 0.1]]), unit([[0, 1], [1, 0], [1, 1.0]]), 2)
    assert rows.tolist() == [[1, 2]] and scores[0, 0] > scores[0, 1]


# ---- what is refused; stopping


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.eye(2), r"shape \(2, 2\); a space needs \(N, D\), N at least 3"),
        (np.full((4, 2), np.nan), "picture 0 has length nan"),
        (np.diag([1, 1, 7, 1.0]), "picture 2 has length 7; unit vectors"),
    ],
)
def test_refused_pictures(rows: npt.NDArray[np.float64], message: str) -> None:
    with pytest.raises(InputError, match=message):
        space_of_vectors(rows.astype(np.float32))


@pytest.mark.parametrize(
    ("texts", "owner", "message"),
    [
        (np.eye(3), [0, 1, 2], r"texts have shape \(3, 3\), owners \(3,\); \(M, 4\)"),
        (np.eye(4), [0, 1], r"owners \(2,\)"),
        (np.eye(4), [0, 1, 2, 9], "belongs to picture 9 of 4"),
        (np.diag([1, np.inf, 1, 1]), [0, 1, 2, 3], "text 1 has length inf"),
    ],
)
def test_refused_texts(texts: npt.NDArray[np.float64], owner: list[int], message: str) -> None:
    pictures = np.eye(4, dtype=np.float32)
    with pytest.raises(InputError, match=message):
        space_of_vectors(pictures, texts.astype(np.float32), np.array(owner, np.int64))


def test_stopping() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        space_of_vectors(directions(20, 4), session=Session(stop=stop))


# ---- with a model


class Colours(ColourModel):
    precision = "float32"
    logit_scale = 100.0

    def towers(self) -> Any:
        return self


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four colours with a caption each, and after the first a file that cannot be read."""
    lines = []
    for number, colour in enumerate(("red", "green", "blue", "yellow")):
        paint(tmp_path / "set" / f"{colour}.png", colour)
        lines.append({"image": f"set/{colour}.png", "captions": [f"a {colour} wall", "a wall"]})
        if number == 0:
            (tmp_path / "set" / "broken.png").write_bytes(b"no picture")
            lines.append({"image": "set/broken.png", "captions": ["a yellow wall"]})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "data.jsonl"


def test_captions_stay_with_their_pictures_when_one_is_skipped(
    pictures: Path, tmp_path: Path
) -> None:
    """The colour model is perfect on "a red wall"; "a wall" says nothing. Had the skipped picture
    shifted the owners by one, every named colour would miss its picture."""
    data = open_captioned(str(pictures))
    report = evaluate_space(Colours(), data, session=Session(FeatureCache(tmp_path / "cache")))
    assert report.n == {"pictures": 4, "captions": 8, "skipped": 1}
    wall = (
        Colours().encode_texts(["a wall"])
        @ Colours().encode_texts("red green blue yellow".split()).T
    )
    assert report.metrics["pairs/matched_cosine"].value == pytest.approx(
        (1 + wall.mean()) / 2, abs=0.01
    )
    assert any("left out 1 of 5 pictures" in warning for warning in report.warnings)
    assert report.split is None and report.encoder_id == Colours.encoder_id
    hub = report.details["mistakes"][0]["items"][0]
    assert hub["thumbnail"].startswith("data:image/jpeg;base64,") and hub["name"].endswith(".png")


def test_labelled_pictures_have_a_space_too(tmp_path: Path) -> None:
    for colour in ("red", "green", "blue"):
        for number in range(2):
            paint(tmp_path / colour / f"{number}.png", colour, number=number)
    report = evaluate_space(Colours(), open_labelled(str(tmp_path)), k=1)
    assert report.n == {"pictures": 6}
    assert not any(name.startswith(("pairs", "texts")) for name in report.metrics)
    again = evaluate_space(Colours(), open_labelled(str(tmp_path)), k=1)
    assert again.fingerprint == report.fingerprint
