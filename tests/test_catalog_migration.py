"""Catalogs of schema 1 and 2, written as clipkit wrote them, opened by the present one."""

# ruff: noqa: F811
from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from catalogs import ENCODER, folder, found, image_id, number_of, vector_of  # noqa: F401

from clipkit.catalog import Catalog, Filters, schema
from clipkit.catalog.rows import BREAK, fold, fold_path, folder_text, name_words, split_paths

SHARED = (os.fsdecode(b"/p/inlineSkate/1.jpg"), os.fsdecode(b"/q/caf\xe9 bar/Zz.jpg"))


def tag_keys(tags: str) -> str:
    return "".join(f"\n{' '.join(fold(tag).split())}\n" for tag in tags.split("\n"))


def old_catalog(folder: Path, version: int) -> Path:
    """Five pictures: in two folders, one of whose names is not UTF-8; with a date, camera and tags;
    with Japanese names and captions; one that is dead; and one with a zero vector."""
    folder.mkdir()
    db = sqlite3.connect(folder / "catalog.sqlite", isolation_level=None)
    db.create_function("folder_text", 1, lambda joined: folder_text(split_paths(joined)))
    db.execute("PRAGMA page_size = 8192")
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(schema.MIGRATIONS[0])
    db.execute("INSERT INTO roots VALUES (?)", (b"/p/",))
    db.execute("INSERT INTO encoders VALUES (1, ?, 'builtin', '{}', 4)", (ENCODER,))
    db.execute("UPDATE meta SET value = 7 WHERE key = 'changes'")
    pictures = [
        (SHARED, "JPEG", None, None, "a skater\nin the park", "sport"),
        (("/p/2.png",), "PNG", "2023-05-01T12:30:00", "Canon EOS", "", "Sea\nNew York"),
        (("/p/東京タワー.jpg",), "JPEG", None, "Canon EOS", "桜の花が咲く", "日本"),
        ((), "JPEG", "2001-01-01T00:00:00", "gone", "gone", "gone"),
        (("/p/zero.jpg",), "WEBP", None, None, "", ""),
    ]
    for num, (paths, kind, taken_at, camera, captions, tags) in enumerate(pictures, 1):
        db.execute(
            "INSERT INTO pictures VALUES (?, ?, ?, 640, 480, 1000, ?, ?, ?, ?,"
            " '2024-02-03T04:05:06+00:00', ?, ?, ?)",
            (num, image_id(num), bool(paths), kind, taken_at, taken_at or "2020-06-15T12:00:00",
             camera, tag_keys(tags), tags, captions),
        )  # fmt: skip
        for path in paths:
            row = (os.fsencode(path), num, 1000, 5, fold_path(path))
            db.execute("INSERT INTO places VALUES (?, ?, ?, ?, ?)", row)
        if paths:
            texts = [t.replace("\n", BREAK) for t in (name_words(paths), captions, tags)]
            db.execute(
                "INSERT INTO texts (rowid, names, captions, tags) VALUES (?, ?, ?, ?)",
                (num, *texts),
            )
        vector = np.zeros(4) if num == 5 else vector_of(num)[0]
        sql = "INSERT INTO vectors (num, encoder, vector) VALUES (?, 1, ?)"
        db.execute(sql, (num, vector.astype("<f2").tobytes()))
    db.execute("INSERT INTO skipped VALUES (?, 1, 2, 'empty', 'It is empty.')", (b"/p/bad.jpg",))
    if version == 2:
        db.executescript(schema.MIGRATIONS[1])
    db.execute(f"PRAGMA user_version = {version}")
    db.close()
    return folder


@pytest.fixture(params=[1, 2])
def migrated(folder: Path, request: pytest.FixtureRequest) -> Catalog:
    """Opened for reading: that has it migrated."""
    with Catalog.open(old_catalog(folder, request.param)) as catalog:
        yield catalog  # type: ignore[misc]


def test_an_older_catalog_has_all_it_had(migrated: Catalog) -> None:
    rows = migrated.rows(range(9))
    assert list(rows) == [1, 2, 3, 5]
    assert rows[1].places == SHARED
    assert rows[1].captions == ("a skater", "in the park")
    second = rows[2]
    assert (second.path, second.width, second.format) == ("/p/2.png", 640, "PNG")
    assert (second.taken_at, second.camera) == ("2023-05-01T12:30:00", "Canon EOS")
    assert (second.tags, second.added_at) == (("Sea", "New York"), "2024-02-03T04:05:06+00:00")
    assert rows[3].dated == "2020-06-15T12:00:00"
    stats = migrated.stats(ENCODER)
    assert (stats.pictures, stats.places, stats.skipped, stats.bytes) == (4, 5, 1, 4000)
    assert (stats.roots, stats.newest) == (("/p",), "2024-02-03T04:05:06+00:00")
    assert migrated.change_counter() == 7
    paths = [path for path, _ in migrated.known_files("/")]
    assert paths == sorted(paths, key=os.fsencode) and len(paths) == 6
    assert migrated.folders()[:1] == [("/p", 4)]
    assert migrated.text_fingerprint("/p") is None  # so that the next run reads all texts again


def test_an_older_catalog_is_searched_as_a_new_one(migrated: Catalog) -> None:
    """The folder names, which schema 1 did not know, included."""
    for phrase in ("skate", "bar", "inlineskate", "skater", "sport"):
        assert found(migrated, phrase) == [1], phrase
    for phrase in ("東京", "タワー", "花", "日本"):
        assert found(migrated, phrase) == [3], phrase
    assert found(migrated, "gone") == []

    def match(**fields: object) -> list[int]:
        return list(migrated.matching(Filters(**fields)))  # type: ignore[arg-type]

    assert match(after="2023") == [2]
    assert match(before="2023") == [1, 3, 5]
    assert match(cameras=("canon",)) == match(camera="Canon EOS") == [2, 3]
    assert match(formats=("webp",)) == [5]
    assert match(tags=("new york",)) == match(tags=("sea",)) == [2]
    assert match(folders=("caf? bar",)) == match(folders=("/q",)) == [1]
    assert match(paths=("タワ",)) == [3]
    assert migrated.listed("date", limit=9)[0][0] == 2
    assert migrated.listed("name", limit=9)[0] == [2, 5, 1, 3]  # 2.png, zero, zz, 東京タワー
    assert migrated.facets().tags[0] == ("new york", 1)


def test_an_older_catalogs_zero_vector_is_left_out(migrated: Catalog) -> None:
    stored = migrated.vectors(ENCODER)
    assert stored.nums.tolist() == [1, 2, 3] and stored.last_seq == 5
    assert [number_of(vector) for vector in stored.vectors] == [1, 2, 3]
    (chunk,) = migrated.vector_chunks(ENCODER)
    assert chunk.nums.tolist() == [1, 2, 3] and chunk.last_seq == 5


def test_an_older_catalog_is_written_on(folder: Path) -> None:
    """Its dead picture comes back under its num; its encoder's space is told later."""
    with Catalog.open(old_catalog(folder, 2), write=True) as catalog:
        assert catalog.has_picture(image_id(4)) == 4
        catalog.add_place(4, "/p/back.jpg", size=1, mtime_ns=1, captions=["is back"])
        catalog.remove_places(["/p/zero.jpg"])
        catalog.register_encoder(ENCODER, spec="builtin", config_json="{}", dim=4, space_id="s")
    with Catalog.open(folder) as catalog:
        assert list(catalog.matching(Filters())) == [1, 2, 3, 4]
        assert found(catalog, "is back") == [4]
        assert catalog.encoders()[0].space_id == "s"
        assert catalog.places_below("/p") == 4
    with sqlite3.connect(folder / "catalog.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    db.close()
