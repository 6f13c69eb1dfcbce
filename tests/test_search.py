"""Searching a real catalog: what comes first, how strong it is, and whose vectors are compared."""

# ruff: noqa: F402, F811
from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from directions import (  # noqa: F401
    FakeEncoder,
    NotNeeded,
    Writer,
    catalog,
    encoder,
    fill,
    key,
    names,
    searcher,
    writer,
)

from clipkit import strength
from clipkit.catalog import Catalog, Filters
from clipkit.errors import EncoderMismatch, InputError, ModelError, QueryError
from clipkit.query import Query, Term
from clipkit.search import Searcher, SearchHit
from clipkit.search.live_vectors import SAMPLE, follow
from clipkit.search.searcher import NOTHING_STANDS_OUT
from clipkit.strength import Calibration

# ---- what comes first


def test_the_nearest_come_first_and_ties_go_by_image_id(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    tied = sorted(["swim", "walk"], key=key)
    result = searcher.search("dog")
    assert names(result) == ["run", *tied, "drive"]
    assert [hit.score for hit in result.hits] == pytest.approx([0.8, 0.6, 0.6, 0], abs=1e-3)
    assert result.total == 4
    assert set(result.seconds) == {"load", "encode", "filter", "scan", "rows"}
    # also where the tie straddles the last rank, and k has no cap
    assert names(searcher.search("dog", k=2)) == ["run", tied[0]]
    assert names(searcher.search("dog", k=10**9)) == names(result)


def test_many_ties_at_the_last_rank(writer: Writer, searcher: Searcher) -> None:
    """40 pictures with one vector: the first by image_id, whatever order they were added in."""
    all_names = [f"p{number}" for number in range(40)]
    for name in all_names:
        writer.add(name, [1, 1, 0, 0])
    assert names(searcher.search("dog", k=3)) == sorted(all_names, key=key)[:3]


def test_an_exclusion_pushes_down(writer: Writer, searcher: Searcher) -> None:
    """dog - 0.5 leash = (1, 0, -0.5, 0) / 1.1180: swim 0.6 / 1.1180 = 0.5367, walk
    (0.6 - 0.5 * 0.8) / 1.1180 = 0.1789, run 0.7155."""
    fill(writer)
    result = searcher.search("dog -leash")
    assert names(result) == ["run", "swim", "walk", "drive"]
    scores = [hit.score for hit in result.hits]
    assert scores == pytest.approx([0.7155, 0.5367, 0.1789, 0], abs=1e-3)
    # with weight 2: (1, 0, -1, 0) / 1.4142, walk (0.6 - 0.8) / 1.4142 = -0.1414, behind drive
    result = searcher.search("dog -leash^2")
    assert names(result) == ["run", "swim", "drive", "walk"]
    assert result.hits[3].score == pytest.approx(-0.1414, abs=1e-3)


def test_only_exclusions_list_what_is_least_alike_first(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    assert names(searcher.search("-dog"))[0] == "drive"


def test_weights(writer: Writer, searcher: Searcher) -> None:
    """dog + 3 beach = (1, 3, 0, 0) / 3.1623: swim (0.6 + 2.4) / 3.1623 = 0.9487,
    run (0.8 + 1.8) / 3.1623 = 0.8222. With 3 dog + beach they swap."""
    fill(writer)
    result = searcher.search("dog beach^3", k=2)
    assert names(result) == ["swim", "run"]
    assert [hit.score for hit in result.hits] == pytest.approx([0.9487, 0.8222], abs=1e-3)
    assert names(searcher.search("dog^3 beach", k=2)) == ["run", "swim"]


def test_terms_that_cancel_out_are_an_error(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    with pytest.raises(QueryError, match=r"terms cancel out; change a weight or leave one out"):
        searcher.search("dog -dog^2")


# ---- strength


@pytest.fixture
def calibrated(catalog: Catalog, tmp_path: Path) -> Searcher:
    """A model with log odds 10 c - 7: a cosine of 0.7 is right in one case of two."""
    folder = tmp_path / "calibrated"
    folder.mkdir()
    Calibration("fake-1", constant=-7, cosine=10).write(folder)
    return Searcher(catalog, FakeEncoder(spec=str(folder)))


def test_strength_is_the_probability_of_the_cosine(writer: Writer, calibrated: Searcher) -> None:
    """Cosines to "dog" are 0.8, 0.6, 0.6, 0: log odds 1, -1, -1, -7; 1 / (1 + e^-1) = 0.731,
    1 / (1 + e) = 0.269, 1 / (1 + e^7) = 0.0009."""
    fill(writer)
    result = calibrated.search("dog")
    assert [hit.strength for hit in result.hits] == ["strong", "weak", "weak", "weak"]
    probabilities = [hit.probability for hit in result.hits]
    assert probabilities == pytest.approx([0.731, 0.269, 0.269, 0.0009], abs=2e-3)
    assert result.notes == ()


def test_strength_is_that_of_the_whole_library(
    writer: Writer, calibrated: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four pictures with size 1: odds e^(10 * 0.8 - 7) / 4 = e / 4, so 0.405, filtered or not."""
    monkeypatch.setattr(strength, "FEWEST_PICTURES", 1)
    folder = Path(calibrated._model.encoder.spec)
    Calibration("fake-1", constant=-7, cosine=10, size=1).write(folder)
    fill(writer)
    for filters in (None, Filters(paths=("run",))):
        hit = calibrated.search("dog", filters=filters).hits[0]
        assert hit.probability == pytest.approx(0.405, abs=2e-3)


def test_nothing_stands_out_is_said(writer: Writer, calibrated: Searcher) -> None:
    """Of "dog" the pictures without "run" reach 0.6: log odds -1, below fair."""
    fill(writer)
    result = calibrated.search("dog", filters=Filters(paths=("swim",)))
    assert names(result) == ["swim"]
    assert result.notes == (NOTHING_STANDS_OUT,)


def test_only_a_texts_cosines_are_calibrated(
    writer: Writer, searcher: Searcher, calibrated: Searcher
) -> None:
    """Two pictures' cosines are another distribution; another encoder's calibration does not hold."""
    fill(writer)
    for result in (
        calibrated.similar(key("run")),
        calibrated.search(f"dog +{key('run')}"),
        calibrated.search("-dog"),
        searcher.search("dog"),
    ):
        assert result.hits and result.notes == ()
        for hit in result.hits:
            assert hit.score is not None and hit.strength is hit.probability is None
    writer.register("fake-2", "other")
    writer.add("new", [1, 0, 0, 0], encoder_id="fake-2")
    other = Searcher(writer.catalog, FakeEncoder("fake-2", calibrated._model.encoder.spec))
    assert other.search("dog").hits[0].strength is None


def test_the_sample_is_fixed_and_of_the_live_library(writer: Writer, catalog: Catalog) -> None:
    vectors = np.random.default_rng(0).standard_normal((SAMPLE + 500, 4))
    for number, vector in enumerate(vectors):
        writer.add(f"p{number}", list(vector), commit=False)
    writer.catalog.commit()
    before = follow(catalog, "fake-1")
    assert before.sample.shape == (SAMPLE, 4)
    assert np.array_equal(before.sample, follow(catalog, "fake-1").sample)
    # from all over: 400 of the first 500 are expected, with a standard deviation of 8
    early = {row.tobytes() for row in before.vectors_of(np.arange(1, 501))}
    assert 350 < sum(row.tobytes() in early for row in before.sample) < 450
    writer.add("one more", [1, 0, 0, 0])
    after = follow(catalog, "fake-1", before)
    rows = {row.tobytes() for row in before.sample}
    assert len(rows - {row.tobytes() for row in after.sample}) <= 1


# ---- encoders


def test_another_encoder_is_an_error_that_names_both(writer: Writer, catalog: Catalog) -> None:
    fill(writer)
    message = (
        r"this index holds vectors of fake \(encoder fake-1\), but the search is with other "
        r"\(encoder fake-2\); search with --model fake, or index the pictures with the other "
        r"model: clipkit index FOLDER --model other"
    )
    other = FakeEncoder("fake-2", "other")
    for searcher in (
        Searcher(catalog, other),
        Searcher(catalog, other, encoder_id="fake-1"),
    ):
        with pytest.raises(EncoderMismatch, match=message):
            searcher.search("dog")
        with pytest.raises(EncoderMismatch, match=message):
            searcher.search(f"dog +{key('run')}")
    with pytest.raises(EncoderMismatch, match=r"fake \(encoder fake-1\).*encoder fake-3"):
        Searcher(catalog, NotNeeded(), encoder_id="fake-3").search("dog")
    with pytest.raises(EncoderMismatch, match=message):
        Searcher(catalog, other).similar(key("run"))


def test_a_model_that_changed_under_its_name_asks_to_index_again(
    writer: Writer, catalog: Catalog
) -> None:
    """Naming the same spec as the remedy would help nobody."""
    fill(writer)
    retrained = FakeEncoder("fake-2", "fake")
    message = (
        r"fake has changed .*fake-1 then, fake-2 now\); index the pictures again: clipkit index"
    )
    with pytest.raises(EncoderMismatch, match=message):
        Searcher(catalog, retrained).search("dog")


def test_two_encoders_in_one_catalog_do_not_mix(writer: Writer, catalog: Catalog) -> None:
    fill(writer)
    writer.register("fake-2", "other")
    writer.add("run", [0, 0, 0, 1], encoder_id="fake-2")
    assert Searcher(catalog, FakeEncoder()).search("dog").total == 4
    result = Searcher(catalog, FakeEncoder("fake-2", "other")).search("car")
    assert (names(result), result.total) == (["run"], 1)
    assert Searcher(catalog, NotNeeded(), encoder_id="fake-2").similar(key("run")).total == 0


def test_an_empty_catalog_has_no_hits(catalog: Catalog) -> None:
    searcher = Searcher(catalog, NotNeeded())
    for query in ("dog", "", '"phrase"', "sort:name", "after:2023", f"+{'0' * 32}"):
        result = searcher.search(query)
        assert (result.hits, result.total) == ((), 0)


def test_an_encoder_is_loaded_by_the_first_text_and_texts_are_encoded_once(
    writer: Writer, catalog: Catalog, encoder: FakeEncoder
) -> None:
    fill(writer)
    searcher = Searcher(catalog, NotNeeded())
    searcher.similar(key("run"))
    searcher.search("path:run")
    with pytest.raises(AssertionError, match="not needed"):
        searcher.search("dog")
    searcher = Searcher(catalog, encoder)
    threads = [threading.Thread(target=searcher.search, args=("dog -car",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    encoder.texts.clear()
    searcher.search("dog")
    searcher.search("car -dog")
    searcher.search("dog -leash")
    assert encoder.texts == ["leash"]


def test_vectors_that_are_not_finite_are_an_error(writer: Writer, catalog: Catalog) -> None:
    class Broken(FakeEncoder):
        def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            return np.full((len(texts), 4), np.nan, dtype=np.float32)

    fill(writer)
    with pytest.raises(ModelError, match=r"vector of text 'dog' has values that are not finite"):
        Searcher(catalog, Broken()).search("dog")


def test_bad_arguments(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    with pytest.raises(InputError, match=r"k is 0; it must be at least 1"):
        searcher.search("dog", k=0)
    with pytest.raises(InputError, match=r"k is -1"):
        searcher.similar(key("run"), k=-1)
    with pytest.raises(QueryError, match=r"unknown key 'kamera'"):
        searcher.search("kamera:x")


def test_hits_are_plain_data(writer: Writer, searcher: Searcher) -> None:
    fill(writer)
    hit = searcher.search(Query(terms=(Term("dog"),)), k=1).hits[0]
    assert isinstance(hit, SearchHit)
    fields = json.loads(json.dumps(dataclasses.asdict(hit)))
    picture = fields.pop("picture")
    assert fields == {
        "rank": 1,
        "score": pytest.approx(0.8, abs=1e-3),
        "strength": None,
        "probability": None,
        "named": [],
    }
    assert (picture["image_id"], picture["path"]) == (key("run"), "/pictures/run.jpg")
    assert writer.catalog.row(key("run")) == hit.picture
