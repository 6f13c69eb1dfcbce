"""Where a run's numbers go: metrics.jsonl always, TensorBoard, and whatever accelerate can report to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipkit.errors import InputError
from clipkit.training import distributed
from clipkit.training.checkpoint import RunFolder
from clipkit.training.config import TrainConfig

__all__ = ["Tracker"]


class Tracker:
    """Writes from the first process only."""

    def __init__(self, folder: RunFolder, config: TrainConfig) -> None:
        self._folder = folder
        self._first = distributed.rank() == 0
        self._events = _events(folder) if config.tensorboard and self._first else None
        names = [name.strip() for name in config.trackers.split(",") if name.strip()]
        self._others = [_tracker(name, folder, config) for name in names if self._first]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._first:
            self._folder.write_line({"step": step, **values})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        for other in self._others:
            other.log(dict(values), step=step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        for other in self._others:
            other.finish()


def _events(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # metrics.jsonl holds the same numbers
        return None
    return SummaryWriter(str(folder.path))


def _tracker(name: str, folder: RunFolder, config: TrainConfig) -> Any:
    """One of accelerate's trackers, started."""
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS as known  # noqa: N811
    except ImportError as error:
        raise InputError(
            f"trackers is {config.trackers!r}, which needs accelerate: pip install accelerate {name}"
        ) from error
    if name not in known:
        raise InputError(f"trackers names {name!r}; accelerate knows {', '.join(sorted(known))}")
    place = {"logging_dir": folder.path} if known[name].requires_logging_directory else {}
    try:
        tracker = known[name](folder.path.name, **place)
        tracker.main_process_only = False  # this is the main process; no state to look it up in
        tracker.start()
    except ImportError as error:
        raise InputError(f"trackers names {name!r}, which is not installed: {error}") from error
    tracker.store_init_configuration(config.to_json())
    return tracker
