"""`clipkit` with towers that know colours only: the real command in a second, for hundreds of kills.

`colour_command.py serve` runs one command after the other, each in a fork of a process that has imported
everything, so that a kill falls into the command and not into its imports: a JSON line of [file for
stderr, argument, ...] is answered by the process's id, and at its end by its status.

Of three models: "colours", "turned", whose vectors are those of the colours with red for blue, and
"same", whose picture side is that of "colours". All commits, snapshots and their thresholds come a
hundred times as often as in a real run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from colours import ColourModel

import clipkit.embed.run
import clipkit.index.building
import clipkit.library
from app import cli
from clipkit.catalog import Catalog


class Colours(ColourModel):
    precision = "float32"

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.encoder_id = self.known_id = f"{spec:0<16}"
        self.space_id = Colours("colours").encoder_id if spec == "same" else self.encoder_id

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        rows = super().encode_images(images)
        return rows[:, ::-1] if self.spec == "turned" else rows


def open_encoder(folder: Path, model: str | None = None, **_: Any) -> Colours:
    if model is None and (folder / "catalog.sqlite").is_file():
        with Catalog.open(folder) as catalog:
            active = catalog.active_encoder()
            model = active.spec if active else None
    return Colours(model or "colours")


def serve() -> None:
    import clipkit.index
    import clipkit.index_models  # noqa: F401

    for line in sys.stdin:
        errors, *sys.argv[1:] = json.loads(line)
        child = os.fork()
        if not child:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
            try:
                cli.main()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    clipkit.library.open_encoder = open_encoder  # type: ignore[assignment]
    clipkit.embed.run.COMMIT_SECONDS = 0.02
    clipkit.embed.run.SNAPSHOT_EVERY = 50
    clipkit.index.building.SNAPSHOT_FROM = 50
    is_server = sys.argv[1:] == ["serve"]
    sys.argv[0] = "clipkit"
    (serve if is_server else cli.main)()
