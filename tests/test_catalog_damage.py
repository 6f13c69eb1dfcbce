"""Files that are damaged, another program's or of another version: told, migrated or made anew."""

# ruff: noqa: F811
from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest
from catalogs import DIM, ENCODER, add, folder, image_id, reader, writer  # noqa: F401

from clipkit.catalog import Catalog, Filters, store
from clipkit.errors import ClipkitError, IndexDamaged, InputError


def everything(catalog: Catalog) -> None:
    """Call every way of reading."""
    nums = catalog.matching(Filters())
    catalog.rows(nums)
    catalog.matching(Filters(after="1999", paths=("a",), cameras=("a",), tags=("a",)))
    catalog.vectors(ENCODER)
    catalog.live_nums(ENCODER)
    list(catalog.known_files("/", encoder_id=ENCODER))
    catalog.phrase("cat")
    catalog.having([["cat", "p"]])
    catalog.stats(ENCODER)
    catalog.folders()
    catalog.facets()
    catalog.listed("date", limit=10)
    catalog.listed("name", limit=10)
    for _ in catalog.vector_chunks(ENCODER):
        pass
    catalog.active_encoder()
    for root in catalog.roots():
        catalog.places_below(root)
    catalog.skipped()


# ---- thumbnails


def test_thumbnails_are_derived(writer: Catalog, reader: Catalog) -> None:
    add(writer, 1, "/p/1", thumbnail=b"small")
    assert writer.thumbnail(image_id(1)) == b"small"
    writer.commit()
    assert reader.thumbnail(image_id(1)) == b"small"
    assert reader.thumbnail(image_id(2)) is None
    reader.put_thumbnail(image_id(2), b"made later")
    assert writer.thumbnail(image_id(2)) == b"made later"


@pytest.mark.parametrize("damage", ["deleted", "random", "truncated", "empty", "foreign"])
def test_a_lost_or_damaged_thumbnail_file_is_made_anew(folder: Path, damage: str) -> None:
    with Catalog.open(folder, write=True) as catalog:
        catalog.put_thumbnail(image_id(1), b"x" * 50_000)
    path = folder / "thumbnails.sqlite"
    if damage == "deleted":
        path.unlink()
    elif damage == "random":
        path.write_bytes(random.Random(0).randbytes(20_000))
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:9000])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE thumbnails (other TEXT)")
        db.close()
    with Catalog.open(folder) as catalog:
        assert catalog.thumbnail(image_id(1)) is None
        catalog.put_thumbnail(image_id(1), b"again")
        assert catalog.thumbnail(image_id(1)) == b"again"


# ---- what is not an index, or not a whole one


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no index at .*; create one with: clipkit index FOLDER"):
        Catalog.open(tmp_path / "nowhere")
    (tmp_path / "catalog.sqlite").write_bytes(b"")  # a first writer that died at once
    with pytest.raises(InputError, match="no index at"):
        Catalog.open(tmp_path)
    Catalog.open(tmp_path, write=True).close()
    Catalog.open(tmp_path).close()


@pytest.mark.parametrize("write", [False, True])
def test_a_dataset_is_no_index(tmp_path: Path, write: bool) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="is a dataset, not an index"):
        Catalog.open(tmp_path, write=write)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("write", [False, True])
def test_another_programs_file_is_left_alone(tmp_path: Path, write: bool) -> None:
    with sqlite3.connect(tmp_path / "catalog.sqlite") as db:
        db.execute("CREATE TABLE theirs (a)")
    db.close()
    before = (tmp_path / "catalog.sqlite").read_bytes()
    with pytest.raises(InputError, match="is another program's SQLite file"):
        Catalog.open(tmp_path, write=write)
    assert (tmp_path / "catalog.sqlite").read_bytes() == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write an index at"):
        Catalog.open(tmp_path / "file" / "index", write=True)


def filled(folder: Path) -> Path:
    with Catalog.open(folder, write=True) as catalog:
        catalog.register_encoder(ENCODER, spec="s", config_json="{}", dim=DIM)
        for number in range(300):
            add(catalog, number, f"/p/cat_{number}.jpg", captions=["words " * 20], tags=["a"])
    return folder / "catalog.sqlite"


@pytest.mark.parametrize("write", [False, True])
def test_a_file_of_random_bytes_is_damaged(folder: Path, write: bool) -> None:
    path = filled(folder)
    path.write_bytes(random.Random(1).randbytes(50_000))
    with pytest.raises(IndexDamaged, match=r"catalog\.sqlite is damaged .* clipkit index FOLDER"):
        Catalog.open(folder, write=write)


def test_a_truncated_file_is_damaged(folder: Path) -> None:
    path = filled(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(IndexDamaged, match=r"catalog\.sqlite is damaged"):
        Catalog.open(folder)


def test_damage_within_is_told_or_harmless(folder: Path) -> None:
    """Overwriting 4,000 bytes anywhere gives clipkit's own error or none at all."""
    path = filled(folder)
    good = path.read_bytes()
    rng = random.Random(2)
    told = 0
    for _ in range(40):
        at = rng.randrange(len(good) - 4000)
        path.write_bytes(good[:at] + rng.randbytes(4000) + good[at + 4000 :])
        try:
            with Catalog.open(folder) as catalog:
                everything(catalog)
        except ClipkitError:
            told += 1
    assert told > 20


# ---- migrations


def version_of(folder: Path) -> int:
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
    db.close()
    return version


def test_an_older_catalog_is_migrated_in_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 3 needs what version 2 made; a reader that comes first has it done as well."""
    filled(folder)
    assert version_of(folder) == len(store.MIGRATIONS)
    later = (
        "CREATE TABLE moods (num INTEGER, mood TEXT)",
        "INSERT INTO moods SELECT num, 'calm' FROM pictures; ALTER TABLE moods RENAME TO feelings",
    )
    monkeypatch.setattr(store, "MIGRATIONS", (*store.MIGRATIONS, *later))
    with Catalog.open(folder) as reader:
        assert reader.stats(ENCODER).pictures == 300
    assert version_of(folder) == len(store.MIGRATIONS)
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        assert db.execute("SELECT count(*) FROM feelings").fetchone() == (300,)
    db.close()


def test_a_migration_that_fails_leaves_the_old_catalog(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(folder)
    version = version_of(folder)
    broken = "CREATE TABLE half (a); INSERT INTO missing VALUES (1)"
    with monkeypatch.context() as patch:
        patch.setattr(store, "MIGRATIONS", (*store.MIGRATIONS, broken))
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            Catalog.open(folder, write=True)
    assert version_of(folder) == version
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall() == []
    db.close()
    with Catalog.open(folder, write=True) as catalog:  # the lock is free again
        assert catalog.stats(ENCODER).pictures == 300


@pytest.mark.parametrize("write", [False, True])
def test_a_newer_catalog_is_refused_naming_both_versions(folder: Path, write: bool) -> None:
    filled(folder)
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    known = len(store.MIGRATIONS)
    with pytest.raises(InputError, match=rf"version 99; this clipkit knows versions up to {known}"):
        Catalog.open(folder, write=write)
