"""A study: runs of one file, trained once each, compared in one report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clipkit.training
from clipkit.errors import InputError
from clipkit.training import TrainConfig
from clipkit.training.registry import METHODS
from eval.study import is_study, read_study, slug

FILE = """
title = "Rates"
recipe = "heads"
epochs = 1
batch = 8
{common}

[groups.rates]
title = "Learning rate"
axis = "learning rate"
[groups.rates.runs."0.001"]
learning_rate = 0.001
[groups.rates.runs."0.01"]
learning_rate = 0.01

[groups.models.runs.before]
model = "{model}"
[groups.models.runs.usual]
learning_rate = 0.001
"""


def write(folder: Path, model: object = "builtin", common: str = "") -> Path:
    path = folder / "rates.toml"
    path.write_text(FILE.format(model=model, common=common))
    return path


def test_runs_with_the_same_options_are_one_run(tmp_path: Path) -> None:
    """ "usual" is "0.001" under another name: three rows, not four."""
    path = write(tmp_path)
    study = read_study(path, {"data": "d", "seed": 5})
    assert study.title == "Rates" and list(study.runs) == ["0.001", "0.01", "before"]
    assert study.groups[1].runs == {"before": "before", "usual": "0.001"}
    first = study.runs["0.001"].config
    assert first is not None and first.learning_rate == 0.001 and first.seed == 5
    assert study.runs["before"].config is None and study.runs["before"].model == "builtin"
    assert is_study(path) and not is_study(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("groups = 3", r"\[groups\] must hold at least one table, such as \[groups.first\]"),
        ("[groups.a]\ntitle = 'x'", r"\[groups.a.runs\] must hold at least one table"),
        ('[groups.a.runs."1 x"]\nrate = 2', r'\[groups.a.runs."1 x"\]: unknown key .rate.'),
        ("groups = [", "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_place(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_study(path, {"data": "d"})


@pytest.mark.parametrize(
    ("name", "folder"),
    [("tau 0.07", "tau-0.07"), ("../x/", "x"), ("a: b", "a-b"), ("日本", "日本")],
)
def test_a_run_has_a_folder_of_its_name(name: str, folder: str) -> None:
    assert slug(name) == folder


@pytest.mark.end_to_end
def test_a_study_trains_and_reports(
    clipkit: Callable[..., tuple[int, str, str]], small_towers: Path, tmp_path: Path
) -> None:
    """Two colours, told apart by any tower. A second call trains nothing and reports again; a changed
    option is refused."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    lines = []
    for number in range(40):
        kind, hue = (("red", (200, 40, 40)), ("blue", (40, 40, 200)))[number % 2]
        pixels = np.clip(np.array(hue) + rng.integers(-40, 40, (16, 16, 3)), 0, 255)
        picture = Image.fromarray(pixels.astype(np.uint8)).resize((48, 48))
        picture.save(tmp_path / "data" / f"{number}.png")
        row = {"file_name": f"{number}.png", "caption": f"{kind} number {number}", "label": kind}
        lines.append(json.dumps(row))
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    path = write(tmp_path, small_towers, f'start = "{small_towers}"\ninterpolate = false')
    call = ["train", tmp_path / "data", "--config", path, "--out", tmp_path / "runs"]
    code, out, err = clipkit(*call)
    assert code == 0, err
    assert "0.01 has the highest figure" in out or "before has the highest figure" in out
    folder = tmp_path / "runs" / "rates"
    assert {p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."} == {
        "0.001",
        "0.01",
    }
    report = json.loads((folder / "report.json").read_text())
    names = {name.partition("/")[0] for name in report["metrics"]}
    assert names == {"0.001", "0.01", "before"}
    assert report["metrics"]["before/knn@5/acc@1"]["value"] == 1.0
    (table,) = report["details"]["tables"]
    assert [row[0] for row in table["rows"]] == ["0.001", "0.01", "before"]
    assert table["rows"][2][3][0] == "100.0 %" and report["title"].startswith("Study on")
    titles = [plot["title"] for plot in report["details"]["curves"]]
    assert "Learning rate: accuracy" in titles and "models: spectrum" in titles
    made = (folder / "0.01" / "summary.json").stat().st_mtime_ns
    assert clipkit(*call)[0] == 0
    assert (folder / "0.01" / "summary.json").stat().st_mtime_ns == made
    code, _, err = clipkit(*call, "--epochs", "2")
    assert code == 2 and "holds a run with epochs 1, but the study says 2; remove the folder" in err


RECIPES = sorted((Path(__file__).parent.parent / "eval" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_can_be_read(path: Path) -> None:
    """Every option exists, has a value within its limits, and is used by its method."""
    if is_study(path):
        assert len(read_study(path, {"data": "d"}).runs) > 3
    else:
        assert TrainConfig.from_toml(path, {"data": "d"}).method == "simclr"


def test_the_page_of_methods_names_each() -> None:
    page = (Path(clipkit.training.__file__).parent / "METHODS.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\|[^|]*\| `(\w+)`", page, re.MULTILINE)) == set(METHODS)
