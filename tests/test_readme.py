"""The commands and examples of README and CONTRIBUTING, run as they stand; their links and paths."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.end_to_end

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "app/SERVING.md",
    "eval/RESULTS.md",
    "clipkit/training/METHODS.md",
)
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("clipkit ")
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a few of the sample pictures in ~/Pictures."""
    home = tmp_path_factory.mktemp("home")
    party = ROOT / "data_prep" / "gallery" / "pictures" / "party"
    shutil.copytree(party, home / "Pictures" / "party")
    shutil.copy(next(party.glob("*.png")), home / "Pictures" / "example.png")
    return home


def run(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "HOME": str(home),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("CLIPKIT_INDEX", None)
    return subprocess.run(
        command, capture_output=True, text=True, cwd=home, env=environment, timeout=180
    )


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(command: str, home: Path) -> None:
    """In order: the first one indexes ~/Pictures into the user's data folder."""
    done = run(["sh", "-c", command], home)
    assert done.returncode == 0, done.stderr
    if "search" in command:
        assert done.stdout.strip()


def test_the_python_of_the_readme_works(home: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    code += "\nassert len(library) == 15 and len(similar) == 12 and vectors.shape == (1, 512)"
    done = run([sys.executable, "-c", code], home)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5


@pytest.mark.parametrize("number", range(4))
def test_the_examples_for_contributors_work(number: int, tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    done = run([sys.executable, "-W", "error", "-c", blocks[number]], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_paths_that_contributors_are_sent_to_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:app|clipkit|data_prep|eval|tests)/[\w./]*)`", text)
    assert len(paths) > 30
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200
    (results,) = re.findall(r"^## Results$(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    assert results.count("\n|") - 2 <= 12  # rows, without the heading and its rule


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_make_targets_it_names_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)|^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_it_links_to_exists(document: str) -> None:
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / document).read_text("utf-8")):
        assert (folder / link).exists(), link


def test_every_path_of_its_tree_exists() -> None:
    (tree,) = re.findall(r"^```\n(clipkit/ .*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in tree.splitlines():
        name = shlex.split(line.replace("'", ""))[0]
        path = ROOT / ("clipkit/" + name if line.startswith(" ") else name)
        assert path.exists(), line
