"""Indexing runs on real files with a small exact encoder: a picture's vector is its mean colour."""

from __future__ import annotations

import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clipkit import images
from clipkit.catalog import Catalog
from clipkit.embed import Progress, Summary, index_folders
from clipkit.errors import InputError


@dataclass
class MeanColour:
    """Vectors are mean colours made unit: checkable by eye. Counts what it was given."""

    encoder_id: str = "colour"
    spec: str = "mean-colour"
    dim: int = 3
    preferred_side: int = 8
    preferred_batch: int = 4
    embedded: int = 0
    broken: bool = False
    precision: str = "float32"

    @property
    def known_id(self) -> str:
        return self.encoder_id

    def towers(self) -> Any:
        return self

    def preprocess(self, image: Image.Image) -> Any:
        return np.asarray(image, np.float32).mean(axis=(0, 1)) + 1

    def encode_images(self, images: Sequence[Any]) -> npt.NDArray[np.float32]:
        self.embedded += len(images)
        rows = np.stack(images)
        if self.broken:
            rows[0] = np.nan
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

    def describe(self) -> str:
        return "{}"


@pytest.fixture
def encoder() -> MeanColour:
    return MeanColour()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten pictures of as many colours in two folders."""
    for i in range(10):
        folder = tmp_path / "photos" / ("a" if i < 5 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (25 * i, 10, 250 - 25 * i)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog.open(tmp_path / "index", write=True) as catalog:
        yield catalog


@pytest.fixture
def run(catalog: Catalog, encoder: MeanColour) -> Callable[..., Summary]:
    def run(*folders: Path, **options: Any) -> Summary:
        using = options.pop("using", encoder)
        return index_folders(catalog, folders, encoder=using, **options)

    return run


def places(catalog: Catalog) -> list[str]:
    rows = catalog.rows(catalog.live_nums("colour"))
    return sorted(Path(place).name for row in rows.values() for place in row.places)


def test_pictures_are_added_with_their_vectors(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    summary = run(photos)
    assert (summary.added, summary.embedded, summary.skipped) == (10, 10, 0)
    stored = catalog.vectors("colour")
    rows = catalog.rows(stored.nums)
    for num, vector in zip(stored.nums, stored.vectors, strict=True):
        i = int(Path(rows[num].path).stem)
        expected = np.array([25 * i + 1, 11, 251 - 25 * i], np.float32)
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-3)
        assert (rows[num].width, rows[num].height, rows[num].format) == (20, 10, "PNG")
        assert catalog.thumbnail(rows[num].image_id) is not None


def test_no_decoded_original_waits_for_its_batch(
    run: Callable[..., Summary], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of ten is encoded when all ten are resized: the 100 MP originals are gone by then, but
    for the one that a thread may still hold. Fails for a pass that keeps them beside the pixels: ten."""
    decode, originals = images.decode, []
    alive: list[int] = []

    def recording(*args: Any, **options: Any) -> images.Picture:
        picture = decode(*args, **options)
        originals.append(weakref.ref(picture.rgb))
        return picture

    class Counting(MeanColour):
        def encode_images(self, images: Sequence[Any]) -> npt.NDArray[np.float32]:
            alive.append(sum(original() is not None for original in originals))
            return super().encode_images(images)

    monkeypatch.setattr(images, "decode", recording)
    assert run(photos, using=Counting(), workers=1, batch_size=10).added == 10
    assert len(originals) == 10
    assert len(alive) == 1 and alive[0] <= 1


def test_an_unchanged_folder_loads_no_towers(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    run(photos)
    before = catalog.change_counter()

    class Unloadable(MeanColour):
        def towers(self) -> Any:
            raise AssertionError("the towers were loaded for nothing")

    summary = run(photos, using=Unloadable())
    assert (summary.unchanged, summary.added, summary.embedded) == (10, 0, 0)
    assert catalog.change_counter() == before


def test_a_moved_file_is_not_embedded_again(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, encoder: MeanColour
) -> None:
    run(photos)
    (photos / "a" / "0.png").rename(photos / "b" / "renamed.png")
    summary = run(photos)
    assert (summary.moved, summary.added, summary.removed, encoder.embedded) == (1, 0, 0, 10)
    assert "renamed.png" in places(catalog) and "0.png" not in places(catalog)


def test_a_copy_is_a_second_place(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    shutil.copy(photos / "a" / "0.png", photos / "copy-before.png")
    assert run(photos).duplicates == 1
    shutil.copy(photos / "a" / "1.png", photos / "copy-after.png")
    assert run(photos).duplicates == 1
    assert len(catalog.live_nums("colour")) == 10
    assert len(places(catalog)) == 12


def test_a_deleted_file_leaves_and_a_restored_one_costs_nothing(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, encoder: MeanColour, tmp_path: Path
) -> None:
    run(photos)
    (photos / "a" / "0.png").rename(tmp_path / "elsewhere.png")
    assert run(photos).removed == 1
    assert len(catalog.live_nums("colour")) == 9
    (tmp_path / "elsewhere.png").rename(photos / "a" / "0.png")
    summary = run(photos)
    assert (summary.added, summary.duplicates, summary.moved) == (1, 0, 0)
    assert len(catalog.live_nums("colour")) == 10
    assert encoder.embedded == 10


def test_a_changed_file_is_another_picture(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    run(photos)
    Image.new("RGB", (30, 30), "white").save(photos / "a" / "0.png")
    summary = run(photos)
    assert (summary.added, summary.removed) == (1, 0)
    assert len(catalog.live_nums("colour")) == 10
    widths = {row.width for row in catalog.rows(catalog.live_nums("colour")).values()}
    assert widths == {20, 30}


@pytest.mark.parametrize("how", ["empty", "missing"])
def test_an_unmounted_disk_deletes_nothing(
    how: str, run: Callable[..., Summary], photos: Path, catalog: Catalog, tmp_path: Path
) -> None:
    run(photos)
    photos.rename(tmp_path / "unmounted")
    if how == "empty":
        photos.mkdir()
    summary = run(photos)
    assert summary.unavailable == (str(photos),)
    assert summary.removed == 0
    assert len(catalog.live_nums("colour")) == 10


def test_an_unreadable_folder_deletes_nothing(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not stop root, who runs the tests in containers: the refusal is simulated."""
    run(photos)
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    summary = run(photos)
    assert (summary.removed, summary.unchanged) == (0, 5)
    assert summary.reasons == {"unreadable-folder": 1}
    assert len(catalog.live_nums("colour")) == 10


def test_a_broken_file_is_named_once_and_welcome_when_mended(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    broken = photos / "a" / "broken.jpg"
    broken.write_bytes(b"")
    summary = run(photos)
    assert (summary.added, summary.reasons) == (10, {"empty": 1})
    (row,) = catalog.skipped()
    assert row.path == str(broken) and row.reason == "empty"
    again = run(photos)
    assert (again.skipped, again.skipped_before, again.unchanged) == (0, 1, 10)
    Image.new("RGB", (9, 9), "red").save(broken)
    assert run(photos).added == 1
    assert catalog.skipped() == []
    broken.write_bytes(b"")
    run(photos)
    broken.unlink()
    run(photos)
    assert catalog.skipped() == []


def test_stopping_keeps_what_was_done_and_the_next_run_goes_on(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, encoder: MeanColour
) -> None:
    stop = threading.Event()

    def stop_after_four(progress: Progress) -> None:
        if progress.added >= 4:
            stop.set()

    summary = run(photos, stop=stop, on_progress=stop_after_four, workers=1, batch_size=2)
    assert summary.stopped and 4 <= summary.added < 10
    assert len(catalog.live_nums("colour")) == summary.added
    rest = run(photos)
    assert rest.added == 10 - summary.added
    assert encoder.embedded == 10


def test_stopping_during_the_walk_deletes_nothing(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    run(photos)
    stop = threading.Event()
    stop.set()
    assert run(photos, stop=stop).removed == 0
    assert len(catalog.live_nums("colour")) == 10


def test_another_encoder_embeds_everything_again(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    run(photos)
    other = MeanColour(encoder_id="other")
    summary = run(photos, using=other)
    assert (other.embedded, summary.added, summary.moved, summary.duplicates) == (10, 0, 0, 0)
    assert len(catalog.vectors("other").nums) == len(catalog.vectors("colour").nums) == 10


def test_a_summary_says_what_was_encoded_again_and_which_model_answers(
    run: Callable[..., Summary], photos: Path
) -> None:
    """Ten pictures, known but without a vector of the other model, are neither new nor unchanged."""
    first = run(photos)
    assert (first.model, first.model_before, first.reencoded) == ("mean-colour", None, 0)
    other = MeanColour(encoder_id="other", spec="other-spec")
    partly = run(photos / "a", using=other)
    assert (partly.reencoded, partly.unchanged, partly.without_vector) == (5, 0, 5)
    assert (partly.model, partly.model_before) == ("other-spec", "mean-colour")
    again = run(photos, using=other)
    assert (again.reencoded, again.unchanged, again.without_vector) == (5, 5, 0)
    assert again.model_before is None
    back = run(photos)
    assert (back.reencoded, back.unchanged, back.model_before) == (0, 10, "other-spec")


def test_files_with_a_new_time_and_the_same_content_are_unchanged(
    run: Callable[..., Summary], photos: Path
) -> None:
    run(photos)
    for path in photos.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    summary = run(photos)
    assert (summary.unchanged, summary.embedded, summary.reencoded) == (10, 0, 0)


def test_an_interrupted_run_leaves_the_answering_model_as_it_was(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    run(photos)
    other = MeanColour(encoder_id="other", spec="other-spec")
    stop = threading.Event()

    def stop_soon(progress: Progress) -> None:
        if progress.done:
            stop.set()

    summary = run(photos, using=other, stop=stop, on_progress=stop_soon)
    assert summary.stopped and summary.model_before is None
    assert 0 < len(catalog.live_nums("other")) < 10
    active = catalog.active_encoder()
    assert active is not None and active.encoder_id == "colour"
    run(photos, using=other)
    active = catalog.active_encoder()
    assert active is not None and active.encoder_id == "other"


def test_a_picture_without_a_finite_vector_is_named(
    run: Callable[..., Summary], photos: Path
) -> None:
    summary = run(photos, using=MeanColour(broken=True, preferred_batch=10))
    assert (summary.added, summary.reasons) == (9, {"no-vector": 1})


def test_hidden_names_links_and_the_index_itself(
    run: Callable[..., Summary], photos: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (9, 9)).save(photos / ".hidden.png")
    (photos / "loop").symlink_to(photos)
    (photos / "self.png").symlink_to(photos / "self.png")
    (photos / "gone.png").symlink_to(photos / "nothing.png")
    os.mkfifo(photos / "pipe.png")
    (photos / "folder.jpg").mkdir()
    Image.new("RGB", (9, 9), "green").save(photos / "folder.jpg" / "inside.png")
    (photos / "notes.txt").write_text("not a picture, and not called one")
    summary = run(photos)
    assert summary.added == 11
    assert summary.reasons == {"unreadable": 2, "symlink-loop": 1, "not-a-file": 1}
    whole = run(tmp_path)  # holds the index folder, with whatever it keeps
    assert whole.added == 0


def test_names_that_are_not_utf8(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    name = os.fsencode(photos) + b"/caf\xe9\n\xff.png"
    try:
        shutil.copy(photos / "a" / "0.png", name)
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    Image.new("RGB", (9, 9), "red").save(os.fsdecode(name), format="PNG")
    assert run(photos).added == 11
    assert os.fsdecode(name) in dict(catalog.known_files(photos))
    assert run(photos).unchanged == 11


def test_captions_beside_pictures_are_kept(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    (photos / "a" / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "captions": ["a blue field"], "keywords": ["sky"]}\n'
    )
    (photos / "b" / "9.txt").write_text("a red field\n")
    run(photos)
    assert [
        Path(r.path).name for r in catalog.rows(catalog.phrase("blue field").nums).values()
    ] == ["0.png"]
    assert [Path(r.path).name for r in catalog.rows(catalog.phrase("red field").nums).values()] == [
        "9.png"
    ]


def test_changed_captions_are_read_again(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, encoder: MeanColour
) -> None:
    run(photos)
    (photos / "b" / "9.txt").write_text("a sunset over the sea\n")
    assert run(photos).unchanged == 10
    assert [row.path for row in catalog.rows(catalog.phrase("sunset").nums).values()] == [
        str(photos / "b" / "9.png")
    ]
    assert encoder.embedded == 10


def test_roots(run: Callable[..., Summary], photos: Path) -> None:
    assert run(photos, photos / "a", photos).added == 10
    with pytest.raises(InputError, match="/nowhere does not exist; name a folder"):
        run(Path("/nowhere"))
    with pytest.raises(InputError, match=r"0\.png is a file; give its folder: "):
        run(photos / "a" / "0.png")


def test_progress_tells_rate_and_time_left(run: Callable[..., Summary], photos: Path) -> None:
    told: list[Progress] = []
    run(photos, on_progress=told.append, workers=1, batch_size=2)
    assert {p.phase for p in told} == {"walking", "embedding", "finishing"}
    embedding = [p for p in told if p.phase == "embedding"]
    assert [p.done for p in embedding] == sorted(p.done for p in embedding)
    assert embedding[-1].total == 10
    assert embedding[-1].rate > 0 and embedding[-1].eta_seconds is not None
    assert told[-1].done == 10
