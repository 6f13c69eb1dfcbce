"""Where a run's numbers go: metrics.jsonl always, TensorBoard where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipkit.training import distributed
from clipkit.training.checkpoint import RunFolder

__all__ = ["Tracker"]


class Tracker:
    """Writes from the first process only."""

    def __init__(self, folder: RunFolder, *, tensorboard: bool) -> None:
        self._folder = folder
        self._first = distributed.rank() == 0
        self._events: Any = _events(folder) if tensorboard and self._first else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._first:
            self._folder.write_line({"step": step, **values})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def _events(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an extra; metrics.jsonl holds the same numbers
        return None
    return SummaryWriter(str(folder.path))
