"""Several models in one index: filled side by side, listed, switched and dropped."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_runs import altered

from clipkit import Library, checkpoint
from clipkit.catalog import Catalog
from clipkit.errors import CatalogBusy, EncoderMismatch
from clipkit.index import load_snapshot, refresh_snapshot
from clipkit.towers import DualEncoder

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def photos(tmp_path: Path, noise_picture: Callable[..., Image.Image]) -> Path:
    """Four pictures in each of two folders."""
    for number in range(8):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise_picture(seed=number).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def a(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> str:
    return str(shutil.copytree(tiny_checkpoint("vit"), tmp_path / "a"))


@pytest.fixture
def b(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> str:
    return str(shutil.copytree(tiny_checkpoint("vit", seed=1), tmp_path / "b"))


@pytest.fixture
def texts(a: str, tmp_path: Path) -> str:
    """`a` with another text tower over its image tower."""

    def change(tensors: dict[str, Any]) -> None:
        projection = tensors["text_projection"]
        tensors["text_projection"] = projection.flip(1).contiguous()

    return altered(Path(a), tmp_path / "texts", change)


@pytest.fixture
def index(tmp_path: Path, photos: Path, a: str) -> Path:
    """All pictures by `a`."""
    with Library.open(tmp_path / "index", model=a, precision="float32") as library:
        library.add(photos)
    return tmp_path / "index"


def fill(index: Path, model: str, *folders: Path, stop: bool = False) -> Any:
    """Index with a model; with `stop` only until some pictures have its vectors."""
    ended = threading.Event()

    def on_progress(progress: Any) -> None:
        if stop and progress.done:
            ended.set()

    with Library.open(index, model=model, precision="float32") as library:
        return library.add(*folders, on_progress=on_progress, stop=ended, batch_size=2)


def scores(library: Library, words: str = "a red cake") -> list[tuple[str, float | None]]:
    return [(hit.picture.path, hit.score) for hit in library.search(words, k=8)]


def states(index: Path) -> dict[str, tuple[int, bool]]:
    """By the name of the model's folder: its vectors, and whether it answers."""
    with Library.open(index) as library:
        return {Path(m.spec).name: (m.vectors, m.active) for m in library.models()}


# ---- beside


def test_the_first_model_answers_until_the_second_is_complete(
    index: Path, photos: Path, b: str
) -> None:
    partly = fill(index, b, photos, stop=True)
    vectors = 8 - partly.without_vector
    assert 0 < vectors < 8 and partly.model_before is None
    assert states(index) == {"a": (8, True), "b": (vectors, False)}
    done = fill(index, b, photos)
    assert (done.reencoded, done.without_vector) == (8 - vectors, 0)
    assert states(index) == {"a": (8, False), "b": (8, True)}


def test_a_model_with_the_same_picture_side_needs_no_vectors(
    index: Path, photos: Path, a: str, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails for vectors kept by encoder_id: the picture tower must not be called at all."""
    with Library.open(index, precision="float32") as library:
        before = scores(library)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(DualEncoder, "encode_images", refuse)
    monkeypatch.setattr(DualEncoder, "image_features", refuse)
    done = fill(index, texts, photos)
    assert (done.unchanged, done.embedded, done.model_before) == (8, 0, a)
    assert states(index) == {"a": (8, False), "texts": (8, True)}
    with Library.open(index, precision="float32") as library:
        after = scores(library)
        assert len(after) == 8 and after != before
        assert all(model.shared_with for model in library.models())
        library.use(a)
        assert scores(library) == before


def test_any_other_model_is_refused_by_both_names(index: Path, a: str, b: str) -> None:
    with Library.open(index, model=b) as library, pytest.raises(EncoderMismatch) as caught:
        library.search("red")
    assert a in str(caught.value) and b in str(caught.value)


# ---- use


def test_use_refuses_a_model_that_would_hide_pictures(
    index: Path, photos: Path, b: str, clipkit: Run
) -> None:
    left = fill(index, b, photos, stop=True).without_vector
    code, out, err = clipkit("use", b, "--index", index)
    assert (code, out) == (2, "")
    assert err.startswith(f"clipkit: {left} of 8 pictures have no vector of {b} yet")
    command = err.rstrip().rpartition(": ")[2]
    assert command == f"clipkit index {photos} --model {b}"
    assert states(index)["a"] == (8, True)
    assert clipkit(*command.split()[1:], "--index", index, "--precision", "float32")[0] == 0
    assert states(index) == {"a": (8, False), "b": (8, True)}


def test_use_by_spec_path_and_beginning_of_the_id(
    index: Path, photos: Path, a: str, b: str, clipkit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(index, b, photos)
    monkeypatch.chdir(Path(a).parent)
    id_of_b = checkpoint.identify(b)
    assert id_of_b is not None
    for name, expected in ((a, "a"), (id_of_b.encoder_id[:6], "b"), ("a", "a"), ("./b", "b")):
        code, out, _ = clipkit("use", name, "--index", index)
        assert code == 0 and out.startswith("searches now use ")
        assert [key for key, (_, active) in states(index).items() if active] == [expected]
    assert clipkit("use", b, "--index", index)[1] == f"searches use {b} already\n"
    code, out, _ = clipkit("use", a, "--index", index, "--json")
    assert json.loads(out)["before"] == b and json.loads(out)["spec"] == a
    moved = Path(a).rename(Path(a).with_name("moved"))
    code, _, err = clipkit("use", a, "--index", index)
    assert code == 2 and f"{a} is not there any more" in err
    assert states(index)["b"] == (8, False), "a stays active: it is the one that was chosen"
    moved.rename(a)


def test_wrong_names_are_answered_with_near_ones(
    index: Path, b: str, a: str, clipkit: Run, tmp_path: Path
) -> None:
    for command in (("use",), ("drop", "--yes")):
        code, _, err = clipkit(*command, f"{a}a", "--index", index)
        assert code == 2 and f"no model '{a}a'; did you mean '{a}'?" in err
        code, _, err = clipkit(*command, b, "--index", index)
        assert code == 2 and "has no model" in err
    code, _, err = clipkit("use", a, "--index", tmp_path / "none")
    assert code == 2 and "none" in err


def test_a_model_that_was_trained_further_in_its_place_is_not_used(
    index: Path, photos: Path, a: str, b: str, clipkit: Run
) -> None:
    fill(index, b, photos)
    shutil.copyfile(Path(b) / checkpoint.WEIGHTS_FILE, Path(a) / checkpoint.WEIGHTS_FILE)
    code, _, err = clipkit("use", _id(index, "a"), "--index", index)
    assert code == 2 and f"{a} has changed since it encoded the pictures" in err


def _id(index: Path, name: str) -> str:
    with Library.open(index) as library:
        return next(m.encoder_id for m in library.models() if Path(m.spec).name == name)


def test_use_takes_a_new_model_of_a_known_space(index: Path, texts: str, clipkit: Run) -> None:
    code, out, _ = clipkit("use", texts, "--index", index)
    assert code == 0 and out.startswith(f"searches now use {texts} instead of ")
    assert states(index) == {"a": (8, False), "texts": (8, True)}


def test_a_model_with_the_vectors_of_the_active_one_may_answer_before_all_have_one(
    index: Path, photos: Path, texts: str
) -> None:
    """A picture without a vector is found by neither of the models, so the switch loses nothing."""
    with Catalog.open(index, write=True) as catalog:
        added = catalog.add_picture(
            image_id="f" * 32, width=8, height=8, format="PNG", bytes=9,
            taken_at=None, camera=None, thumbnail=b"",
        )  # fmt: skip
        catalog.add_place(added, str(photos / "late.png"), size=9, mtime_ns=1)
        catalog.commit()
    with Library.open(index) as library:
        library.use(texts)
    assert states(index) == {"a": (8, False), "texts": (8, True)}


def test_equal_vectors_of_an_earlier_version_are_joined_at_a_switch(
    index: Path, texts: str, clipkit: Run
) -> None:
    """It kept them for each model, here three of eight. Fails for a switch that goes by the space alone:
    five pictures would be lost."""
    known = checkpoint.identify(texts)
    assert known is not None
    with Catalog.open(index, write=True) as catalog:
        catalog.register_encoder(known.encoder_id, spec=texts, config_json="{}", dim=16)
        stored = catalog.vectors(_id(index, "a"))
        catalog.add_vectors(known.encoder_id, stored.nums[:3], stored.vectors[:3])
        catalog.commit()
    with closing(sqlite3.connect(index / "catalog.sqlite")) as db:
        db.execute("UPDATE encoders SET space_id = NULL")
        db.commit()
    assert states(index) == {"a": (8, True), "texts": (3, False)}
    assert clipkit("use", texts, "--index", index)[0] == 0
    assert states(index) == {"a": (8, False), "texts": (8, True)}
    with Catalog.open(index) as catalog:
        joined = catalog.vectors(known.encoder_id)
    assert sorted(joined.nums.tolist()) == sorted(stored.nums.tolist())
    assert {v.tobytes() for v in joined.vectors} == {v.tobytes() for v in stored.vectors}


def test_a_switch_waits_for_no_writer(index: Path, photos: Path, a: str, b: str) -> None:
    fill(index, b, photos)
    with Catalog.open(index, write=True), Library.open(index) as library:
        with pytest.raises(CatalogBusy):
            library.use(a)
        assert states(index)["b"] == (8, True)


# ---- following


def test_an_open_library_follows_a_switch_by_another_process(
    index: Path, photos: Path, a: str, b: str
) -> None:
    """Fails for a library that keeps the model it was opened with."""
    fill(index, b, photos)
    with Library.open(index, precision="float32") as library:
        by_b = scores(library)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "app.cli", "use", a, "--index", str(index)]
        subprocess.run(command, check=True, env=environment, capture_output=True, cwd=ROOT)
        by_a = scores(library)
        assert library.encoder.spec == a and by_a != by_b
    with Library.open(index, model=b, precision="float32") as library:
        assert scores(library) == by_b, "a named model stays"


def test_searches_during_switches_are_of_one_model_each(
    index: Path, photos: Path, a: str, b: str
) -> None:
    """Four threads search while the model changes twenty times: each answer is exactly a's or b's."""
    fill(index, b, photos)
    expected = {}
    for spec in (a, b):
        with Library.open(index, model=spec, precision="float32") as library:
            expected[spec] = np.array([score for _, score in scores(library)])
    ended, wrong = threading.Event(), []
    with Library.open(index, precision="float32") as library:

        def search() -> None:
            while not ended.is_set():
                got = np.array([score for _, score in scores(library)])
                if not any(np.allclose(got, one, atol=1e-5) for one in expected.values()):
                    wrong.append(got)

        threads = [threading.Thread(target=search) for _ in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(20):
            library.use((a, b)[turn % 2])
        ended.set()
        for thread in threads:
            thread.join()
    assert not wrong


# ---- drop


def test_drop_removes_the_vectors_and_refuses_the_active_model(
    index: Path, photos: Path, a: str, b: str, clipkit: Run
) -> None:
    fill(index, b, photos)
    code, _, err = clipkit("drop", b, "--index", index, "--yes")
    assert code == 2 and f"{b} answers the searches" in err and "clipkit use MODEL" in err
    code, out, _ = clipkit("drop", a, "--index", index, "--yes", "--json")
    assert code == 0 and json.loads(out)["removed"] == 8
    assert states(index) == {"b": (8, True)}
    assert Path(a).is_dir(), "the model itself stays"
    again = fill(index, a, photos)
    assert again.reencoded == 8


def test_drop_asks(
    index: Path, photos: Path, a: str, b: str, clipkit: Run, monkeypatch: Any
) -> None:
    fill(index, b, photos)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: (_ for _ in ()).throw(SystemExit(1)))
    assert clipkit("drop", a, "--index", index)[0] == 1
    assert states(index)["a"] == (8, False)


def test_shared_vectors_outlive_either_model(
    index: Path, photos: Path, a: str, texts: str, clipkit: Run
) -> None:
    """Nor is their snapshot lost with the name of the model that had them first."""
    fill(index, texts, photos)
    with Catalog.open(index, write=True) as catalog:
        refresh_snapshot(catalog, catalog.encoders()[0].encoder_id, force=True)
    with Library.open(index, precision="float32") as library:
        before = scores(library)
    code, out, _ = clipkit("drop", a, "--index", index, "--yes")
    assert code == 0 and f"its vectors stay: they are also those of {texts}" in out
    assert states(index) == {"texts": (8, True)}
    with Library.open(index, precision="float32") as library:
        assert scores(library) == before
    with Catalog.open(index) as catalog:
        (left,) = (row.encoder_id for row in catalog.encoders())
        assert load_snapshot(catalog, left, catalog.snapshot(left)) is not None


def test_a_model_in_the_index_folder_goes_with_its_vectors(
    index: Path, photos: Path, a: str, b: str
) -> None:
    own = shutil.copytree(b, index / "models" / "taught")
    fill(index, str(own), photos)
    with Library.open(index) as library:
        library.use(a)
        assert library.drop(str(own)) == 8
    assert not own.exists() and Path(b).is_dir()


# ---- status


def test_status_lists_what_each_model_has(
    index: Path, photos: Path, b: str, texts: str, clipkit: Run
) -> None:
    """16 dimensions of two bytes: 32 B a picture."""
    left = fill(index, b, photos, stop=True).without_vector
    status = clipkit("status", "--index", index)[1].splitlines()
    lines = [line for line in status if line.startswith("model ")]
    assert lines[0].endswith("8 vectors, 256 B, answers searches")
    assert lines[1].endswith(f"{8 - left} of 8 vectors, {32 * (8 - left)} B")
    clipkit("use", texts, "--index", index)
    shutil.rmtree(b)
    rows = json.loads(clipkit("status", "--index", index, "--json")[1])["models"]
    assert [row["answers"] for row in rows] == [False, False, True]
    assert [row["missing"] for row in rows] == [0, left, 0]
    assert [row["gone"] for row in rows] == [False, True, False]
    assert rows[0]["space_id"] == rows[2]["space_id"] and rows[0]["shared_with"] == [texts]
