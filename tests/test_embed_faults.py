"""The disk full, or failing, at any moment of a run: one error, and the index still serves.

The kernel itself refuses the writes: RLIMIT_FSIZE lets no file grow beyond a size. A child process runs
under it, with every limit from nothing to more than the run needs, so that each write of the database,
its log, a snapshot and a temporary file is the first one refused under some limit.
"""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from colours import ColourModel, paint
from test_kill_fakes import COMMAND, PROJECT

from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from clipkit.errors import CatalogBusy, ClipkitError, InputError


def command(*options: object, **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, options)],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,  # type: ignore[call-overload]
    )


def index_under(limit: int, index: Path, photos: Path) -> int:
    """Index in a child whose files may not grow beyond `limit` bytes: 0 if it succeeded, 1 after a
    ClipkitError, 3 after anything else."""
    child = os.fork()
    if not child:
        code = 3
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # write(2) then fails with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with Catalog.open(index, write=True) as catalog:
                index_folders(catalog, [photos], encoder=ColourModel(), workers=1)  # type: ignore[arg-type]
            code = 0
        except ClipkitError as error:
            code = 1 if str(error) else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def numbers(index: Path) -> tuple[int, int]:
    with Catalog.open(index) as catalog:
        active = catalog.active_encoder()
        stats = catalog.stats(active.encoder_id if active else None)
        return stats.pictures, stats.vectors


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_no_write_that_fails_costs_more_than_itself(tmp_path: Path) -> None:
    """Twenty pictures are indexed; twenty more under limits of 0 to 640 kB, each 16 kB above the one
    before: the twenty are there after each failure, whole, and without a limit all forty."""
    photos = tmp_path / "photos"
    for number in range(20):
        paint(photos / f"{number}.png", "red", number=number)
    assert index_under(resource.RLIM_INFINITY, tmp_path / "index", photos) == 0
    for number in range(20, 40):
        paint(photos / f"{number}.png", "blue", number=number)
    outcomes = []
    for limit in range(0, 640_000, 16_000):
        outcomes.append(index_under(limit, tmp_path / "index", photos))
        pictures, vectors = numbers(tmp_path / "index")
        assert pictures == vectors and 20 <= pictures <= 40, limit
    assert set(outcomes) == {0, 1}  # some failed, each with a sentence, and some did not
    assert index_under(resource.RLIM_INFINITY, tmp_path / "index", photos) == 0
    assert numbers(tmp_path / "index") == (40, 40)
    assert {path.name for path in (tmp_path / "index").iterdir()} <= {
        "catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "writer.lock", "snapshots",
        "thumbnails.sqlite", "thumbnails.sqlite-wal", "thumbnails.sqlite-shm",
    }  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_disk_that_becomes_full_at_any_moment(small_disk: Path, tmp_path: Path) -> None:
    """As above, with a disk of which 0, 12, 24 ... kB are free. A reader that is open serves the old
    version while the disk is full, and one that is opened when there is room again."""
    photos, index, saved = tmp_path / "photos", small_disk / "index", tmp_path / "saved"
    for number in range(20):
        paint(photos / f"{number}.png", "red", number=number)
    assert index_under(resource.RLIM_INFINITY, index, photos) == 0
    shutil.copytree(index, saved)
    for number in range(20, 40):
        paint(photos / f"{number}.png", "blue", number=number)
    outcomes = []
    for free in itertools.count(0, 12_000):
        ballast = small_disk / "ballast"
        with Catalog.open(index) as reader:
            before = reader.stats("c010" * 4)
            room = os.statvfs(small_disk)
            ballast.write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - free)))
            outcomes.append(index_under(resource.RLIM_INFINITY, index, photos))
            now = reader.stats("c010" * 4)
            assert before.pictures == 20 <= now.pictures == now.vectors <= 40, free
        ballast.unlink()
        assert numbers(index) == (now.pictures, now.vectors)
        assert index_under(resource.RLIM_INFINITY, index, photos) == 0
        assert numbers(index) == (40, 40)
        if outcomes[-3:] == [0, 0, 0]:
            break
        shutil.rmtree(index)
        shutil.copytree(saved, index)
    assert set(outcomes) == {0, 1} and outcomes.count(1) >= 5


def test_a_temporary_file_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipkit.embed.streams import Spool

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    paint(tmp_path / "photos" / "0.png", "red")
    monkeypatch.setattr(Spool, "add", full)
    with (
        Catalog.open(tmp_path / "index", write=True) as catalog,
        pytest.raises(ClipkitError, match=r"cannot write to .*: No space left on device; it needs"),
    ):
        index_folders(catalog, [tmp_path / "photos"], encoder=ColourModel())  # type: ignore[arg-type]


@pytest.mark.end_to_end
def test_the_command_says_in_a_sentence_that_the_disk_is_full(tmp_path: Path) -> None:
    paint(tmp_path / "photos" / "0.png", "red")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    with command(tmp_path / "photos", "--index", tmp_path / "index", preexec_fn=limit) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "cannot use " in errors and "it needs free disk space" in errors
    assert "Traceback" not in errors


# ---- signals


def wait_for_pictures(index: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        try:
            if numbers(index)[0]:
                return
        except (InputError, CatalogBusy):  # none yet, or just being made
            pass
        time.sleep(0.02)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("send", "code"), [([signal.SIGINT], 130), ([signal.SIGTERM], 143)], ids=["int", "term"]
)
def test_a_signal_ends_a_run_soundly(send: list[signal.Signals], code: int, tmp_path: Path) -> None:
    """It says how to go on and that searches keep the old model; nothing is called missing."""
    photos = tmp_path / "photos"
    for number in range(600):
        paint(photos / f"{number % 7}" / f"{number}.png", "red", number=number)
    index = tmp_path / "index"
    arguments = (photos, "--index", index, "--workers", 1, "--batch-size", 1)
    with command(*arguments) as process:
        wait_for_pictures(index, process)
        for number in send:
            process.send_signal(number)
        out, errors = process.communicate()
    assert process.returncode == code, errors
    assert "stopped; run the same command again to resume: what was done is kept" in out
    assert "not mounted" not in out and "Traceback" not in errors
    pictures, vectors = numbers(index)
    assert 0 < pictures == vectors < 600
    with command(*arguments) as process:
        out, _ = process.communicate()
    assert f"{600 - pictures} added, {pictures} unchanged" in out and numbers(index) == (600, 600)
    with command(*arguments, "--model", "turned") as process:
        while process.poll() is None:
            with Catalog.open(index) as catalog:
                if len(catalog.encoders()) == 2:
                    break
        process.send_signal(send[0])
        out, errors = process.communicate()
    assert process.returncode == code, errors
    assert "of 600 pictures have vectors of turned; run again to go on" in out
    assert "searches still use colours" in out


@pytest.mark.end_to_end
def test_a_second_signal_ends_the_command_at_once(tmp_path: Path) -> None:
    """The first waits for the batch, which never ends; the second kills the process, wherever it is."""
    photos = tmp_path / "photos"
    for number in range(40):
        paint(photos / f"{number}.png", "red", number=number)
    stuck = "import colour_command, time, signal, sys; sys.argv[0] = 'clipkit'\n"
    stuck += "import clipkit.library as l, colour_command as c; from app import cli\n"
    stuck += "class Stuck(c.Colours):\n"
    stuck += "    def encode_images(self, images):\n"
    stuck += "        print('encoding', flush=True)\n"
    stuck += "        while True: time.sleep(60)\n"
    stuck += "l.open_encoder = lambda *_, **__: Stuck('colours')\n"
    stuck += "cli.main()\n"
    with subprocess.Popen(
        [sys.executable, "-c", stuck, "index", str(photos), "--index", str(tmp_path / "index")],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "encoding\n"
        process.send_signal(signal.SIGINT)
        while "stopping after this batch" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
