"""Fine-tune the towers on captioned pictures: from a dataset folder to a checkpoint.

config = TrainConfig.from_mapping({"data": "dataset", "recipe": "lora"})
summary = train(config)
summary.checkpoint                # an OpenCLIP folder, for `towers.load` and `clipkit index --model`

run.py prepares and finishes a run; loop.py is the training loop; the other modules are its parts.
"""

from clipkit.training.config import RECIPES, TrainConfig
from clipkit.training.data import is_dataset
from clipkit.training.loop import Progress
from clipkit.training.run import RunSummary, resume, train

__all__ = ["RECIPES", "Progress", "RunSummary", "TrainConfig", "is_dataset", "resume", "train"]
