"""Fine-tune the towers on captioned pictures: from a dataset folder to a checkpoint.

config = TrainConfig.from_mapping({"data": "dataset", "recipe": "lora"})
summary = train(config)
summary.checkpoint                # an OpenCLIP folder, for `towers.load` and `clipkit index --model`

run.py prepares and finishes a run; loop.py is the training loop; the other modules are its parts.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipkit.training.config import RECIPES, TrainConfig

if TYPE_CHECKING:
    from clipkit.training.contact_sheet import draw_views
    from clipkit.training.data import is_dataset
    from clipkit.training.loop import Progress
    from clipkit.training.run import RunSummary, resume, train

__all__ = [
    "RECIPES",
    "Progress",
    "RunSummary",
    "TrainConfig",
    "draw_views",
    "is_dataset",
    "resume",
    "train",
]

_HOMES = {
    "Progress": "loop",
    "RunSummary": "run",
    "draw_views": "contact_sheet",
    "is_dataset": "data",
    "resume": "run",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used (PEP 562): the options alone do not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
