"""The schema of catalog.sqlite, as numbered migrations, and the functions that their SQL calls."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable

from clipkit.catalog.rows import (
    date_key,
    fold_path,
    folded_tags,
    folder_of,
    folder_text,
    has_unspaced,
    name_of,
    spaced,
    split_paths,
)

APPLICATION_ID = 0x434C4B31  # "CLK1" in the file's header says whose SQLite file this is

# Entry i migrates a catalog from version i to i + 1. A released entry is never edited.
MIGRATIONS: tuple[str, ...] = (
    f"""
    PRAGMA application_id = {APPLICATION_ID};
    CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO meta VALUES ('changes', 0), ('writer', 0);
    CREATE TABLE roots (path BLOB PRIMARY KEY) WITHOUT ROWID;
    -- live, dated and the row in texts follow from places, taken_at, captions and tags
    CREATE TABLE pictures (
        num INTEGER PRIMARY KEY, image_id TEXT NOT NULL UNIQUE, live INTEGER NOT NULL DEFAULT 0,
        width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL,
        format TEXT NOT NULL, taken_at TEXT, dated TEXT, camera TEXT, added_at TEXT NOT NULL,
        tag_keys TEXT NOT NULL DEFAULT '', tags TEXT NOT NULL DEFAULT '',
        captions TEXT NOT NULL DEFAULT '');
    -- every fact that filters and counts need: 15 ms for 100,000, against 100 ms for the table
    CREATE INDEX pictures_facts ON pictures
        (dated, camera, format, width, height, tag_keys, bytes, added_at) WHERE live;
    CREATE INDEX pictures_dead ON pictures (num) WHERE NOT live;
    CREATE TABLE places (
        path BLOB PRIMARY KEY, num INTEGER NOT NULL REFERENCES pictures,
        size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, folded TEXT NOT NULL) WITHOUT ROWID;
    CREATE INDEX places_num ON places (num);
    CREATE TABLE skipped (
        path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        reason TEXT NOT NULL, message TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE encoders (
        id INTEGER PRIMARY KEY, encoder_id TEXT NOT NULL UNIQUE, spec TEXT NOT NULL,
        config TEXT NOT NULL, dim INTEGER NOT NULL);
    CREATE TABLE vectors (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, num INTEGER NOT NULL REFERENCES pictures,
        encoder INTEGER NOT NULL REFERENCES encoders, vector BLOB NOT NULL, UNIQUE (encoder, num));
    CREATE TABLE snapshots (
        encoder_id TEXT PRIMARY KEY, name TEXT NOT NULL, last_seq INTEGER NOT NULL) WITHOUT ROWID;
    CREATE VIRTUAL TABLE texts USING fts5(
        names, captions, tags, tokenize = 'unicode61 remove_diacritics 2');
    """,
    # A table of its own: the depth of a path must not count in the bm25 of the texts.
    """
    CREATE VIRTUAL TABLE folder_texts USING fts5(
        folders, tokenize = 'unicode61 remove_diacritics 2');
    INSERT INTO folder_texts (rowid, folders)
        SELECT num, folder_text(group_concat(hex(path))) FROM places GROUP BY num;
    """,
    # Captions and tags belong to places. What filters and lists compare is numbers, in narrow
    # indexes. Tables are filled before they get their indexes: sorting beats inserting.
    """
    -- live pictures, their bytes, and when a picture was last added (seconds since 1970)
    INSERT INTO meta SELECT 'epoch', 0 UNION ALL SELECT 'pictures', count(*) FROM pictures WHERE live
        UNION ALL SELECT 'bytes', coalesce(sum(bytes), 0) FROM pictures WHERE live
        UNION ALL SELECT 'added', coalesce(CAST(strftime('%s', max(added_at)) AS INTEGER), 0)
        FROM pictures WHERE live;
    ALTER TABLE encoders ADD COLUMN space_id TEXT;
    ALTER TABLE encoders ADD COLUMN owner INTEGER;  -- the encoder that has the vectors of the space
    UPDATE encoders SET owner = id;

    -- formats, cameras, and tags in their folded form
    CREATE TABLE labels (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
    INSERT OR IGNORE INTO labels (text) SELECT DISTINCT format FROM pictures;
    INSERT OR IGNORE INTO labels (text)
        SELECT DISTINCT camera FROM pictures WHERE camera IS NOT NULL;

    CREATE TABLE folders (
        id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE,  -- with a separator at its end
        folded TEXT NOT NULL, places INTEGER NOT NULL DEFAULT 0);
    INSERT INTO folders (path, folded, places)
        SELECT folder, fold_path(folder), total FROM (
            SELECT folder_of(path) AS folder, count(*) AS total FROM places GROUP BY 1);
    CREATE TABLE text_fingerprints (
        folder BLOB PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID;

    CREATE TABLE new_places (
        path BLOB PRIMARY KEY, num INTEGER NOT NULL REFERENCES pictures,
        size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        folder INTEGER NOT NULL, name TEXT NOT NULL,  -- folded
        captions TEXT NOT NULL DEFAULT '', tags TEXT NOT NULL DEFAULT '') WITHOUT ROWID;
    INSERT INTO new_places
        SELECT old.path, num, size, mtime_ns, folders.id, name_of(old.path), captions, tags
        FROM (SELECT path, num, size, mtime_ns, folder_of(path) AS folder FROM places) AS old
            CROSS JOIN folders ON folders.path = old.folder CROSS JOIN pictures USING (num)
        ORDER BY old.path;
    DROP TABLE places;
    ALTER TABLE new_places RENAME TO places;
    CREATE INDEX places_num ON places (num);
    CREATE TRIGGER place_added AFTER INSERT ON places BEGIN
        UPDATE folders SET places = places + 1 WHERE id = NEW.folder; END;
    CREATE TRIGGER place_removed AFTER DELETE ON places BEGIN
        UPDATE folders SET places = places - 1 WHERE id = OLD.folder; END;

    CREATE TABLE picture_tags (
        tag INTEGER NOT NULL, num INTEGER NOT NULL REFERENCES pictures,
        PRIMARY KEY (tag, num)) WITHOUT ROWID;
    CREATE TEMP TABLE tagged AS
        SELECT num, tag.value AS text FROM pictures, json_each(folded_tags(tags)) AS tag
        WHERE live AND tags != '';
    INSERT OR IGNORE INTO labels (text) SELECT DISTINCT text FROM tagged;
    INSERT OR IGNORE INTO picture_tags
        SELECT id, num FROM tagged JOIN labels USING (text) ORDER BY 1, 2;
    DROP TABLE tagged;
    CREATE INDEX picture_tags_num ON picture_tags (num);

    -- A row without a format is purged: what is left of it keeps its num from being used again.
    -- live, dated, newest and name follow from taken_at and the picture's places.
    CREATE TABLE new_pictures (
        num INTEGER PRIMARY KEY, image_id TEXT NOT NULL, live INTEGER NOT NULL DEFAULT 0,
        width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL,
        format INTEGER, camera INTEGER,  -- labels
        taken_at TEXT, added INTEGER NOT NULL,  -- seconds since 1970
        dated TEXT, newest INTEGER NOT NULL DEFAULT 0,  -- minus date_key(dated)
        name TEXT NOT NULL DEFAULT '',  -- of the file at its first place, folded
        version INTEGER NOT NULL DEFAULT 0);  -- the change counter when it last changed
    INSERT INTO new_pictures
        SELECT num, image_id, live, width, height, bytes,
            (SELECT id FROM labels WHERE text = format), (SELECT id FROM labels WHERE text = camera),
            taken_at, coalesce(CAST(strftime('%s', added_at) AS INTEGER), 0), dated, -date_key(dated),
            coalesce((SELECT name FROM places WHERE places.num = pictures.num
                      ORDER BY length(path), path LIMIT 1), ''), 0
        FROM pictures ORDER BY num;
    DROP TABLE pictures;
    ALTER TABLE new_pictures RENAME TO pictures;
    CREATE UNIQUE INDEX pictures_image_id ON pictures (image_id);
    CREATE INDEX pictures_dead ON pictures (num) WHERE NOT live;
    CREATE INDEX pictures_facts ON pictures
        (num, newest, camera, format, width, height) WHERE live;
    CREATE INDEX pictures_by_date ON pictures (newest, image_id) WHERE live;
    CREATE INDEX pictures_by_name ON pictures (name, image_id) WHERE live;
    CREATE INDEX pictures_version ON pictures (version) WHERE version > 0;

    -- scripts written without spaces, a character a word: a phrase finds them within a longer run
    INSERT OR REPLACE INTO texts (rowid, names, captions, tags)
        SELECT rowid, spaced(names), spaced(captions), spaced(tags) FROM texts
        WHERE has_unspaced(names || captions || tags);
    INSERT OR REPLACE INTO folder_texts (rowid, folders)
        SELECT rowid, spaced(folders) FROM folder_texts WHERE has_unspaced(folders);
    """,
)


def add_functions(db: sqlite3.Connection) -> None:
    """Give a connection the functions that the migrations call."""
    functions: dict[str, Callable[..., str | bytes | int]] = {
        "folder_text": lambda joined: folder_text(split_paths(joined)),
        "folder_of": folder_of,
        "name_of": name_of,
        "fold_path": fold_path,
        "folded_tags": lambda tags: json.dumps(folded_tags(tags)),
        "date_key": date_key,
        "spaced": spaced,
        "has_unspaced": has_unspaced,
    }
    for name, function in functions.items():
        db.create_function(name, 1, function, deterministic=True)
