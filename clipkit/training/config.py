"""The configuration of a training run: one frozen, typed dataclass, read from TOML, flags, or both.

Every option is a field that carries its help, its limits and its default; defaults that depend on the
recipe are in `RECIPES`. A command line can be made from `dataclasses.fields(TrainConfig)` alone.
"""

# ruff: noqa: RUF009  `_option` returns a field
from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from clipkit.errors import InputError, check_choice, check_limits, suggestion

if TYPE_CHECKING:
    from clipkit.losses import Loss

# The command line's options are made of this module: it must not wait for torch. `losses.Duplicates`
# and `towers.Precision` are the same.
Recipe = Literal["heads", "lit", "lora", "full"]
Duplicates = Literal["mask", "positive"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

# Defaults that give a good result without tuning on 500 to 50,000 pairs. An epoch is one view of
# every picture.
_DEFAULTS = "epochs learning_rate weight_decay layer_decay feature_dropout ema".split()
RECIPES: Mapping[str, Mapping[str, Any]] = {
    recipe: dict(zip(_DEFAULTS, values, strict=True))
    for recipe, values in {
        "heads": (20, 1e-3, 0.1, 1.0, 0.2, 0.0),
        "lit": (8, 5e-5, 0.05, 1.0, 0.0, 0.98),
        "lora": (8, 3e-4, 0.01, 1.0, 0.0, 0.98),
        "full": (8, 3e-5, 0.05, 0.8, 0.0, 0.98),
    }.items()
}


def _option(
    help_text: str,
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    above: float | None = None,
) -> Any:
    """Make a field with its help and its limits: low <= value <= high, above < value < below."""
    limits = {"low": low, "high": high, "below": below, "above": above}
    limits = {kind: limit for kind, limit in limits.items() if limit is not None}
    return field(default=default, metadata={"help": help_text, "limits": limits})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All options of a run. Use `from_mapping` or `from_toml`, which fill in the recipe's defaults.

    Raises InputError, naming the option, its value, its limit and the remedy.
    """

    data: str = _option("dataset folder with train/ and, optionally, validation/")
    out: str = _option("folder for runs", "runs")
    name: str = _option("name of the run's folder in it (default: recipe and time)", "")
    start: str = _option("model to start from", "builtin")
    recipe: Recipe = _option("what to train: heads, lit (texts), lora (adapters), full", "heads")

    loss: str = _option("infonce, siglip, or auto: the loss of the starting model", "auto")
    duplicates: Duplicates = _option("equal captions in a batch: mask, or positive", "mask")
    label_smoothing: float = _option("share of the target spread evenly", 0.0, low=0, below=1)
    hardness: float = _option("weight of hard negatives (Robinson 2021)", 0.0, low=0)
    debias: float = _option("share of false negatives (Chuang 2020)", 0.0, low=0, below=1)

    epochs: int = _option("passes over all pictures", low=1)
    max_steps: int = _option("stop after this many steps (0: no limit)", 0, low=0)
    batch: int = _option("pairs compared with each other (0: fitted to the data)", 0, low=0)
    chunk: int = _option("pairs in memory at a time (0: fitted to the device)", 0, low=0)
    learning_rate: float = _option("highest rate, reached after warm-up", above=0, high=1)
    image_rate: float = _option("factor of learning_rate for the image tower", 1.0, low=0)
    text_rate: float = _option("factor of learning_rate for the text tower", 1.0, low=0)
    head_rate: float = _option("factor of learning_rate for the two projections", 1.0, low=0)
    layer_decay: float = _option("factor of the rate per layer, from the top down", above=0, high=1)
    weight_decay: float = _option("AdamW's weight decay, on matrices only", low=0)
    drift: float = _option(
        "limit of a matrix's change, as a share of its size at the start "
        "(0: no limit; -1: fitted to the data)",
        -1.0,
        low=-1,
    )
    beta2: float = _option("AdamW's decay of squared gradients", 0.98, above=0, below=1)
    warmup: float = _option("share of the run over which the rate rises", 0.1, low=0, below=1)
    clip_norm: float = _option("largest norm of the gradient (0: no limit)", 1.0, low=0)

    train_image_layers: int = _option("train only the last N layers (-1: all)", -1, low=-1)
    train_text_layers: int = _option("train only the last N layers (-1: all)", -1, low=-1)
    lora_rank: int = _option("rank of the adapters", 16, low=1)
    lora_alpha: float = _option("adapters are scaled by alpha / rank", 16.0, above=0)
    dropout: bool = _option("use the towers' own dropout and patch dropout", False)
    feature_dropout: float = _option("dropout of frozen features, in recipe heads", low=0, below=1)
    crop: float = _option("smallest share of a picture that crops keep", 0.5, above=0, high=1)
    flip: bool = _option("mirror half of the pictures", True)

    hard_negatives: int = _option("similar pictures added to a picture's batch (0: off)", 0, low=0)
    hard_negatives_every: int = _option("epochs between two searches for them", 1, low=1)
    hard_negatives_margin: float = _option(
        "skip pictures that match a caption better than this share of its own picture's score",
        0.95,
        above=0,
        high=1,
    )

    ema: float = _option("decay of the running mean of the weights (0: off)", low=0, below=1)
    interpolate: bool = _option("mix with the start as validation suggests (WiSE-FT)", True)
    eval_every: int = _option("steps between evaluations (0: once an epoch)", 0, low=0)
    eval_pictures: int = _option("most validation pictures to use (0: all)", 5000, low=0)
    patience: int = _option("stop after N evaluations without improvement (0: never)", 5, low=0)
    checkpoint_every: int = _option("steps between resumable states (0: at evaluations)", 0, low=0)

    device: str = _option("auto, cpu, cuda, mps", "auto")
    precision: Precision = _option("precision of the towers' arithmetic", "auto")
    activation_checkpointing: bool = _option("less memory, a third more time", False)
    workers: int = _option("decode threads (0: one per core)", 0, low=0)
    seed: int = _option("seed of orders, crops, captions and adapters", 0, low=0)
    tensorboard: bool = _option("write TensorBoard events", True)
    trackers: str = _option("also report to wandb, mlflow, ... (through accelerate)", "")

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for item in fields(self):
            value = getattr(self, item.name)
            _check_type(item.name, value, hints[item.name])
            check_limits(item.name, value, **item.metadata["limits"])
        check_choice("loss", self.loss, ("auto", *_losses()))
        if -1 < self.drift < 0:
            raise InputError(f"drift is {self.drift:g}; it must be 0 or more, or -1 to be fitted")
        if self.loss != "auto":
            self.loss_options(self.loss)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> TrainConfig:
        """Make a configuration from names and values, with the recipe's defaults for the rest.

        Raises InputError for unknown names, values outside their limits, and missing `data`.
        """
        names = [item.name for item in fields(cls)]
        for key in options:
            if key not in names:
                raise InputError(f"unknown key {key!r}; {suggestion(key, names, 'the keys are')}")
        if "data" not in options:
            raise InputError(
                "data is not given; name a dataset folder, as `clipkit data build` writes it"
            )
        hints = get_type_hints(cls)
        values = {key: _converted(value, hints[key]) for key, value in options.items()}
        recipe = values.get("recipe", "heads")
        _check_type("recipe", recipe, Recipe)
        return cls(**{**RECIPES[recipe], **values})

    @classmethod
    def from_toml(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """Read a TOML file of `key = value` lines; `overrides`, such as flags, take precedence.

        Raises InputError, naming the file, if it cannot be read or holds an invalid option.
        """
        try:
            options = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_mapping({**options, **(overrides or {})})
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not TOML: {error}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def steps(self, pictures: int, batch: int) -> int:
        """Return the number of steps that a run takes, should it not stop early."""
        most = self.epochs * (pictures // batch)
        return min(most, self.max_steps) if self.max_steps else most

    def loss_options(self, loss: str) -> dict[str, float]:
        """Return the options of `loss` by name.

        Raises InputError if an option is set that `loss` does not have.
        """
        losses = _losses()
        every = {name for entry in losses.values() for name in entry.options}
        for name in sorted(every - losses[loss].options):
            if getattr(self, name):
                able = ", ".join(k for k, entry in losses.items() if name in entry.options)
                raise InputError(
                    f"{name} is {getattr(self, name)}, but loss {loss} has no such option; "
                    f"leave it at 0 or use loss {able}"
                )
        return {name: getattr(self, name) for name in sorted(losses[loss].options)}


def _losses() -> Mapping[str, Loss]:
    """Return the registry of losses, which imports torch."""
    from clipkit.losses import LOSSES

    return LOSSES


def _converted(value: Any, kind: Any) -> Any:
    """Convert whole numbers to float and paths to str where the field asks for it."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return str(value) if kind is str and isinstance(value, Path) else value


def _check_type(name: str, value: Any, kind: Any) -> None:
    if choices := get_args(kind):
        check_choice(name, value, choices)
    elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise InputError(f"{name} is {value!r}; it must be {kinds[kind]}")
