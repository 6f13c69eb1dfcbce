"""What importing costs. Who may import whom is import-linter's work (pyproject.toml, `make check`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_search_pays_neither_for_gradio_nor_for_training() -> None:
    """Importing the command line loads none of the heavy libraries."""
    heavy = "torch gradio fastapi datasets transformers open_clip faiss".split()
    code = f"import app.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_package_eval_is_never_imported_whole() -> None:
    """`import eval` would hide the builtin function of that name."""
    for path in ROOT.glob("[acde]*/**/*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not any(line.split("#")[0].strip() == "import eval" for line in lines), path
