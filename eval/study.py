"""A study: several training runs on the same pictures, and one report that compares what they learned.

A study is a TOML file. What stands at its top is common to all runs; runs lie in groups, each with
a title and, if it varies a number, the name of its axis:

    title = "SimCLR on CIFAR-10"
    method = "simclr"
    epochs = 30

    [groups.temperature]
    title = "Temperature"
    axis = "temperature"
    [groups.temperature.runs."0.1"]
    temperature = 0.1
    [groups.temperature.runs."0.5"]
    temperature = 0.5

    [groups.methods]
    common = { batch = 128 }               # of the group's runs
    [groups.methods.runs."before training"]
    model = "builtin"                      # measured as it is

Runs with the same options are one run, whatever their groups. Each is a folder that `train` makes;
a study that was stopped goes on where it was. All are measured by the probes of `eval.probes`, fitted
on the training split, on the test split (or the validation split), and tested against the first.
"""

from __future__ import annotations

import json
import re
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipkit import metrics
from clipkit.checkpoint import absolute
from clipkit.errors import InputError
from clipkit.metrics import corrected_p, paired_test
from clipkit.training import Progress, RunSummary, TrainConfig, resume, train
from clipkit.wording import duration
from eval.data import Labelled
from eval.features import Encoder
from eval.probes import evaluate_probe
from eval.reports.report import EvalReport, curve, interval_series
from eval.reports.wording import change_text, interval_text, p_text, value_text
from eval.session import Results, Session

_OWN = {"title", "groups"}  # keys of the file that are no options of a run
FIGURES = {"linear/acc@1": "linear probe", "knn@5/acc@1": "5 nearest neighbours"}
SHAPE = ("effective_rank", "variance", "uniformity")
_ROWS = 5_000  # of vectors, whose spectrum is drawn
_LEAST_SHARE = (
    1e-6  # of the variance, that is drawn: a direction without any would flatten the rest
)


@dataclass(frozen=True, slots=True)
class Run:
    """One row of a study: a run to train, or a model that is measured as it is."""

    name: str
    config: TrainConfig | None
    model: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that are compared in one plot."""

    title: str
    runs: Mapping[str, str]  # the name in the group -> the name in the study
    axis: str = ""  # what the names count, if they are numbers


@dataclass(frozen=True, slots=True)
class Study:
    """The content of a study file."""

    title: str
    runs: Mapping[str, Run] = field(
        default_factory=dict
    )  # the first is what others are tested against
    groups: Sequence[Group] = ()


def is_study(path: Path) -> bool:
    """Return whether a TOML file is a study, not the options of one run. Never raises."""
    try:
        return "groups" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def read_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study file; `overrides`, such as flags, are common to all runs.

    Raises InputError, naming the file and the run, for what it cannot contain.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    common = {key: value for key, value in content.items() if key not in _OWN}
    runs: dict[str, Run] = {}
    known: dict[object, str] = {}
    groups = []
    for key, group in _tables(path, content.get("groups"), "groups"):
        names = {}
        for name, options in _tables(path, group.get("runs"), f"groups.{key}.runs"):
            where = f"{path}, [groups.{key}.runs.{json.dumps(name, ensure_ascii=False)}]"
            label = name if name not in runs else f"{key}: {name}"
            run = _run(
                label, {**common, **group.get("common", {}), **options}, overrides or {}, where
            )
            same = run.model or json.dumps(_identity(run), sort_keys=True)
            names[name] = known.setdefault(same, label)
            runs.setdefault(names[name], run)
        groups.append(Group(str(group.get("title", key)), names, str(group.get("axis", ""))))
    return Study(str(content.get("title", path.stem)), runs, groups)


def _tables(path: Path, table: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if (
        not isinstance(table, dict)
        or not table
        or not all(isinstance(t, dict) for t in table.values())
    ):
        raise InputError(f"{path}: [{name}] must hold at least one table, such as [{name}.first]")
    yield from table.items()


def _run(name: str, options: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Run:
    if "model" in options:
        return Run(name, None, str(options["model"]))
    try:
        return Run(name, TrainConfig.from_mapping({**options, **overrides}))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _identity(run: Run) -> dict[str, Any]:
    """Return the options that decide a run, comparable with those in a run's folder."""
    assert run.config is not None
    options = run.config.to_mapping()
    options["start"] = absolute(options["start"])
    for name in ("data", "out", "name", "device", "workers", "chunk", "trackers", "tensorboard"):
        options.pop(name)
    return options


# ---- training


def train_study(
    study: Study,
    folder: Path,
    data: str,
    *,
    on_progress: Callable[[str, Progress], None] | None = None,
    stop: threading.Event | None = None,
    command: str = "",
) -> Mapping[str, RunSummary] | None:
    """Train every run of a study in a folder below `folder`, or go on with it; None if stopped.

    data: a dataset folder for all runs. on_progress: gets the run's name and its progress. Raises
    InputError if a folder holds a run with other options, and what `train` raises.
    """
    stop = stop or threading.Event()
    summaries: dict[str, RunSummary] = {}
    for run in study.runs.values():
        if run.config is None:
            continue
        place = folder / slug(run.name)

        def show(progress: Progress, name: str = run.name) -> None:
            if on_progress is not None:
                on_progress(name, progress)

        if (place / "config.json").is_file():
            _check_same(run, place)
            if not (place / "summary.json").is_file():
                summaries[run.name] = resume(place, on_progress=show, stop=stop)
        else:
            options = {**run.config.to_mapping(), "data": data, "out": str(folder)}
            config = TrainConfig.from_mapping({**options, "name": place.name})
            summaries[run.name] = train(config, on_progress=show, stop=stop, command=command)
        if run.name in summaries and summaries[run.name].stopped:
            return None
    return summaries


def slug(name: str) -> str:
    """Return a run's name as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.") or "run"


def _check_same(run: Run, place: Path) -> None:
    facts = json.loads((place / "config.json").read_text(encoding="utf-8"))
    before = _identity(Run(run.name, TrainConfig.from_mapping(facts["config"])))
    now = _identity(run)
    for name in before.keys() | now.keys():
        if before.get(name) != now.get(name):
            raise InputError(
                f"{place} holds a run with {name} {before.get(name)}, but the study says "
                f"{now.get(name)}; remove the folder, or give the study another --name"
            )


# ---- measuring


def study_report(
    study: Study,
    encoders: Mapping[str, Encoder],
    train_split: Labelled,
    test: Labelled,
    *,
    folder: Path,
    session: Session | None = None,
) -> EvalReport:
    """Measure every run's model by probes and by the shape of its space.

    encoders: by the names of the study's runs. folder: that of `train_study`, whose runs' metrics are
    drawn. The first run is the baseline of all tests.
    """
    session, results = session or Session(), Results("study")
    reports: dict[str, EvalReport] = {}
    spectra: dict[str, np.ndarray[Any, Any]] = {}
    shapes: dict[str, dict[str, float]] = {}
    for name in study.runs:
        reports[name] = evaluate_probe(
            encoders[name], train_split, test, knn_ks=(5,), session=session
        )
        features = session.picture_features(encoders[name], test.pictures)
        vectors = features.vectors[:_ROWS]
        spectrum = metrics.covariance_spectrum(vectors)
        spectra[name] = spectrum / max(spectrum.sum(), 1e-12)
        shapes[name] = {
            "variance": float(spectrum.sum()),
            "effective_rank": metrics.effective_rank(spectrum),
            "uniformity": metrics.uniformity(vectors),
        }
    baseline, *others = study.runs
    for name, report in reports.items():
        for figure in FIGURES:
            results.metrics[f"{name}/{figure}"] = report.metrics[figure]
            results.samples[f"{name}/{figure}"] = report.samples[figure]
        results.warnings += [f"{name}: {warning}" for warning in report.warnings]
    results.headline = [f"{name}/linear/acc@1" for name in study.runs]
    tests = _tests(reports, session.seed)
    results.sentences += _sentences(reports, tests, shapes, baseline, others)
    results.tables.append(_table(study, reports, tests, shapes, folder))
    for group in study.groups:
        results.curves += _curves(group, reports, spectra, shapes, folder)
    last = reports[baseline]
    results.settings |= last.settings
    return results.report(
        session,
        n=last.n,
        fingerprint=last.fingerprint,
        dataset=test.name,
        split=test.split,
        model=study.title,
        encoder_id=last.encoder_id,
    )


def _tests(
    reports: Mapping[str, EvalReport], seed: int
) -> dict[tuple[str, str], tuple[metrics.Paired, float]]:
    """Test every run against the first: (run, figure) -> (difference, p), all corrected together."""
    baseline, *others = reports
    keys = [(name, figure) for name in others for figure in FIGURES]
    if not keys:
        return {}
    before = {figure: reports[baseline].samples[figure] for figure in FIGURES}
    changes = [reports[name].samples[figure] - before[figure] for name, figure in keys]
    return {
        key: (paired_test(before[key[1]], reports[key[0]].samples[key[1]], seed=seed), float(p))
        for key, p in zip(keys, corrected_p(changes, seed=seed), strict=True)
    }


def _sentences(
    reports: Mapping[str, EvalReport],
    tests: Mapping[tuple[str, str], tuple[metrics.Paired, float]],
    shapes: Mapping[str, Mapping[str, float]],
    baseline: str,
    others: Sequence[str],
) -> Iterator[str]:
    figure = "linear/acc@1"
    if others:
        best = max(others, key=lambda name: reports[name].metrics[figure].value)
        paired, p = tests[best, figure]
        yield (
            f"{best} has the highest figure: a linear probe on it is right in "
            f"{value_text(figure, reports[best].metrics[figure].value)} of cases, "
            f"{change_text(figure, paired.difference)} against {baseline} ({p_text(p)})."
        )
    collapsed = [
        name
        for name in others
        if shapes[name]["variance"] < 0.25 * shapes[baseline]["variance"]
        or shapes[name]["effective_rank"] < 0.25 * shapes[baseline]["effective_rank"]
    ]
    for name in collapsed:
        shape = shapes[name]
        yield (
            f"{name} collapsed: its variance is {shape['variance']:.3g} and its effective rank "
            f"{shape['effective_rank']:.3g}, those of {baseline} are "
            f"{shapes[baseline]['variance']:.3g} and {shapes[baseline]['effective_rank']:.3g}."
        )


def _table(
    study: Study,
    reports: Mapping[str, EvalReport],
    tests: Mapping[tuple[str, str], tuple[metrics.Paired, float]],
    shapes: Mapping[str, Mapping[str, float]],
    folder: Path,
) -> dict[str, Any]:
    baseline = next(iter(reports))
    rows = []
    for name, report in reports.items():
        row: list[Any] = [name]
        for figure in FIGURES:
            found = report.metrics[figure]
            row.append([value_text(figure, found.value), interval_text(figure, found)])
            if (name, figure) in tests:
                paired, p = tests[name, figure]
                low, high = (change_text(figure, end) for end in (paired.low, paired.high))
                change = change_text(figure, paired.difference)
                row.append(f"{change} ({low} to {high}), {p_text(p)}")
            else:
                row.append("–")
        row += [f"{shapes[name][key]:.3g}" for key in SHAPE]
        summary = folder / slug(name) / "summary.json"
        trained = study.runs[name].config is not None and summary.is_file()
        facts = json.loads(summary.read_text(encoding="utf-8")) if trained else {}
        row += [f"{facts['steps']:,}", duration(facts["seconds"])] if facts else ["–", "–"]
        rows.append(row)
    columns = ["run"]
    for title in FIGURES.values():
        columns += [title, f"against {baseline}"]
    columns += [key.replace("_", " ") for key in SHAPE] + ["steps", "training time"]
    note = "Differences are over the same pictures, their p-values corrected for all of the table."
    return {
        "title": "All runs", "columns": columns, "rows": rows,
        "note": note, "first": True, "terminal": True,
    }  # fmt: skip


def _curves(
    group: Group,
    reports: Mapping[str, EvalReport],
    spectra: Mapping[str, np.ndarray[Any, Any]],
    shapes: Mapping[str, Mapping[str, float]],
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """Yield a group's plots: accuracy and rank over its axis, spectra, and figures by step."""
    if group.axis:
        x = [float(name) for name in group.runs]
        of = [reports[run] for run in group.runs.values()]
        series = [
            interval_series(title, x, [report.metrics[figure] for report in of])
            for figure, title in FIGURES.items()
        ]
        log = min(x) > 0 and max(x) / min(x) > 8
        yield curve(f"{group.title}: accuracy", group.axis, "accuracy", series, log_x=log)
        ranks = [shapes[run]["effective_rank"] for run in group.runs.values()]
        rank = {"name": f"{group.title}: effective rank", "x": x, "y": ranks}
        yield curve(rank["name"], group.axis, "effective rank", [rank], log_x=log)  # type: ignore[arg-type]
    series = []
    for name, run in group.runs.items():
        shares = np.maximum(spectra[run], _LEAST_SHARE)
        series.append(
            {"name": name, "x": [*range(1, len(shares) + 1)], "y": np.log10(shares).tolist()}
        )
    note = (
        "A flat line: all directions are used. A steep one: a few hold the whole variance. "
        "What has less than a millionth of it is drawn as if it had that."
    )
    label = "log10 of the share of the variance"
    yield curve(f"{group.title}: spectrum", "direction", label, series, log_x=True, note=note)
    for figure, label in (
        ("knn_accuracy", "accuracy of 5 nearest neighbours"),
        ("effective_rank", "effective rank"),
    ):
        series = []
        for name, run in group.runs.items():
            lines = [line for line in _lines(folder / slug(run)) if figure in line]
            if len(lines) > 1:
                series.append(
                    {
                        "name": name,
                        "x": [line["step"] for line in lines],
                        "y": [line[figure] for line in lines],
                    }
                )
        if series:
            title = f"{group.title}: {label} by step, validation split"
            yield curve(title, "step", label.partition(" of ")[0], series)


def _lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics; none for a model that is measured as it is."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines()]
