"""Run clipkit as a user would, and write JSON lines for it: shared by the benchmarks of commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def clipkit(*arguments: str) -> None:
    """Run a command; what it prints is the result. Raises CalledProcessError."""
    print("\n$ clipkit", *arguments, flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "app.cli", *arguments], check=True)
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write rows as JSON lines, and return the path for a command."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
