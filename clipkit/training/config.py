"""One frozen, typed configuration of a training run, from a TOML file, from flags, or from both.

Every option is a field that carries its help, its limits and its default; what depends on the recipe
is in `RECIPES`. A command line can be made from `dataclasses.fields(TrainConfig)` alone.
"""

# ruff: noqa: RUF009  what `_option` makes is a field
from __future__ import annotations

import difflib
import operator
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from clipkit.errors import InputError
from clipkit.losses import LOSSES, Duplicates

Recipe = Literal["heads", "lit", "lora", "full"]
LossName = Literal["auto", "infonce", "siglip"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

# What finishes well without tuning on 500 to 50,000 pairs. A picture is seen once an epoch.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "heads": {
        "epochs": 20,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "layer_decay": 1.0,
        "feature_dropout": 0.2,
        "ema": 0.0,
    },
    "lit": {
        "epochs": 8,
        "learning_rate": 5e-5,
        "weight_decay": 0.05,
        "layer_decay": 1.0,
        "feature_dropout": 0.0,
        "ema": 0.98,
    },
    "lora": {
        "epochs": 8,
        "learning_rate": 3e-4,
        "weight_decay": 0.01,
        "layer_decay": 1.0,
        "feature_dropout": 0.0,
        "ema": 0.98,
    },
    "full": {
        "epochs": 8,
        "learning_rate": 3e-5,
        "weight_decay": 0.05,
        "layer_decay": 0.8,
        "feature_dropout": 0.0,
        "ema": 0.98,
    },
}


def _option(
    words: str,
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    above: float | None = None,
) -> Any:
    """A field with its help and its limits: low <= value <= high, above < value < below."""
    limits = {"low": low, "high": high, "below": below, "above": above}
    return field(default=default, metadata={"help": words, "limits": limits})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All that decides a run. Made by `from_mapping` or `from_toml`, which know the recipes' defaults.

    InputError, with what, value, limit and remedy, for what cannot be trained as asked.
    """

    data: str = _option("dataset folder with train/ and, if there is one, validation/")
    out: str = _option("folder of runs", "runs")
    name: str = _option("the run's folder in it (default: the recipe and the time)", "")
    start: str = _option("the model to start from", "builtin")
    recipe: Recipe = _option("what is trained: heads, lit (texts), lora (adapters), full", "heads")

    loss: LossName = _option("infonce, siglip, or auto: what the model was made with", "auto")
    duplicates: Duplicates = _option("equal captions: mask them, or take them as positive", "mask")
    label_smoothing: float = _option("share of the target spread evenly", 0.0, low=0, below=1)
    hardness: float = _option("weight of hard negatives (Robinson 2021)", 0.0, low=0)
    debias: float = _option("share of false negatives (Chuang 2020)", 0.0, low=0, below=1)

    epochs: int = _option("times that every picture is seen", low=1)
    max_steps: int = _option("stop after so many steps (0: no such limit)", 0, low=0)
    batch: int = _option("pairs compared with each other (0: fitted to the data)", 0, low=0)
    chunk: int = _option("pairs in memory at a time (0: fitted to the device)", 0, low=0)
    learning_rate: float = _option("the highest, reached after warm-up", above=0, high=1)
    image_rate: float = _option("times learning_rate, for the image tower", 1.0, low=0)
    text_rate: float = _option("times learning_rate, for the text tower", 1.0, low=0)
    head_rate: float = _option("times learning_rate, for the two projections", 1.0, low=0)
    layer_decay: float = _option("each layer learns so much of the one above", above=0, high=1)
    weight_decay: float = _option("AdamW's, on matrices only", low=0)
    drift: float = _option(
        "furthest that matrices move, as a share of their size at the start "
        "(0: any; -1: fitted to the data)",
        -1.0,
        low=-1,
    )
    beta2: float = _option("AdamW's memory of squared gradients", 0.98, above=0, below=1)
    warmup: float = _option("share of the run over which the rate rises", 0.1, low=0, below=1)
    clip_norm: float = _option("longest gradient (0: any)", 1.0, low=0)

    train_image_layers: int = _option("only the last so many (-1: all)", -1, low=-1)
    train_text_layers: int = _option("only the last so many (-1: all)", -1, low=-1)
    lora_rank: int = _option("rank of the adapters", 16, low=1)
    lora_alpha: float = _option("adapters are scaled by alpha / rank", 16.0, above=0)
    dropout: bool = _option("the towers' own dropout and patch dropout act", False)
    feature_dropout: float = _option("of frozen features, in recipe heads", low=0, below=1)
    crop: float = _option("least share of a picture that crops keep", 0.5, above=0, high=1)
    flip: bool = _option("mirror half of the pictures", True)

    hard_negatives: int = _option("look-alikes put into a batch together (0: off)", 0, low=0)
    hard_negatives_every: int = _option("epochs between two searches for them", 1, low=1)
    hard_negatives_margin: float = _option(
        "who matches a caption better than this share of its own picture is spared",
        0.95,
        above=0,
        high=1,
    )

    ema: float = _option("decay of the running mean of the weights (0: off)", low=0, below=1)
    interpolate: bool = _option("mix with the start as validation says (WiSE-FT)", True)
    eval_every: int = _option("steps between evaluations (0: once an epoch)", 0, low=0)
    eval_pictures: int = _option("most validation pictures looked at (0: all)", 5000, low=0)
    patience: int = _option("evaluations without a better one before stopping (0: any)", 5, low=0)
    checkpoint_every: int = _option("steps between resumable states (0: at evaluations)", 0, low=0)

    device: str = _option("auto, cpu, cuda, mps", "auto")
    precision: Precision = _option("of the towers' arithmetic", "auto")
    activation_checkpointing: bool = _option("less memory, a third more time", False)
    workers: int = _option("decode threads (0: one a core)", 0, low=0)
    seed: int = _option("of orders, crops, captions, adapters", 0, low=0)
    tensorboard: bool = _option("write TensorBoard events", True)
    trackers: str = _option("report to these, too: wandb, mlflow, ... (by accelerate)", "")

    def __post_init__(self) -> None:
        hints = get_type_hints(TrainConfig)
        for item in fields(self):
            value = getattr(self, item.name)
            _check_type(item.name, value, hints[item.name])
            _check_limits(item.name, value, item.metadata["limits"])
        if -1 < self.drift < 0:
            raise InputError(f"drift is {self.drift:g}; it must be 0 or more, or -1 to be fitted")
        if self.loss != "auto":
            self.loss_options(self.loss)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> TrainConfig:
        """From names and values; the recipe's defaults fill what is not given."""
        names = [item.name for item in fields(cls)]
        for key in options:
            if key not in names:
                raise InputError(f"unknown key {key!r}{_nearest(key, names)}")
        if "data" not in options:
            raise InputError(
                "data is not given; name a dataset folder, as `clipkit data` writes it"
            )
        hints = get_type_hints(cls)
        given = {key: _converted(value, hints[key]) for key, value in options.items()}
        recipe = given.get("recipe", "heads")
        _check_type("recipe", recipe, Recipe)
        return cls(**{**RECIPES[recipe], **given})

    @classmethod
    def from_toml(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """From a TOML file of `key = value` lines; `overrides`, such as flags, win."""
        try:
            options = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not TOML: {error}") from None
        try:
            return cls.from_mapping({**options, **(overrides or {})})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for config.json; `from_mapping` reads them back."""
        return asdict(self)

    def loss_options(self, loss: str) -> dict[str, float]:
        """The options of `loss` by name; InputError where one is set that it does not have."""
        every = {name for known in LOSSES.values() for name in known.options}
        for name in sorted(every - LOSSES[loss].options):
            if getattr(self, name):
                able = ", ".join(k for k, known in LOSSES.items() if name in known.options)
                raise InputError(
                    f"{name} is {getattr(self, name)}, but loss {loss} has no such option; "
                    f"leave it at 0 or use loss {able}"
                )
        return {name: getattr(self, name) for name in sorted(LOSSES[loss].options)}


def _nearest(key: str, names: Iterable[str]) -> str:
    names = list(names)
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(names)}"


def _converted(value: Any, kind: Any) -> Any:
    """TOML and JSON write 1 for 1.0, and paths come as Path."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return str(value) if kind is str and isinstance(value, Path) else value


def _check_type(name: str, value: Any, kind: Any) -> None:
    if choices := get_args(kind):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(choices)}"
            raise InputError(f"{name} is {value!r}; {hint}")
    elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise InputError(f"{name} is {value!r}, {type(value).__name__}; it must be {wanted[kind]}")


_LIMITS: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "low": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "high": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def _check_limits(name: str, value: Any, limits: Mapping[str, float | None]) -> None:
    asked = {kind: limit for kind, limit in limits.items() if limit is not None}
    if not all(_LIMITS[kind][1](value, limit) for kind, limit in asked.items()):  # NaN fails too
        words = " and ".join(f"{_LIMITS[k][0]} {asked[k]:g}" for k in _LIMITS if k in asked)
        raise InputError(f"{name} is {value}; it must be {words}")
