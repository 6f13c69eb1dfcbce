"""The walk and the catalog's files as two streams in one order, and the files that such runs wait in."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.catalog import KnownFile
from clipkit.embed.streams import Spool, side_by_side
from clipkit.embed.walk import Folder, FoundFile, Problem, walk

# Parts of paths between which the order of whole paths and that of names differ: "/" is 0x2F, and
# space, "!", "-" and "." are less.
NAMES = st.sampled_from(["a", "a b", "a-1", "a.d", "a0", "A", "é", "\udce9", "zz", "a!"])
FILES = st.sampled_from(
    ["a.jpg", "a b.png", "a-1.jpg", "a.JPG", "é.jpg", "\udcff.png", "b.jpg.jpg"]
)
PATHS = st.sets(
    st.tuples(st.lists(NAMES, max_size=3), FILES).map(lambda p: "/".join([*p[0], p[1]])),
    max_size=12,
)


def record(num: int = 1) -> KnownFile:
    return KnownFile(1, 1, "ok", num)


def touch(root: Path, paths: Any) -> None:
    for path in paths:
        file = os.path.join(root, path)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        Path(file).write_bytes(b"x")


@given(PATHS)
def test_the_walk_yields_the_order_of_all_paths_bytes(paths: set[str]) -> None:
    """Fails for a walk that sorts names only ("a" with all below it before "a b.png" and "a-1.jpg"),
    or that yields a folder's files before the folders beside them."""
    with tempfile.TemporaryDirectory() as root:
        touch(Path(root), paths)
        items = list(walk(root, skip=""))
        found = [item.path for item in items if isinstance(item, FoundFile)]
        assert found == sorted((os.path.join(root, path) for path in paths), key=os.fsencode)
        # a folder comes after all that is below it, and every folder comes
        folders = [item.path for item in items if isinstance(item, Folder)]
        assert len(set(folders)) == len(folders) == 1 + sum(len(d) for _, d, _ in os.walk(root))
        ends = {item.path: at for at, item in enumerate(items) if isinstance(item, Folder)}
        for at, item in enumerate(items):
            assert all(
                ends[str(above)] > at for above in Path(item.path).parents if str(above) in ends
            )


@given(PATHS, PATHS)
def test_side_by_side_pairs_what_is_on_both_sides(found: set[str], known: set[str]) -> None:
    ordered = sorted(found, key=os.fsencode)
    records = [(path, record(num)) for num, path in enumerate(sorted(known, key=os.fsencode))]
    pairs = list(side_by_side([FoundFile(path, 1, 1) for path in ordered], records))
    paths = [item.path if item else (row or ("",))[0] for item, row in pairs]
    assert paths == sorted(found | known, key=os.fsencode)
    for path, (item, row) in zip(paths, pairs, strict=True):
        assert (item is not None) == (path in found)
        assert row == (
            dict(records)[path] and (path, dict(records)[path]) if path in known else None
        )


def test_a_folders_problem_comes_before_all_that_is_known_below_it() -> None:
    """Its key is "p/a/", between "p/a.jpg" and "p/a/1.jpg", though its path is less than both."""
    problem = Problem("p/a", "unreadable-folder", "m", is_folder=True)
    found = [FoundFile("p/a.jpg", 1, 1), problem, FoundFile("p/b.jpg", 1, 1)]
    known = [(path, record()) for path in ("p/a.jpg", "p/a/1.jpg", "p/b.jpg")]
    order = [
        (item.path if item else None, row[0] if row else None)
        for item, row in side_by_side(found, known)
    ]
    assert order == [
        ("p/a.jpg", "p/a.jpg"),
        ("p/a", None),
        (None, "p/a/1.jpg"),
        ("p/b.jpg", "p/b.jpg"),
    ]


def test_a_spool_holds_any_name_and_can_be_cut(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        assert list(spool) == [] and len(spool) == 0
        spool.add("/p/\udcff\n.png", 5, None)
        mark = spool.mark()
        spool.add("/p/é.jpg", -1, 2**62)
        spool.add("/p/z.jpg", 0, 0)
        spool.cut(mark)
        spool.add("/p/é.jpg", -1, 2**62)
        assert len(spool) == 2
        assert list(spool) == [["/p/\udcff\n.png", 5, None], ["/p/é.jpg", -1, 2**62]]
        assert list(tmp_path.iterdir()) == []  # nothing is left when the process is killed


@pytest.mark.parametrize("change", ["size", "older", "removed", "renamed", "added"])
def test_any_change_beside_the_pictures_changes_the_fingerprint(
    tmp_path: Path, change: str
) -> None:
    """Also one to an older time, as rsync -a and unzip make it."""

    def fingerprint() -> str | None:
        *_, folder = walk(str(tmp_path), skip="")
        assert isinstance(folder, Folder)
        return folder.texts

    assert fingerprint() is None
    text = tmp_path / "a.txt"
    text.write_text("one")
    (tmp_path / "b.json").write_text("{}")
    os.utime(text, ns=(10**18, 10**18))
    before = fingerprint()
    assert before is not None and before == fingerprint()
    if change == "size":
        text.write_text("more")
        os.utime(text, ns=(10**18, 10**18))
    elif change == "older":
        os.utime(text, ns=(10**17, 10**17))
    elif change == "removed":
        text.unlink()
    elif change == "renamed":
        text.rename(tmp_path / "c.txt")
    else:
        (tmp_path / "metadata.jsonl").write_text("")
    after = fingerprint()
    assert after not in (before, None)
    (tmp_path / "notes.md").write_text("no captions")
    assert fingerprint() == after
