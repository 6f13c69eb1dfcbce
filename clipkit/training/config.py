"""The configuration of a training run: one frozen, typed dataclass, read from TOML, flags, or both.

Every option is a field that carries its help, its limits and its default; defaults that depend on the
recipe are in `RECIPES`. A command line can be made from `dataclasses.fields(TrainConfig)` alone.
"""

# ruff: noqa: RUF009  `option` returns a field
from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipkit.errors import InputError, check_choice, suggestion
from clipkit.losses import LOSSES, Loss, losses_of
from clipkit.options import check_options, check_type, converted, option, option_fields
from clipkit.training.registry import METHODS, Need, Recipe

# The command line's options are made of this module: it must not wait for torch. `towers.Precision`
# is the same.
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Keep = Literal["best", "last"]
BatchNorm = Literal["frozen", "batch"]
_WHOLE = ("lit", "lora", "full")  # the recipes that pass pictures and captions through the towers

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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """All options of a run. Use `from_mapping` or `from_toml`, which fill in the recipe's defaults.

    Raises InputError, naming the option, its value, its limit and the remedy.
    """

    data: str = option("dataset folder with train/ and, optionally, validation/")
    out: str = option("folder for runs", "runs")
    name: str = option("name of the run's folder in it (default: recipe and time)", "")
    start: str = option("model to start from", "builtin")
    recipe: Recipe = option("what to train: heads, lit (texts), lora (adapters), full", "heads")

    method: str = option("how to learn: see `clipkit train --methods`", "pairs")
    loss: str = option("a loss of the method, or auto: that of the starting model", "auto")

    epochs: int = option("passes over all pictures", low=1)
    max_steps: int = option("stop after this many steps (0: no limit)", 0, low=0)
    batch: int = option("pairs compared with each other (0: fitted to the data)", 0, low=0)
    chunk: int = option("pairs in memory at a time (0: fitted to the device)", 0, low=0)
    learning_rate: float = option("highest rate, reached after warm-up", above=0, high=1)
    image_rate: float = option("factor of learning_rate for the image tower", 1.0, low=0)
    text_rate: float = option("factor of learning_rate for the text tower", 1.0, low=0)
    head_rate: float = option("factor of learning_rate for the two projections", 1.0, low=0)
    layer_decay: float = option("factor of the rate per layer, from the top down", above=0, high=1)
    weight_decay: float = option("AdamW's weight decay, on matrices only", low=0)
    drift: float = option(
        "limit of a matrix's change, as a share of its size at the start "
        "(0: no limit; -1: fitted to the data)",
        -1.0,
        low=-1,
    )
    beta2: float = option("AdamW's decay of squared gradients", 0.98, above=0, below=1)
    warmup: float = option("share of the run over which the rate rises", 0.1, low=0, below=1)
    clip_norm: float = option("largest norm of the gradient (0: no limit)", 1.0, low=0)

    train_image_layers: int = option(
        "train only the last N layers (-1: all)", -1, low=-1, only=("full",)
    )
    train_text_layers: int = option(
        "train only the last N layers (-1: all)", -1, low=-1, only=("lit", "full")
    )
    lora_rank: int = option("rank of the adapters", 16, low=1, only=("lora",))
    lora_alpha: float = option("adapters are scaled by alpha / rank", 16.0, above=0, only=("lora",))
    dropout: bool = option("use the towers' own dropout and patch dropout", False, only=_WHOLE)
    batch_norm: BatchNorm = option(
        "BatchNorm's statistics: frozen, those of the start, or batch, those of each batch",
        "frozen",
        only=("full",),
    )
    feature_dropout: float = option("dropout of frozen features", low=0, below=1, only=("heads",))
    crop: float = option(
        "smallest share of a picture that crops keep", 0.5, above=0, high=1, only=_WHOLE
    )
    flip: bool = option("mirror half of the pictures", True, only=_WHOLE)

    ema: float = option("decay of the running mean of the weights (0: off)", low=0, below=1)
    interpolate: bool = option("mix with the start as validation suggests (WiSE-FT)", True)
    eval_every: int = option("steps between evaluations (0: once an epoch)", 0, low=0)
    eval_pictures: int = option("most validation pictures to use (0: all)", 5000, low=0)
    keep: Keep = option("weights: the best on validation, or the last, then not mixed", "best")
    patience: int = option("stop after N evaluations without improvement (0: never)", 5, low=0)
    checkpoint_every: int = option("steps between resumable states (0: at evaluations)", 0, low=0)

    device: str = option("auto, cpu, cuda, mps", "auto")
    precision: Precision = option("precision of the towers' arithmetic", "auto")
    activation_checkpointing: bool = option("less memory, a third more time", False, only=_WHOLE)
    workers: int = option("decode threads (0: by cores and the size of views)", 0, low=0)
    seed: int = option("seed of orders, crops, captions and adapters", 0, low=0)
    tensorboard: bool = option("write TensorBoard events", True)
    trackers: str = option("also report to wandb, mlflow, ... (through accelerate)", "")

    # The options of the method and the loss that are set, by name. On a command line and in a file
    # they lie among the others.
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self)
        check_choice("method", self.method, METHODS)
        if self.recipe not in (able := METHODS[self.method].recipes):
            raise InputError(
                f"recipe {self.recipe} cannot learn by method {self.method}; use recipe "
                f"{' or '.join(able)}"
            )
        check_choice("loss", self.loss, ("auto", *losses_of(METHODS[self.method].losses)))
        if self.batch_norm == "batch" and self.activation_checkpointing:
            raise InputError(
                "batch_norm is batch, but activation_checkpointing passes each block twice, which would "
                "count each batch's statistics twice; leave one of them out"
            )
        if -1 < self.drift < 0:
            raise InputError(f"drift is {self.drift:g}; it must be 0 or more, or -1 to be fitted")
        self._refuse_unused()
        self.method_options()
        for loss in losses_of(METHODS[self.method].losses) if self.loss == "auto" else [self.loss]:
            check_options(self._chosen(LOSSES[loss].options))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> TrainConfig:
        """Make a configuration from names and values, with the recipe's defaults for the rest.

        Raises InputError for unknown names, values outside their limits, and missing `data`.
        """
        own, others = option_fields(cls), method_and_loss_options()
        names = [*own, *others]
        for key in options:
            if key not in names:
                raise InputError(f"unknown key {key!r}; {suggestion(key, names, 'the keys are')}")
        if "data" not in options:
            raise InputError(
                "data is not given; name a dataset folder, as `clipkit data build` writes it"
            )
        values = converted({**own, **others}, options)
        method = values.get("method", "pairs")
        check_choice("method", method, METHODS)
        recipe = values.setdefault("recipe", METHODS[method].recipes[0])
        check_type("recipe", recipe, Recipe)
        given = {name: values.pop(name) for name in list(values) if name in others}
        given = {name: v for name, v in given.items() if any(v != d for d in _defaults(name))}
        return cls(**{**RECIPES[recipe], **METHODS[method].defaults, **values}, options=given)

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

    def to_mapping(self) -> dict[str, Any]:
        """Return names and values, from which `from_mapping` makes the same configuration."""
        values = asdict(self)
        return {**values.pop("options"), **values}

    def method_options(self) -> Any:
        """Return the method's options, an instance of its own class."""
        options = self._chosen(METHODS[self.method].options)
        check_options(options)
        return options

    def needs(self) -> frozenset[Need]:
        """Return what a picture must have to be used: the method's needs, and those of its options."""
        more: frozenset[Need] = getattr(self.method_options(), "needs", frozenset())
        return METHODS[self.method].needs | more

    def loss_options(self, loss: str) -> dict[str, Any]:
        """Return the options of `loss` by name.

        Raises InputError if an option is set that `loss` does not have.
        """
        self._refuse_unused(loss)
        return asdict(self._chosen(LOSSES[loss].options))

    def _chosen(self, kind: type) -> Any:
        """Return an instance of a class of options, with those that are set."""
        names = option_fields(kind)
        return kind(**{name: value for name, value in self.options.items() if name in names})

    def _refuse_unused(self, loss: str = "") -> None:
        """Raise InputError for an option that is set and that recipe, method or loss does not have."""
        entry, loss = METHODS[self.method], loss or self.loss
        losses = losses_of(entry.losses)
        used = {*option_fields(entry.options)}
        for name in losses if loss == "auto" else [loss]:
            used |= {*option_fields(losses[name].options)}
        for name, value in self.options.items():
            if name not in used:
                raise InputError(f"{name} is {value}, but {_without(name, self.method, loss)}")
        defaults = {**RECIPES[self.recipe], **entry.defaults}
        for name, (item, _) in option_fields(type(self)).items():
            value, only = getattr(self, name), item.metadata["only"]
            if value == defaults.get(name, item.default):
                continue
            if only and self.recipe not in only:
                raise InputError(
                    f"{name} is {value}, but recipe {self.recipe} does not use it; leave it out, or "
                    f"use recipe {' or '.join(only)}"
                )
            if name in entry.unused:
                raise InputError(
                    f"{name} is {value}, but method {self.method} does not use it; leave it out"
                )


def _defaults(name: str) -> Iterator[Any]:
    """Yield the default of an option in each method and loss that has it; they may differ."""
    for kind in _option_kinds():
        if name in (own := option_fields(kind)):
            yield own[name][0].default


def method_and_loss_options() -> dict[str, tuple[Field[Any], Any]]:
    """Return the options of all methods and losses by name: their fields and types. One whose default
    depends on the method or loss has none here."""
    options = {n: found for kind in _option_kinds() for n, found in option_fields(kind).items()}
    for name, (item, kind) in options.items():
        if any(item.default != default for default in _defaults(name)):
            item = option(item.metadata["help"], **item.metadata["limits"])
            item.name = name
            options[name] = item, kind
    return options


def _option_kinds() -> list[type]:
    """Return the classes of options of all methods and losses."""
    methods = [method.options for method in METHODS.values()]
    return methods + [loss.options for loss in usable_losses().values()]


def usable_losses() -> dict[str, Loss]:
    """Return the losses that some method can be trained with, by name."""
    kinds = {method.losses for method in METHODS.values()}
    return {name: loss for name, loss in LOSSES.items() if loss.kind in kinds}


def _without(name: str, method: str, loss: str) -> str:
    """Say who does not have an option, and who does."""
    losses = [key for key, entry in LOSSES.items() if name in option_fields(entry.options)]
    methods = [key for key, entry in METHODS.items() if name in option_fields(entry.options)]
    who = f"method {method}" if methods else f"loss {loss}"
    able = [
        f"{kind} {', '.join(names)}"
        for kind, names in (("method", methods), ("loss", losses))
        if names
    ]
    return f"{who} has no such option; leave it out or use {' or '.join(able)}"
