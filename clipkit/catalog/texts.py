"""Phrases and words in the FTS5 tables, and what `settle` writes there and to all that is derived."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np

from clipkit.arrays import Int64
from clipkit.catalog.columns import State
from clipkit.catalog.rows import (
    BREAK,
    Phrase,
    clean,
    date_key,
    folded_tags,
    folder_text,
    lines,
    local_time,
    name_words,
    spaced,
)
from clipkit.catalog.store import Connection, parsed
from clipkit.picture_set import PictureSet

MOST_RANKED = 20_000  # pictures with a phrase; of more, bm25 tells none apart and costs seconds


def settle(db: Connection, nums: Iterable[int], *, new: set[int]) -> None:
    """Update the derived values of the pictures `nums`; those in `new` were never committed.

    This is one pass in the order of nums, since FTS5 flushes a segment whenever rowids go backwards.
    """
    version = db.execute("SELECT value + 1 FROM meta WHERE key = 'changes'").fetchone()[0]
    more_pictures = more_bytes = 0
    for num in sorted(nums):
        was_live, taken_at, size = db.execute(
            "SELECT live, taken_at, bytes FROM pictures WHERE num = ?", (num,)
        ).fetchone()
        places = db.execute(
            "SELECT path, name, mtime_ns, captions, tags FROM places WHERE num = ? ORDER BY path",
            (num,),
        ).fetchall()
        db.execute("DELETE FROM picture_tags WHERE num = ?", (num,))
        dated, name = taken_at, ""
        if places:
            dated = taken_at or local_time(min(mtime_ns for _, _, mtime_ns, _, _ in places))
            _, _, name = min((len(path), path, name) for path, name, *_ in places)
            captions, tags = union(places)
            paths = [os.fsdecode(path) for path, *_ in places]
            words = (name_words(paths), captions, tags)
            db.execute(
                "INSERT OR REPLACE INTO texts (rowid, names, captions, tags) VALUES (?, ?, ?, ?)",
                (num, *(spaced(text.replace("\n", BREAK)) for text in words)),
            )
            sql = "INSERT OR REPLACE INTO folder_texts (rowid, folders) VALUES (?, ?)"
            db.execute(sql, (num, spaced(folder_text(paths))))
            rows = [(label(db, tag), num) for tag in folded_tags(tags)]
            db.executemany("INSERT INTO picture_tags VALUES (?, ?)", rows)
        else:
            db.execute("DELETE FROM texts WHERE rowid = ?", (num,))
            db.execute("DELETE FROM folder_texts WHERE rowid = ?", (num,))
        db.execute(
            "UPDATE pictures SET live = ?, dated = ?, newest = ?, name = ?, version = ? WHERE num = ?",
            (bool(places), dated, -date_key(dated), name, version, num),
        )
        more_pictures += bool(places) - was_live
        more_bytes += size * (bool(places) - was_live)
        if places and not was_live and num not in new:
            # live again: a snapshot made meanwhile left it out, so its vectors count as new
            db.execute(
                "INSERT OR REPLACE INTO vectors (num, encoder, vector)"
                " SELECT num, encoder, vector FROM vectors WHERE num = ?",
                (num,),
            )
    sql = "UPDATE meta SET value = value + ? WHERE key = ?"
    db.executemany(sql, [(more_pictures, "pictures"), (more_bytes, "bytes")])


def union(places: Iterable[tuple[object, ...]]) -> tuple[str, str]:
    """Return the distinct captions and the distinct tags of places, whose rows end in both, a line
    each."""
    captions: dict[str, None] = {}
    tags: dict[str, None] = {}
    for *_, some_captions, some_tags in places:
        captions |= dict.fromkeys(str(some_captions).split("\n"))
        tags |= dict.fromkeys(str(some_tags).split("\n"))
    return lines(captions), lines(tags)


def label(db: Connection, text: str) -> int:
    """Return the id of a format, camera or folded tag; a new one is added."""
    row = db.execute("SELECT id FROM labels WHERE text = ?", (text,)).fetchone()
    if row is None:
        return int(db.execute("INSERT INTO labels (text) VALUES (?)", (text,)).lastrowid or 0)
    return int(row[0])


def phrase(state: State, text: str) -> Phrase:
    """See Catalog.phrase."""
    match = _quoted(text) + ("*" if text.rstrip().endswith("*") else "")
    nums = _matches(state, match)
    if not 0 < len(nums) <= MOST_RANKED:
        return Phrase(nums, None if len(nums) else np.empty(0))
    bm25 = np.zeros(len(nums))
    sql = "SELECT rowid, rank FROM texts WHERE texts MATCH ?"
    for num, rank in state.db.execute(sql, (match,)):
        bm25[np.searchsorted(nums.nums, num)] = rank
    return Phrase(nums, bm25)


def having(state: State, words: Sequence[Iterable[str]]) -> list[PictureSet]:
    """See Catalog.having."""
    return [_matches(state, " OR ".join(map(_quoted, sorted(spellings)))) for spellings in words]


def _matches(state: State, match: str) -> PictureSet:
    """Return the pictures for which an FTS5 expression holds in the texts or the folders."""
    return state.kept_set(
        ("words", match),
        lambda: _nums_with(state.db, match),
        lambda nums: _nums_among(state.db, match, nums),
    )


def _nums_with(db: Connection, match: str) -> PictureSet:
    sql = (
        "SELECT (SELECT group_concat(rowid) FROM texts WHERE texts MATCH ?1),"
        " (SELECT group_concat(rowid) FROM folder_texts WHERE folder_texts MATCH ?1)"
    )
    texts, folders = (parsed(found) for found in db.execute(sql, (match,)).fetchone())
    return PictureSet.of_sorted(texts) | PictureSet.of_sorted(folders)


def _nums_among(db: Connection, match: str, nums: Int64) -> Int64:
    """Return those of `nums` for which an FTS5 expression holds, in any order."""
    # a range, which FTS5 seeks; new pictures have neighbouring nums
    sql = (
        "SELECT group_concat(rowid) FROM ("
        "SELECT rowid FROM texts WHERE texts MATCH ?1 AND rowid BETWEEN ?2 AND ?3 UNION ALL"
        " SELECT rowid FROM folder_texts WHERE folder_texts MATCH ?1 AND rowid BETWEEN ?2 AND ?3)"
    )
    args = (match, int(nums[0]), int(nums[-1]))
    found = parsed(db.execute(sql, args).fetchone()[0])
    return found[PictureSet.of_sorted(nums).has(found)]


def _quoted(text: str) -> str:
    # inside quotes FTS5 knows no operators
    return '"' + spaced(clean(text)).replace('"', '""') + '"'
