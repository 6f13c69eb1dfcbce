"""Who may import whom, read from the source with `ast`: the design, held by a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "clipkit": {"clipkit"},
    "data_prep": {"data_prep", "clipkit"},
    "eval": {"eval", "clipkit"},
    "app": {"app", "eval", "data_prep", "clipkit"},
}
# What only these files, or the files below these folders, know.
OWNERS = {
    "faiss": "clipkit/index",
    "sqlite3": "clipkit/catalog",
    "open_clip": ("clipkit/towers", "data_prep/builtin_model/recipe.py"),
    "timm": ("clipkit/towers", "data_prep/builtin_model/recipe.py"),
    "transformers": ("clipkit/towers", "data_prep/builtin_model/recipe.py"),
    "gradio": "app/web/page.py",
    "fastapi": ("app/web/api.py", "app/web/page.py"),  # the page is mounted on the API
}
NO_TORCH = tuple(
    f"clipkit/{module}"
    for module in (
        "errors records images catalog index query metrics checkpoint text_towers embed search "
        "lazy_encoder"
    ).split()
)
SOURCES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, in full dotted form."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_sources_are_found() -> None:
    assert ROOT / "clipkit" / "towers" / "encoder.py" in SOURCES


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    roots = {module.partition(".")[0] for module in imports(path)}
    assert "eval" not in {m for m in imports(path) if "." not in m}, "would shadow the builtin"
    assert roots & set(ROOMS) <= ROOMS[name.partition("/")[0]]
    for module, owners in OWNERS.items():
        assert module not in roots or name.startswith(owners), f"only {owners} may import {module}"
    if name.startswith(NO_TORCH):
        assert "torch" not in roots


def test_a_search_pays_neither_for_gradio_nor_for_training() -> None:
    """Importing the command line loads none of the heavy libraries."""
    heavy = "torch gradio fastapi datasets transformers open_clip faiss".split()
    code = f"import app.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
