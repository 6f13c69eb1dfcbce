"""Atomic writes: the old content or the new, never a part, and nothing left over."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from clipkit.durable import whole_file, whole_folder, write_whole


@pytest.mark.parametrize("sync", [True, False])
def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old", sync=sync)
    write_whole(path, b"new", sync=sync)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_keeps_the_old_file_and_removes_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    """Eight threads write eight contents of 100 kB; the file is one of them. Fails for a temporary
    name that is shared: two threads would write into one file."""
    path = tmp_path / "a"
    contents = [bytes([n]) * 100_000 for n in range(8)]
    threads = [
        threading.Thread(
            target=lambda data=data: [write_whole(path, data, sync=False) for _ in range(20)]
        )
        for data in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with whole_folder(folder) as temporary:
        (temporary / "file").write_bytes(b"x")
        assert not folder.exists()
    assert (folder / "file").read_bytes() == b"x"
    with pytest.raises(OSError, match="full"), whole_folder(tmp_path / "b") as temporary:
        (temporary / "file").write_bytes(b"x")
        raise OSError(28, "disk full")
    assert list(tmp_path.iterdir()) == [folder]
