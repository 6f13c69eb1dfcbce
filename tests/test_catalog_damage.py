"""Files that are damaged, another program's or of another version: told, migrated or made anew."""

# ruff: noqa: F811
from __future__ import annotations

import itertools
import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from catalogs import DIM, ENCODER, add, folder, image_id, reader, writer  # noqa: F401

from clipkit.catalog import Catalog, Filters, schema, store
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
    catalog.text_fingerprint("/p")
    catalog.snapshot(ENCODER)
    catalog.encoders()
    catalog.refused_pictures(ENCODER)
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


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_told_or_harmless(folder: Path, count: int) -> None:
    """In turn in each table and index, in a random page of it: clipkit's own error or none, for every
    way of reading and for a writer."""
    path = filled(folder)
    with Catalog.open(folder, write=True) as catalog:
        catalog.add_root("/p")
        catalog.set_text_fingerprint("/p", "of then")
        catalog.add_skipped("/p/bad.jpg", size=1, mtime_ns=1, reason="broken", message="it is")
        catalog.point_to_snapshot(ENCODER, name="000001", last_seq=1)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        try:
            pages = db.execute("SELECT name, pageno FROM dbstat").fetchall()
        except sqlite3.OperationalError:  # not compiled in
            total = db.execute("PRAGMA page_count").fetchone()[0]
            pages = [("any", number) for number in range(1, total + 1)]
    by_name: dict[str, list[int]] = {}
    for name, number in pages:
        by_name.setdefault(name, []).append(number)
    good, rng = path.read_bytes(), random.Random(3)
    for turn, name in zip(range(count), itertools.cycle(sorted(by_name)), strict=False):
        at = (rng.choice(by_name[name]) - 1) * 8192 + rng.randrange(8192)
        data = bytearray(good)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            with Catalog.open(folder) as catalog:
                everything(catalog)
            with Catalog.open(folder, write=True) as catalog:
                add(catalog, 1000 + turn, "/q/new.jpg", tags=["a"], captions=["new words"])
                catalog.set_text_fingerprint("/q", "of now")
                catalog.remove_places(["/p/cat_7.jpg"])
                catalog.purge()
                catalog.commit()
        except ClipkitError:
            pass
        for left in folder.glob("catalog.sqlite-*"):
            left.unlink()


# ---- migrations


def test_a_reader_of_an_index_that_is_being_made_finds_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each step of the migrations. Fails for a transaction each: the reader then wants to migrate,
    and is told that a process is writing."""
    told: list[str] = []

    def look(_: object) -> int:
        try:
            Catalog.open(folder).close()
        except ClipkitError as error:
            told.append(f"{type(error).__name__}: {error}")
        return 0

    def add_functions(db: sqlite3.Connection) -> None:
        schema.add_functions(db)
        db.create_function("look", 1, look)

    steps = tuple(f"SELECT look(1); {script}; SELECT look(1)" for script in store.MIGRATIONS)
    monkeypatch.setattr(store, "MIGRATIONS", steps)
    monkeypatch.setattr(store, "add_functions", add_functions)
    Catalog.open(folder, write=True).close()
    assert len(told) == 2 * len(steps)
    assert {line.partition(" at ")[0] for line in told} == {"InputError: no index"}
    Catalog.open(folder).close()


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


# ---- read-only media


@pytest.fixture
def read_only(folder: Path) -> Iterator[Callable[[], None]]:
    """Make the folder read-only, for root too: for the rest of the test root is another user."""
    home = Path(
        tempfile.mkdtemp(dir="/tmp")
    )  # outside pytest's folder, which only its owner may enter
    home.chmod(0o755)
    is_root = os.geteuid() == 0

    def protect() -> Path:
        shutil.copytree(folder, home / "index")
        for path in (home / "index").iterdir():
            path.chmod(0o444)
        (home / "index").chmod(0o555)
        if is_root:
            os.seteuid(65534)
        return home / "index"

    yield protect  # type: ignore[misc]
    if is_root:
        os.seteuid(0)
    (home / "index").chmod(0o755)
    shutil.rmtree(home)


@pytest.mark.skipif(os.name == "nt", reason="POSIX rights")
@pytest.mark.parametrize("leftovers", [False, True])
def test_an_index_on_read_only_media_is_searched(
    folder: Path, read_only: Callable[[], Path], leftovers: bool
) -> None:
    """Freshly copied, so without the -wal and -shm files that SQLite could not create there, and with
    empty ones."""
    with Catalog.open(folder, write=True) as catalog:
        catalog.register_encoder(ENCODER, spec="s", config_json="{}", dim=DIM)
        add(catalog, 1, "/p/cat.jpg", thumbnail=b"small")
    for path in folder.iterdir():
        if path.suffix != ".sqlite":
            path.unlink()
    if leftovers:
        (folder / "catalog.sqlite-wal").touch()
    protected = read_only()
    with Catalog.open(protected) as catalog:
        everything(catalog)
        assert list(catalog.phrase("cat").nums) == [1]
        assert catalog.thumbnail(image_id(1)) == b"small"
        catalog.put_thumbnail(image_id(2), b"dropped")
        assert catalog.thumbnail(image_id(2)) is None
    with pytest.raises(InputError, match="cannot write an index at"):
        Catalog.open(protected, write=True)


@pytest.mark.skipif(os.name == "nt", reason="POSIX rights")
def test_changes_that_read_only_media_cannot_collect_are_an_error(
    folder: Path, read_only: Callable[[], Path]
) -> None:
    """What a killed writer left in the -wal file would be missing, silently."""
    filled(folder)
    (folder / "catalog.sqlite-wal").write_bytes(b"x" * 5000)
    (folder / "catalog.sqlite-shm").unlink(missing_ok=True)
    protected = read_only()
    with pytest.raises(
        ClipkitError, match=r"read-only media and has uncollected changes in .*-wal"
    ):
        Catalog.open(protected)


@pytest.mark.skipif(os.name == "nt", reason="POSIX rights")
def test_an_older_index_on_read_only_media_says_so(
    folder: Path, read_only: Callable[[], Path]
) -> None:
    filled(folder)
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    protected = read_only()
    with pytest.raises(InputError, match="is of an older clipkit and on read-only media; copy"):
        Catalog.open(protected)
