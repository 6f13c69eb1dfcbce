"""What all commands have in common: wrong values, help, completion, progress; the feature cache."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import typer

from app.cli import cli, terminal
from app.cli.eval import Encoding, running
from app.paths import features_folder, index_folder
from clipkit.losses.pairs import Duplicates
from clipkit.options import option_fields
from clipkit.towers import Precision
from clipkit.training import config
from clipkit.training.registry import Duplicates as MethodDuplicates
from data_prep.split import MAX_RADIUS
from eval.features import PREPROCESSING, FeatureCache, Stopped

ROOT = Path(__file__).parent.parent
Run = Callable[..., tuple[int, str, str]]


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """The commands below a group, by their names without "clipkit"."""
    command = command or typer.main.get_command(cli)
    if not hasattr(command, "commands"):
        yield name, command
    for child, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {child}".strip())


COMMANDS = dict(commands())
# What a command needs before its options are read.
ARGUMENTS = {
    "index": ["."],
    "search": ["x"],
    "data build": ["x", "--out", "y"],
    "data check": ["x"],
    "data stats": ["x"],
    "train": ["x"],
    "eval compare": ["builtin", "builtin", "--data", "x"],
    "eval probe": ["--data", "x", "--train", "x"],
    "eval space": ["--data", "x"],
    "eval drift": ["--data", "x", "--against", "builtin"],
    **{f"eval {name}": ["--data", "x"] for name in ("retrieval", "zeroshot", "robustness")},
}
VALUES = {
    "N": ("many", "nan", "-7"),  # one of them is refused by every number
    "NAME": ("nonesuch",),
    "KIND": ("nonesuch",),
    "REASON": ("nonesuch",),
    "K,K,...": ("0", "1,x"),
    "N,N,...": ("0", "1,x"),
    "R,R,...": ("0", "2"),
    "KIND,...": ("nonesuch",),
    "NAME,...": ("nonesuch",),
    "PREFIX": ("nonesuch", "/a/../b"),
}
# Free names, which only the data or the network can refuse.
FREE = (
    "--image-column --caption-column --script --split --train-split --name --trackers --teacher"
).split()


def wrong_values() -> Iterator[tuple[str, str, str]]:
    for name, command in COMMANDS.items():
        for option in command.params:
            if option.param_type_name == "option" and not option.is_flag:
                free = option.opts[0] in FREE and (name, option.opts[0]) != (
                    "data build",
                    "--split",
                )
                for value in () if free else VALUES.get(option.metavar, ()):
                    if value != "-7" or option.opts[0] != "--seed" or name != "data build":
                        yield name, option.opts[0], value


@pytest.mark.parametrize(("command", "option", "value"), list(wrong_values()))
def test_a_wrong_value_is_one_sentence_with_option_value_and_limit(
    clipkit: Run, command: str, option: str, value: str
) -> None:
    """It is refused before anything is read: none of the arguments exists."""
    code, out, err = clipkit(*command.split(), *ARGUMENTS.get(command, []), option, value)
    assert code == 2 and not out
    shown = value if option == "--device" else rf"'?{re.escape(value)}(\.0)?'?"
    assert re.fullmatch(
        rf"clipkit: ({option} is {shown}; (it must be|use one of|did you mean) .+"
        rf"|device '{value}' is unknown; use auto, cpu, .+)\n",
        err,
    ), err


def test_the_options_that_have_values_are_all_tried() -> None:
    """An option of another metavar is a path, a spec or a text."""
    tried = {(name, option) for name, option, _ in wrong_values()}
    assert len(tried) > 90
    for name, command in COMMANDS.items():
        for option in command.params:
            if option.param_type_name == "option" and not option.is_flag:
                free = {"DIR", "FILE", "FILE|DIR", "DATA", "SPEC", "RUN", "NAME|FILE", "HOST"}
                known = option.metavar in free or option.opts[0] in FREE
                assert known or (name, option.opts[0]) in tried, f"{name} {option.opts}"


def test_choices_are_those_of_the_library() -> None:
    assert get_args(config.Precision) == get_args(Precision)
    assert get_args(MethodDuplicates) == get_args(Duplicates)
    assert MAX_RADIUS == 15


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_shows_examples_and_defaults(
    command: str, clipkit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = clipkit(*command.split(), "--help")
    assert code == 0
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "…" not in out and "<bool>" not in out, "neither cut nor of the types of Python"
    shown = [line.strip() for line in lines[lines.index(" Examples:") + 2 :]]
    assert [line for line in shown if line] == COMMANDS[command].epilog.splitlines()[2:]
    if "--index" in out and command != "eval space":
        assert "[default: (~/" in out or "[default: (/" in out
    assert len(lines) < 80


def test_the_defaults_that_help_shows_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPKIT_INDEX", raising=False)
    monkeypatch.delenv("CLIPKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    params = {p.opts[0]: p for name in ("index", "cache") for p in COMMANDS[name].params}
    for option, folder in (
        ("--index", index_folder(None)),
        ("--cache", features_folder(None)),
    ):
        assert Path(params[option].show_default).expanduser() == folder


# ---- completion, asked for as the shell does


def completions(*words: str, cwd: Path = ROOT) -> list[str]:
    environment = os.environ | {
        "_CLIPKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("clipkit", *words)),
        "COMP_CWORD": str(len(words)),
    }
    code = "import sys; sys.argv = ['clipkit']; from app.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "x", "--recipe", ""), ["heads", "lit", "lora", "full"]),
        (("search", "x", "--precision", "b"), ["bfloat16"]),
        (("index", "--device", "c"), ["cpu", "cuda"]),
        (("data", "check", "x", "--kind", "f"), ["flickr", "folder"]),
        (("data", "build", "x", "--near", ""), ["group", "drop", "ignore"]),
        (("eval", "retrieval", "--split", "t"), ["train", "test"]),
        (("eval", "retrieval", "--model", ""), ["builtin", "runs/mine"]),
        (("train", "--resume", "r"), ["runs/mine"]),
        (("train", "x", "--lora"), ["--lora-rank", "--lora-alpha"]),
        (("train", "x", "--no-fl"), ["--no-flip"]),
        (("train", "x", "--duplicates", ""), ["mask", "positive"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_shell_completes_options_and_values(
    words: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "runs" / "mine" / "checkpoint").mkdir(parents=True)
    assert completions(*words, cwd=tmp_path) == expected


@pytest.mark.end_to_end
def test_every_option_of_a_run_is_completed_without_torch(tmp_path: Path) -> None:
    shown = set(completions("train", "x", "--", cwd=tmp_path))
    every = [*option_fields(config.TrainConfig), *config.method_and_loss_options()]
    names = {name.replace("_", "-") for name in every}
    assert shown >= {f"--{name}" for name in names - {"data", "start"}}
    code = "import sys, app.cli; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- quiet, Ctrl-C


def test_quiet_shows_no_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", -1)
    with terminal.progress_shown(quiet=True) as show:
        show("indexing", 5, 1000)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("no_cache", "kept"), [(True, False), (False, True)])
def test_a_stopped_evaluation_says_whether_anything_is_kept(
    no_cache: bool, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = Encoding(cache=tmp_path, no_cache=no_cache, quiet=True)
    with pytest.raises(typer.Exit) as stop, running(shared):
        raise Stopped("stopped")
    assert stop.value.exit_code == 130
    out = capsys.readouterr().out
    assert ("encoded features are kept" in out, "nothing is kept" in out) == (kept, not kept)


# ---- the feature cache


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Three pictures and a distorted one of `builtin`, two texts of a run, one of an old version."""
    folder = tmp_path / "cache"  # as the fixture `clipkit` has it
    cache = FeatureCache(folder)
    for name, kind, number, spec in (
        (f"aaaa-float32-{PREPROCESSING}", "pictures", 3, "builtin"),
        (f"aaaa-float32-{PREPROCESSING}", "pictures-blur", 1, "builtin"),
        (f"bbbb-float32-{PREPROCESSING}", "texts", 2, "runs/mine"),
        ("cccc-float32-0.1.0-1", "texts", 1, "runs/old"),
    ):
        with cache.store(f"{name}/{kind}") as store:
            store.put([bytes([n]) for n in range(number)], np.ones((number, 4), np.float32))
            store.put_facts(name, {"spec": spec})
    return folder


def test_the_cache_is_listed_by_model(clipkit: Run, filled: Path) -> None:
    code, out, err = clipkit("cache")
    assert code == 0 and not err
    assert str(filled) in out
    assert "builtin (aaaa, float32): 4 vectors of pictures, 0 of texts\n" in out
    assert "runs/mine (bbbb, float32): 0 vectors of pictures, 2 of texts\n" in out
    assert "1 of texts; of clipkit 0.1.0-1, not used any more" in out
    content = json.loads(clipkit("cache", "--json")[1])
    assert content["cache"] == str(filled) and content["bytes"] > 0
    assert [(m["spec"], m["pictures"], m["texts"]) for m in content["models"]] == [
        ("builtin", 4, 0), ("runs/mine", 0, 2), ("runs/old", 0, 1),
    ]  # fmt: skip


def test_one_model_or_all_are_removed(
    clipkit: Run, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: pytest.fail("asked in spite of --yes"))
    code, out, _ = clipkit("cache", "--empty", "--model", "builtin", "--yes")
    assert code == 0 and "4 vectors removed" in out
    assert [m.spec for m in FeatureCache(filled).models()] == ["runs/mine", "runs/old"]
    code, _, err = clipkit("cache", "--empty", "--model", "builtin", "--yes")
    assert code == 2 and "nothing of model 'builtin'; it has runs/mine, runs/old" in err
    code, out, _ = clipkit("cache", "--empty", "--yes")
    assert code == 0 and "3 vectors removed" in out and "empty" in out
    assert FeatureCache(filled).models() == []


def test_emptying_asks_first(clipkit: Run, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    code, out, _ = clipkit("cache", "--empty")
    assert code == 1 and not out.strip()
    assert len(FeatureCache(filled).models()) == 3


def test_a_cache_that_is_not_there_is_empty(clipkit: Run, tmp_path: Path) -> None:
    code, out, _ = clipkit("cache", "--cache", tmp_path / "none")
    assert code == 0 and "0 B" in out and not (tmp_path / "none").exists()
