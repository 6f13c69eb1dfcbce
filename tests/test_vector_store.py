"""Vectors by space and key: kept over errors, kills and other processes; damage is never an answer."""

from __future__ import annotations

import logging
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from clipkit.catalog import VectorStore, vector_store
from clipkit.errors import ClipkitError

ROOT = Path(__file__).parent.parent
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
KEYS = [b"a", b"b", b"c"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "vectors.sqlite"


def fill(path: Path, space: str = "space") -> None:
    with VectorStore(path, space) as store:
        store.put(KEYS, ROWS)


def stored(path: Path, *keys: bytes, space: str = "space") -> dict[bytes, list[float]]:
    with VectorStore(path, space) as store:
        return {key: row.tolist() for key, row in store.get(keys or KEYS).items()}


def test_vectors_come_back_by_key_in_their_own_space(path: Path) -> None:
    assert stored(path) == {} and not path.exists(), "looking creates nothing"
    fill(path)
    fill(path, "other")
    with VectorStore(path, "space") as store:
        store.put([b"b"], ROWS[:1] + 100)
        assert store.get([b"b"])[b"b"].tolist() == [100, 101, 102, 103], (
            "found before it is written"
        )
    assert stored(path, b"a", b"b", b"x") == {b"a": [0, 1, 2, 3], b"b": [100, 101, 102, 103]}
    assert stored(path, b"b", space="other") == {b"b": [4, 5, 6, 7]}
    assert stored(path, space="third") == {}
    with VectorStore(path, "space") as store:
        assert store.get([b"a"])[b"a"].dtype == np.float32


def test_more_keys_than_one_statement_takes(path: Path) -> None:
    keys = [str(n).encode() for n in range(1300)]
    with VectorStore(path, "space") as store:
        store.put(keys, np.arange(1300, dtype=np.float32)[:, None])
    assert stored(path, *keys) == {key: [float(key)] for key in keys}


def test_without_a_path_nothing_is_kept() -> None:
    with VectorStore(None, "space") as store:
        store.put(KEYS, ROWS)
        store.put_facts("encoder", {"dim": 4})
        assert store.get(KEYS) == {} and store.facts("encoder") == {}


def test_facts_are_kept_by_their_own_name(path: Path) -> None:
    with VectorStore(path, "space") as store:
        assert store.facts("encoder") == {}
        store.put_facts("encoder", {"dim": 4, "logit_scale": 100.5})
    with VectorStore(path, "other") as store:
        assert store.facts("encoder") == {"dim": 4, "logit_scale": 100.5}
        assert store.facts("space") == {}


def test_an_error_keeps_what_was_put(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), VectorStore(path, "space") as store:
        store.put(KEYS, ROWS)
        raise KeyboardInterrupt
    assert len(stored(path)) == 3


def test_vectors_are_written_when_the_time_is_over_or_they_are_many(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VectorStore(path, "space") as store:
        store.put([b"a"], ROWS[:1])
        assert stored(path) == {}
        monkeypatch.setattr(vector_store, "FLUSH_SECONDS", -1.0)
        store.put([b"b"], ROWS[1:2])
        assert list(stored(path)) == [b"a", b"b"]
        monkeypatch.setattr(vector_store, "FLUSH_SECONDS", 1e9)
        monkeypatch.setattr(vector_store, "_FLUSH_ROWS", 1)
        store.put([b"c"], ROWS[2:])
        assert len(stored(path)) == 3


def test_a_killed_process_loses_only_what_was_not_written(path: Path) -> None:
    code = (
        "import sys, time, numpy as np; from pathlib import Path;"
        "from clipkit.catalog import VectorStore;"
        "store = VectorStore(Path(sys.argv[1]), 'space');"
        "store.put([b'a'], np.zeros((1, 4), np.float32)); store.flush();"
        "store.put([b'b'], np.zeros((1, 4), np.float32)); print('put', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"put\n"
        process.send_signal(signal.SIGKILL)
    assert list(stored(path)) == [b"a"]


def test_processes_write_into_one_file_at_once(path: Path) -> None:
    """Three processes begin a new file together; each puts 100 rows, 50 of them the next one's."""
    code = (
        "import sys, numpy as np; from pathlib import Path;"
        "from clipkit.catalog import VectorStore; first = int(sys.argv[2])\n"
        "for n in range(first, first + 100):\n"
        "    with VectorStore(Path(sys.argv[1]), 'space') as store:\n"
        "        store.put([str(n).encode()], np.full((1, 4), n, np.float32))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(first)], cwd=ROOT)
        for first in (0, 50, 100)
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    keys = [str(n).encode() for n in range(200)]
    assert stored(path, *keys) == {key: [float(key)] * 4 for key in keys}


@pytest.mark.parametrize("damage", ["cut", "emptied", "text", "vector", "digest", "key", "table"])
def test_damage_is_set_aside_and_never_an_answer(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    elif damage == "emptied":
        content.clear()
    elif damage == "text":
        content[:] = b"not a database" * 5000
    elif damage == "vector":
        content[content.index(ROWS[1].tobytes()) + 2] ^= 1
    if damage in ("digest", "key", "table"):
        with closing(sqlite3.connect(path)) as db, db:
            db.execute(
                {
                    "digest": "UPDATE vectors SET digest = x'00' WHERE key = x'62'",
                    "key": "UPDATE vectors SET key = x'61FF' WHERE key = x'61'",
                    "table": "ALTER TABLE vectors RENAME COLUMN content TO other",
                }[damage]
            )
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        left = stored(path, *KEYS, b"a\xff")
    assert left == {}
    fill(path)
    assert len(stored(path)) == 3
    if damage != "emptied":  # an empty file is a new database
        assert "set aside the damaged vectors" in caplog.text
        assert path.with_name("vectors.sqlite.damaged").exists()


def test_damage_met_while_writing_loses_nothing_that_is_put(path: Path) -> None:
    with VectorStore(path, "space") as store:
        store.put([b"a"], ROWS[:1])
        store.flush()
        store.put([b"b"], ROWS[1:2])
        path.write_bytes(b"not a database" * 5000)
    assert list(stored(path)) == [b"b"]


def test_a_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ClipkitError, match=r"cannot use .*vectors\.sqlite"):
        fill(tmp_path / "file" / "vectors.sqlite")


def test_a_full_store_is_read_fast(path: Path) -> None:
    """50,000 x 512 in well under two seconds of processor time: 100 MB read, checked and found."""
    keys = [n.to_bytes(16, "big") for n in range(50_000)]
    vectors = np.random.default_rng(0).standard_normal((50_000, 512), np.float32)
    with VectorStore(path, "space") as store:
        for start in range(0, 50_000, 5000):
            store.put(keys[start : start + 5000], vectors[start : start + 5000])
    with VectorStore(path, "space") as store:
        started = time.process_time()
        found = store.get(keys)
        assert time.process_time() - started < 2
    assert np.array_equal(np.stack([found[key] for key in keys]), vectors)


def test_a_space_is_removed_while_another_process_reads(path: Path) -> None:
    """The other store keeps its connection: it no longer finds what was removed, and can put it."""
    fill(path)
    fill(path, "other")
    with VectorStore(path, "space") as reader:
        assert len(reader.get(KEYS)) == 3
        with VectorStore(path, "") as store:
            assert store.spaces() == {"space": 3, "other": 3}
            store.remove(["space"])
            assert store.spaces() == {"other": 3}
        assert reader.get(KEYS) == {}
        reader.put(KEYS, ROWS)
    assert len(stored(path)) == 3 and len(stored(path, space="other")) == 3


def test_room_on_the_disk_is_given_back(path: Path) -> None:
    with VectorStore(path, "space") as store:
        store.put([bytes([n]) for n in range(200)], np.zeros((200, 1000), np.float32))
    assert path.stat().st_size > 800_000
    with VectorStore(path, "") as store:
        store.remove(["space"])
    assert path.stat().st_size < 100_000


def test_no_file_has_no_spaces(path: Path) -> None:
    for where in (None, path):
        with VectorStore(where, "") as store:
            store.remove(["space"])
            assert store.spaces() == {}
    assert not path.exists()
