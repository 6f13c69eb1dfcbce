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
from catalogs import found
from PIL import Image

from clipkit import images
from clipkit.catalog import Catalog
from clipkit.embed import Progress, Summary, index_folders
from clipkit.errors import ClipkitError, ImageError, InputError
from clipkit.index_models import models_of


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

    @property
    def space_id(self) -> str:
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


def test_a_deleted_file_is_purged_by_a_completed_run(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, encoder: MeanColour, tmp_path: Path
) -> None:
    """Its vector and thumbnail go, so that one that comes back later is encoded again: 11 in all."""
    run(photos)
    (old,) = (r for r in catalog.rows(catalog.live_nums("colour")).values() if "/0.png" in r.path)
    (photos / "a" / "0.png").rename(tmp_path / "elsewhere.png")
    summary = run(photos)
    assert (summary.removed, summary.purged) == (1, 1)
    assert len(catalog.live_nums("colour")) == 9
    assert catalog.vector(old.num, "colour") is None
    assert catalog.thumbnail(old.image_id) is None
    (tmp_path / "elsewhere.png").rename(photos / "a" / "0.png")
    summary = run(photos)
    assert (summary.added, summary.duplicates, summary.moved, summary.purged) == (1, 0, 0, 0)
    assert len(catalog.live_nums("colour")) == 10
    assert encoder.embedded == 11


def test_a_file_moved_between_two_folders_of_a_run_is_not_purged(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, encoder: MeanColour
) -> None:
    """From the root that is walked first to the second one, and back."""
    roots = photos / "a", photos / "b"
    run(*roots)
    for old, new in (("a/0.png", "b/0.png"), ("b/0.png", "a/0.png")):
        (photos / old).rename(photos / new)
        summary = run(*roots)
        assert (summary.moved, summary.removed, summary.purged, encoder.embedded) == (1, 0, 0, 10)
    assert len(catalog.live_nums("colour")) == 10


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
    assert summary.waiting == 10 - summary.added
    rest = run(photos)
    assert rest.added == 10 - summary.added
    assert encoder.embedded == 10


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_stopping_during_the_walk_deletes_nothing_and_calls_no_folder_missing(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, after: int, tmp_path: Path
) -> None:
    """Stopped before it begins, or when progress was reported once to three times: of three folders of
    which the last is not there, none was looked at to its end and found empty."""
    roots = photos / "a", photos / "b", tmp_path / "z"
    Image.new("RGB", (9, 9)).save((roots[2].mkdir(), roots[2] / "z.png")[1])
    run(*roots)
    (roots[2] / "z.png").unlink()
    (photos / "a" / "0.png").unlink()
    stop = threading.Event()
    reports = 0

    def halt(_: Progress) -> None:
        nonlocal reports
        reports += 1
        if reports == after:
            stop.set()

    if not after:
        stop.set()
    summary = run(*roots, stop=stop, on_progress=halt)
    assert summary.stopped and summary.removed == summary.purged == 0
    assert summary.unavailable == (() if after < 3 else (str(roots[2]),))
    assert len(catalog.live_nums("colour")) == 11


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
    """Ten pictures, known but without a vector of the other model, are neither new nor unchanged.
    Those of the folder that is not named are encoded too: the model answers for all or for none."""
    first = run(photos)
    assert (first.model, first.model_before, first.reencoded) == ("mean-colour", None, 0)
    assert first.answers == "mean-colour"
    other = MeanColour(encoder_id="other", spec="other-spec")
    filled = run(photos / "a", using=other)
    assert (filled.reencoded, filled.unchanged, filled.without_vector) == (10, 0, 0)
    assert (filled.model, filled.model_before) == ("other-spec", "mean-colour")
    assert filled.answers == "other-spec"
    again = run(photos, using=other)
    assert (again.reencoded, again.unchanged, again.model_before) == (0, 10, None)
    back = run(photos)
    assert (back.reencoded, back.unchanged, back.model_before) == (0, 10, "other-spec")


def test_a_model_answers_when_it_has_the_vectors_of_all_pictures(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, tmp_path: Path
) -> None:
    """Folder b is not there: its five pictures keep the model before, until it is back."""

    def answers() -> str:
        active = catalog.active_encoder()
        assert active is not None
        return active.encoder_id

    roots = photos / "a", photos / "b"
    run(*roots)
    (photos / "b").rename(tmp_path / "unmounted")
    other = MeanColour(encoder_id="other", spec="other-spec")
    partly = run(photos / "a", using=other)
    assert (partly.without_vector, partly.pictures) == (5, 10)
    assert (partly.model_before, partly.answers, answers()) == (None, "mean-colour", "colour")
    (tmp_path / "unmounted").rename(photos / "b")
    # a model may be filled without a switch
    beside = run(photos / "a", using=other, activate=False)
    assert (beside.without_vector, beside.reencoded, answers()) == (0, 5, "colour")
    done = run(photos / "a", using=other)
    assert (done.reencoded, done.model_before, answers()) == (0, "mean-colour", "other")


@pytest.mark.parametrize(("pictures", "answers"), [(99, "colour"), (100, "other")])
def test_a_picture_for_which_a_model_has_no_vector_keeps_its_old_one(
    run: Callable[..., Summary],
    catalog: Catalog,
    tmp_path: Path,
    pictures: int,
    answers: str,
) -> None:
    """It stays in the search, and does not hold up the switch if it is one of a hundred or more."""
    photos = tmp_path / "many"
    photos.mkdir()
    for n in range(pictures):
        Image.new("RGB", (4, 4), (n, 200 - n, 50)).save(photos / f"{n:03}.png")
    run(photos)
    other = MeanColour(encoder_id="other", preferred_batch=pictures, broken=True)
    summary = run(photos, using=other)
    assert summary.reasons == {"no-vector": 1}
    assert (summary.refused, summary.without_vector, summary.removed) == (1, 1, 0)
    assert len(catalog.live_nums("colour")) == pictures
    active = catalog.active_encoder()
    assert active is not None and active.encoder_id == answers
    # `use` has the same rule: it goes back to the model, or refuses it
    (model,) = (model for model in models_of(catalog) if model.encoder_id == "other")
    assert (model.missing, model.complete) == (1, answers == "other")
    other.broken = False  # such as a newer version: the picture is tried again
    assert run(photos, using=other).reencoded == 1
    assert catalog.skipped() == []


@pytest.mark.parametrize("vector", [0.0, np.inf, 0.5])
def test_no_vector_that_is_not_of_length_one_is_stored(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, vector: float
) -> None:
    """(0, 0, 0), infinities, and (0.5, 0.5, 0.5) of length 0.87: one would spoil every search."""

    class Zero(MeanColour):
        def encode_images(self, images: Sequence[Any]) -> npt.NDArray[np.float32]:
            rows = super().encode_images(images)
            rows[0] = vector
            return rows

    summary = run(photos, using=Zero(preferred_batch=10))
    assert (summary.added, summary.reasons) == (9, {"no-vector": 1})
    assert len(catalog.live_nums("colour")) == 9


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
    assert named(catalog, "blue field") == ["0.png"]
    assert named(catalog, "red field") == ["9.png"]


def named(catalog: Catalog, phrase: str) -> list[str]:
    """The names of the files of the pictures that have the phrase."""
    return sorted(Path(r.path).name for r in catalog.rows(found(catalog, phrase)).values())


def test_changed_captions_are_read_again(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, encoder: MeanColour
) -> None:
    """An edit, a deletion, and files with times long before the last run, as rsync -a and unzip leave
    them; a run in between without a change writes nothing."""
    run(photos)
    text = photos / "b" / "9.txt"
    text.write_text("a sunset over the sea\n")
    assert run(photos).unchanged == 10
    assert named(catalog, "sunset") == ["9.png"]
    table = photos / "a" / "metadata.jsonl"
    table.write_text('{"file_name": "1.png", "text": "an old sentence"}\n')
    os.utime(table, ns=(10**18, 10**18))  # 2001
    run(photos)
    assert named(catalog, "old sentence") == ["1.png"]
    changes = catalog.change_counter()
    run(photos)
    assert catalog.change_counter() == changes
    text.unlink()
    table.write_text('{"file_name": "2.png", "text": "an old sentence"}\n')
    os.utime(table, ns=(10**18, 10**18))
    table.rename(photos / "a" / "x.jsonl")
    run(photos)
    assert named(catalog, "sunset") == named(catalog, "old sentence") == []
    assert encoder.embedded == 10


def test_captions_that_are_edited_during_a_run_are_read_by_the_next(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    """The edit comes after the picture's texts were read and before the run ends."""
    text = photos / "a" / "0.txt"
    text.write_text("first")
    edited = False

    def edit(progress: Progress) -> None:
        nonlocal edited
        if progress.phase == "finishing" and not edited:
            edited = True
            text.write_text("second words")

    run(photos, on_progress=edit)
    assert edited and named(catalog, "first") == ["0.png"]
    run(photos)
    assert named(catalog, "second") == ["0.png"] and named(catalog, "first") == []


def test_new_captions_are_not_lost_in_a_run_that_is_stopped(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    """Stopped in the walk or in the work, the next run reads what this one did not. A picture whose
    file was changed too is in the work."""
    run(photos)
    for stop_in in ("walking", "embedding"):
        for folder, name in (("a", "0"), ("b", "9")):
            (photos / folder / f"{name}.txt").write_text(f"words of {stop_in}")
        Image.new("RGB", (33, 33), "white" if stop_in == "walking" else "red").save(
            photos / "b" / "9.png"
        )
        stop = threading.Event()

        def halt(progress: Progress, stop_in: str = stop_in, stop: Any = stop) -> None:
            if progress.phase == stop_in:
                stop.set()

        assert run(photos, stop=stop, on_progress=halt).stopped
        run(photos)
        assert named(catalog, f"words of {stop_in}") == ["0.png", "9.png"]


def test_copies_have_the_captions_of_all_their_places(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    """In the order of the paths, whichever run came first; a place that goes takes its own along."""
    shutil.copy(photos / "a" / "0.png", photos / "b" / "copy.png")
    (photos / "b" / "copy.txt").write_text("of the copy")
    run(photos)
    (photos / "a" / "0.txt").write_text("of the first")
    run(photos)
    run(photos)
    (row,) = catalog.rows(found(catalog, "of the first")).values()
    assert row.captions == ("of the first", "of the copy")
    (photos / "a" / "0.png").unlink()
    run(photos)
    (row,) = catalog.rows(found(catalog, "of the copy")).values()
    assert row.captions == ("of the copy",)


# ---- files and folders that cannot be read for now


def test_a_known_file_that_cannot_be_read_stays_in_the_search(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time changed, so it is read, which fails; it is noted, and read again by every run. Then it
    is back, or, once its folder is listed without it, gone."""
    run(photos)
    read_bytes = images.read_bytes

    def refuse(path: Path, **options: Any) -> bytes:
        if path.name in ("0.png", "new.png"):
            raise images_error()
        return read_bytes(path, **options)

    def images_error() -> Exception:
        return ImageError("file cannot be read: Input/output error", reason="unreadable")

    os.utime(photos / "a" / "0.png", ns=(1, 1))
    Image.new("RGB", (9, 9)).save(photos / "a" / "new.png")
    monkeypatch.setattr(images, "read_bytes", refuse)
    for _ in range(2):
        summary = run(photos)
        assert (summary.removed, summary.purged, summary.unchanged) == (0, 0, 9)
        assert summary.reasons == {"unreadable": 2}
        assert {Path(row.path).name for row in catalog.skipped()} == {"0.png", "new.png"}
        assert len(catalog.live_nums("colour")) == 10 and "0.png" in places(catalog)
    monkeypatch.undo()
    summary = run(photos)
    assert (summary.added, summary.unchanged, catalog.skipped()) == (1, 10, [])
    monkeypatch.setattr(images, "read_bytes", refuse)
    os.utime(photos / "a" / "0.png", ns=(2, 2))
    run(photos)
    (photos / "a" / "0.png").unlink()
    assert run(photos).removed == 1
    assert catalog.skipped() == [] and len(catalog.live_nums("colour")) == 10


def test_links_to_a_disk_that_is_not_mounted_empty_nothing(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, tmp_path: Path
) -> None:
    """A folder of links to the files of a disk, and a link to one of its folders. Without the disk, all
    stay and are noted: two files, one folder. A link that is deleted is gone."""
    disk = tmp_path / "disk"
    photos.rename(disk)
    links = tmp_path / "links"
    links.mkdir()
    (links / "one.png").symlink_to(disk / "a" / "0.png")
    (links / "two.png").symlink_to(disk / "a" / "1.png")
    (links / "b").symlink_to(disk / "b")
    (links / "never.txt").symlink_to(disk / "nothing")
    (links / "never").symlink_to(disk / "nothing")
    Image.new("RGB", (7, 7)).save(links / "here.png")
    assert run(links).added == 8
    disk.rename(tmp_path / "unmounted")
    for _ in range(2):
        summary = run(links)
        assert (summary.removed, summary.unchanged, summary.unavailable) == (0, 1, ())
        assert summary.reasons == {"unreadable": 2, "unreadable-folder": 1}
        assert len(catalog.live_nums("colour")) == 8
    (links / "two.png").unlink()
    assert run(links).removed == 1
    (tmp_path / "unmounted").rename(disk)
    summary = run(links)
    assert (summary.removed, summary.added, summary.unchanged) == (0, 0, 7)
    assert catalog.skipped() == []


def test_a_root_that_can_be_read_again_is_noted_no_more(
    run: Callable[..., Summary], photos: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(photos)

    def refuse(_: str) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        assert run(photos).unavailable == (str(photos),)
    assert [row.path for row in catalog.skipped()] == [str(photos)]
    assert run(photos).unchanged == 10
    assert catalog.skipped() == []


def test_a_broken_file_in_the_place_of_a_picture_takes_it_out(
    run: Callable[..., Summary], photos: Path, catalog: Catalog
) -> None:
    """The file can be read: the picture is not there any more."""
    run(photos)
    (photos / "a" / "0.png").write_bytes(b"no picture")
    summary = run(photos)
    assert (summary.reasons, summary.purged) == ({"not-a-picture": 1}, 1)
    assert len(catalog.live_nums("colour")) == 9


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
    broken = photos / "a" / "broken.png"
    broken.write_bytes(b"")
    told.clear()
    run(photos, on_progress=told.append)
    assert told[-1].reasons == {"empty": 1}


def test_snapshots_are_built_during_a_run_and_commit_whole_batches_only(
    run: Callable[..., Summary],
    photos: Path,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Built after each fourth vector, in another thread. The pointer waits while a batch is written:
    whatever a reader sees then is pictures with their vectors."""
    from clipkit import index
    from clipkit.embed import run as running

    begun, built, pointed = threading.Event(), threading.Event(), threading.Event()
    states: list[tuple[int, int]] = []

    def refresh(_: Any, encoder_id: str, *, point: Any, **__: Any) -> None:
        if threading.current_thread() is threading.main_thread() or pointed.is_set():
            return
        assert begun.wait(30)
        built.set()
        point(encoder_id, "000001", 1)
        with Catalog.open(catalog.folder) as reader:
            stats = reader.stats(encoder_id)
            states.append((stats.pictures, stats.vectors))
        pointed.set()

    add_vectors = catalog.add_vectors
    batches = 0

    def slow(*arguments: Any) -> None:
        """Pictures of the second batch are written; the builder wants to commit before its vectors."""
        nonlocal batches
        batches += 1
        if batches == 2:
            begun.set()
            assert built.wait(30) and not pointed.wait(0.2)
        add_vectors(*arguments)

    monkeypatch.setattr(running, "SNAPSHOT_EVERY", 4)
    monkeypatch.setattr(index, "refresh_snapshot", refresh)
    monkeypatch.setattr(catalog, "add_vectors", slow)
    assert run(photos, workers=1, batch_size=4).added == 10
    assert pointed.is_set()
    assert states[0] in ((8, 8), (10, 10))


def test_a_run_that_fails_in_a_batch_lets_no_snapshot_commit_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch fails between its pictures and their vectors, while a snapshot is waiting to be
    pointed to: the four pictures of the first batch are there, or none, and nothing else."""
    from clipkit import index
    from clipkit.embed import run as running

    failing = threading.Event()
    refused: list[str] = []

    def refresh(_: Any, encoder_id: str, *, point: Any, **__: Any) -> None:
        assert failing.wait(30)
        try:
            point(encoder_id, "000001", 1)
        except ClipkitError as error:
            refused.append(str(error))
            raise

    with (
        pytest.raises(ClipkitError, match="disk full"),
        Catalog.open(tmp_path / "other", write=True) as catalog,
    ):
        add_vectors = catalog.add_vectors
        batches = 0

        def fail(*arguments: Any) -> None:
            nonlocal batches
            batches += 1
            if batches == 2:
                failing.set()
                raise ClipkitError("disk full")
            add_vectors(*arguments)

        monkeypatch.setattr(running, "SNAPSHOT_EVERY", 4)
        monkeypatch.setattr(index, "refresh_snapshot", refresh)
        monkeypatch.setattr(catalog, "add_vectors", fail)
        index_folders(catalog, [photos], encoder=MeanColour(), workers=1, batch_size=4)  # type: ignore[arg-type]
    assert refused == ["the indexing run failed"]
    with Catalog.open(tmp_path / "other") as catalog:
        stats = catalog.stats("colour")
    assert stats.pictures == stats.vectors in (0, 4)
