"""The installed libraries are of major versions that clipkit was run against."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
# Major versions that the whole suite passed with. A new one is added here after a run against it.
KNOWN = {
    "torch": {2},
    "torchvision": {0},
    "open-clip-torch": {3},  # 4 changes tokenizers and loading
    "transformers": {4, 5},
    "datasets": {4, 5},
    "faiss-cpu": {1},
    "gradio": {6},
    "typer": {0},
    "rich": {14, 15},
    "numpy": {2},
    "scipy": {1},
    "pillow": {11, 12},
    "safetensors": {0},
    "platformdirs": {4},
    "filelock": {3, 4},
    "scikit-learn": {1},
    "matplotlib": {3},
    "jinja2": {3},
    "imagehash": {4},
    "ftfy": {6},
    "tensorboard": {2},
    "prometheus-client": {0},
    "httpx": {0},
}


def check(name: str, version: str) -> None:
    major = int(version.split(".")[0])
    assert major in KNOWN[name], (
        f"{name} {version} is installed; clipkit was run against major versions "
        f"{sorted(KNOWN[name])}: run `make test` with it, mend what broke, then add {major} to "
        "KNOWN in tests/test_dependencies.py, or pin it in pyproject.toml"
    )


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~ \[]", requirement)[0].lower() for requirement in requirements}


def test_every_dependency_has_known_versions() -> None:
    assert names(PROJECT["dependencies"]) == set(KNOWN)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_its_major_version_is_known(name: str) -> None:
    check(name, importlib.metadata.version(name))


def test_a_new_major_version_is_named_with_what_to_do() -> None:
    with pytest.raises(AssertionError, match=r"open-clip-torch 4\.0\.1 is installed; .*\[3\]"):
        check("open-clip-torch", "4.0.1")


def test_open_clip_is_pinned_below_its_next_major_version() -> None:
    (pin,) = [d for d in PROJECT["dependencies"] if d.startswith("open-clip-torch")]
    assert pin == "open-clip-torch>=3.2,<4"


def made(*variables: str) -> str:
    """The commands with which `make demo` would install, in a folder without an environment."""
    root = Path(__file__).parent.parent
    command = ["make", "-n", "-f", root / "Makefile", "demo", "VENV=/nowhere/env", *variables]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def test_make_installs_the_torch_that_is_named_before_the_rest() -> None:
    """The other packages then find it installed, and do not bring PyPI's, with its CUDA."""
    plain, cpu, own = made(), made("TORCH=cpu"), made("TORCH=https://mirror.example/torch/cpu")
    assert "--index-url" not in plain and "--system-site-packages" not in plain
    assert "--system-site-packages /nowhere/env" in made("SYSTEM=1")
    assert "-c /nowhere/env/.torch -e ." in plain and 'm.version("torch")' in plain  # kept as it is
    assert "m.version" not in made("VENV=.venv")
    assert "--index-url https://mirror.example/torch/cpu " in own
    first, second = (line for line in cpu.splitlines() if "pip install" in line)
    assert "--index-url https://download.pytorch.org/whl/cpu " in first
    assert second.endswith("-e .") and "index-url" not in second
    named = re.search(r"\$\((sed .*)\)$", first)
    assert named is not None
    root = Path(__file__).parent.parent
    wanted = subprocess.run(named[1], shell=True, cwd=root, capture_output=True, text=True).stdout
    assert wanted.split() == [r for r in PROJECT["dependencies"] if r.startswith("torch")]
