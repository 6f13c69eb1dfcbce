"""Options as fields of frozen dataclasses: each carries its help, its limits and its default.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class QueueOptions:
        size: int = option("vectors kept as negatives", 4096, low=1)

A command line, a configuration file and their error messages are all made from such fields. The
methods and losses of training name such a class beside themselves (see `clipkit.losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from clipkit.errors import InputError, check_choice, check_limits


def option(
    help_text: str,
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    above: float | None = None,
    only: tuple[str, ...] = (),
) -> Any:
    """Make a field with its help and its limits: low <= value <= high, above < value < below.

    only: the recipes that use it; with another, a value that is not the default is refused.
    """
    limits = {"low": low, "high": high, "below": below, "above": above}
    limits = {kind: limit for kind, limit in limits.items() if limit is not None}
    return field(default=default, metadata={"help": help_text, "limits": limits, "only": only})


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """The options of what has none."""


def imported(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """Return a function, imported if it is given as "module:name"."""
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    result: Callable[..., Any] = getattr(import_module(module), name)
    return result


def option_fields(kind: type) -> dict[str, tuple[Field[Any], Any]]:
    """Return the options of a class by name: their fields and types."""
    hints = get_type_hints(kind)
    return {item.name: (item, hints[item.name]) for item in fields(kind) if item.metadata}


def converted(
    options: Mapping[str, tuple[Field[Any], Any]], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return values with whole numbers made float and paths made str where the option asks for it."""
    return {name: _converted(value, options[name][1]) for name, value in values.items()}


def check_options(options: object) -> None:
    """Check the types and limits of an instance. Raises InputError with name, value and limit."""
    for name, (item, hint) in option_fields(type(options)).items():
        value = getattr(options, name)
        check_type(name, value, hint)
        check_limits(name, value, **item.metadata["limits"])


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise InputError unless `value` is of the field's type, or one of its choices."""
    if choices := get_args(kind):
        check_choice(name, value, choices)
    elif not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise InputError(f"{name} is {value!r}; it must be {kinds[kind]}")


def _converted(value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return str(value) if kind is str and isinstance(value, Path) else value
