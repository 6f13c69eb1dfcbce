"""EvalReport: kept whole, told in text, and shown on a page that asks nobody for anything."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import InputError
from clipkit.metrics import Interval
from eval.reports import EvalReport, load, overview, save
from eval.reports.html import MOST_CLASSES, label, render_report
from eval.reports.wording import (
    cell_text,
    change_text,
    direction,
    interval_text,
    is_share,
    number_text,
    value_text,
)

DOT = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
EVIL = "<script>alert(1)</script>"
NAN = math.nan


def details(name: str = "cat") -> dict[str, Any]:
    """Every key that a page knows, with `name` wherever a name may stand."""
    return {
        "words": [f"Half of the pictures of {name} are found."],
        "curves": [
            {
                "title": f"By shots of {name}",
                "x_label": name,
                "y_label": "accuracy",
                "log_x": True,
                "series": [
                    {"name": name, "x": [1, 2, 4], "y": [0.2, 0.4, None], "low": [0.1, 0.3, None],
                     "high": [0.3, 0.5, None]},
                    {"name": "other", "x": [1, 2, 4], "y": [0.1, 0.2, 0.3]},
                ],
            }
        ],
        "reliability": [
            {
                "title": f"Reliability on {name}",
                "bins": [
                    {"low": 0.0, "high": 0.5, "confidence": 0.4, "accuracy": 0.3, "n": 10},
                    {"low": 0.5, "high": 1.0, "confidence": None, "accuracy": None, "n": 0},
                ],
            }
        ],
        "scatter": [
            {
                "title": f"Kinds for {name}",
                "x_label": "ms",
                "y_label": "recall@10",
                "points": [
                    {"name": name, "x": 0.1, "y": 0.9, "best": True},
                    {"name": "exact", "x": 9.0, "y": 1.0, "best": True},
                    {"name": "poor", "x": 5.0, "y": 0.4},
                ],
            }
        ],
        "confusion": {"classes": [name, "dog"], "counts": [[3, 1], [0, 4]]},
        "tables": [
            {"title": f"Classes like {name}", "columns": ["class", "recall", name],
             "rows": [[name, 0.75, None], ["dog", 1.0, 12345]], "note": f"Of {name}."}
        ],
        "mistakes": [
            {"title": f"Worst of {name}", "items": [
                {"name": name, "expected": name, "got": ["dog", name], "score": 0.971,
                 "thumbnail": DOT},
                {"name": name, "expected": name, "got": "dog", "score": None,
                 "thumbnail": "https://example.org/x.png"},
            ]}
        ],
    }  # fmt: skip


def report(name: str = "cat", **changes: Any) -> EvalReport:
    values: dict[str, Any] = {
        "task": "zeroshot",
        "dataset": name,
        "split": "test",
        "model": name,
        "encoder_id": "0123456789abcdef",
        "n": {"pictures": 1000, "classes": 2},
        "metrics": {
            "acc@1": Interval(0.4534, 0.431, 0.475, 1000),
            "text_to_image/median_rank": Interval(12.25, 11.0, 13.5, 1000),
            "temperature": Interval(0.83, NAN, NAN, 500),
        },
        "settings": {"templates": name, "ks": (1, 5), "calibrate": True},
        "fingerprint": "feedfacefeedface",
        "warnings": (f"{name} has no picture.",),
        "details": details(name),
        "seconds": {"encode": 1.25},
        "created_at": "2026-01-02T03:04:05+00:00",
        "command": f"clipkit eval zeroshot --data '{name}'",
        "versions": {"clipkit": "1"},
        "samples": {"acc@1": np.array([0.0, 1.0, 0.5])},
    }
    return EvalReport(**{**values, **changes})


class Page(HTMLParser):
    """The tags of a page with their attributes, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._inside:
            self.said += f" {data}"

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# ---- kept


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    """JSON has no NaN: the interval that a temperature lacks is null there and NaN again here."""
    made = report()
    save(made, tmp_path / "r")
    back = load(tmp_path / "r")
    assert back.to_json() == made.to_json()
    assert back.metrics["acc@1"] == made.metrics["acc@1"]
    assert math.isnan(back.metrics["temperature"].low)
    assert back.samples["acc@1"].tolist() == [0.0, 1.0, 0.5]
    assert back.warnings == made.warnings
    told = json.loads((tmp_path / "r" / "report.json").read_text(), parse_constant=pytest.fail)
    assert told["metrics"]["temperature"]["low"] is None
    files = sorted(path.name for path in (tmp_path / "r").iterdir())
    assert files == ["figures.csv", "report.html", "report.json", "report.md", "samples.npz"]
    rows = list(csv.DictReader((tmp_path / "r" / "figures.csv").read_text("utf-8").splitlines()))
    assert [(row["metric"], row["value"], row["low"], row["n"]) for row in rows] == [
        ("acc@1", "0.4534", "0.431", "1000"),
        ("text_to_image/median_rank", "12.25", "11.0", "1000"),
        ("temperature", "0.83", "", "500"),
    ]
    assert {row["dataset"] for row in rows} == {"cat"} and rows[0]["split"] == "test"


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    save(report(), tmp_path)
    save(report(samples={"acc@5": np.ones(2)}, dataset="other"), tmp_path)
    back = load(tmp_path)
    assert (back.dataset, list(back.samples)) == ("other", ["acc@5"])


def test_metric_names_may_hold_slashes_and_signs(tmp_path: Path) -> None:
    names = {"text_to_image/R@1", "linear@4shot/acc@1", "../up"}
    save(report(samples={name: np.arange(3.0) for name in names}), tmp_path / "r")
    assert set(load(tmp_path / "r").samples) == names
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_arrays_infinities_and_odd_bytes_become_json(tmp_path: Path) -> None:
    odd = {"words": ["caf\udce9"], "tables": [], "x": np.float32(0.5), "y": np.array([1, 2])}
    made = report(details={**odd, "z": float("inf")})
    save(made, tmp_path)
    assert load(tmp_path).details["z"] is None
    assert json.loads(made.to_json())["details"]["y"] == [1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no report in"),
        ("", "is damaged"),
        ("[1]", "is not a report of one evaluation"),
        ('{"format": "clipkit-comparison/1"}', "is not a report of one evaluation"),
        ('{"format": "clipkit-eval-report/1", "title": ""}', "is damaged"),
        ('{"format": "clipkit-eval-report/1", "title": "", "metrics": [1]}', "is damaged"),
    ],
)
def test_what_is_no_report_says_so(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=said):
        load(tmp_path)


def test_a_report_without_its_samples_is_damaged(tmp_path: Path) -> None:
    save(report(), tmp_path)
    (tmp_path / "samples.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path)
    (tmp_path / "samples.npz").unlink()
    with pytest.raises(InputError, match=r"samples\.npz is missing"):
        load(tmp_path)


# ---- told


def test_fractions_are_percent_and_ranks_are_not() -> None:
    made = report().metrics
    shown = {name: (value_text(name, i.value), interval_text(name, i)) for name, i in made.items()}
    assert shown == {
        "acc@1": ("45.3 %", "43.1 to 47.5"),
        "text_to_image/median_rank": ("12.2", "11.0 to 13.5"),
        "temperature": ("0.830", "–"),
    }


def test_what_a_name_says() -> None:
    shares = "R@10 image_to_text/R@1 acc@5 knn@5/acc@1 linear@4shot/acc@1 mAP MRR nDCG@10 ECE"
    assert all(map(is_share, shares.split()))
    assert not any(map(is_share, "median_rank NLL temperature hubness R@1_seconds".split()))
    assert [direction(n) for n in ("a/R@1", "a/mean_rank", "ECE", "NLL", "temperature")] == [
        1, -1, -1, -1, 0
    ]  # fmt: skip
    assert label("text_to_image/R@1") == "Text to image, R@1"
    assert label("mean_per_class_recall") == "Mean per-class recall"


def test_numbers_are_short() -> None:
    said = [cell_text(v) for v in (None, "text", True, 12345, 12345.6, 45.25, 6.9, 0.01234, NAN)]
    assert said == ["–", "text", "True", "12,345", "12,346", "45.2", "6.90", "0.0123", "–"]
    assert cell_text(0.5, "recall") == "50.0 %"


def test_numbers_have_one_minus_sign_and_no_exponent() -> None:
    """U+2212 as in all tables; what rounds to 0 has no sign; 2.14e-17 is a rounding error."""
    numbers = (-3.28, -0.219, -1234.0, -9.49e-05, -2.14e-17, 1e-6, 0.0, -0.0)
    assert [number_text(v) for v in numbers] == [
        "−3.28", "−0.219", "−1,234", "−0.0000949", "0", "0.0000010", "0", "0"
    ]  # fmt: skip
    assert value_text("R@1", -0.0004) == "0.0 %" and value_text("R@1", -0.02) == "−2.0 %"
    assert change_text("R@1", 0.0123) == "+1.2" and change_text("R@1", -0.0123) == "−1.2"
    assert change_text("mean_rank", -2.14e-17) == "+0"


def test_the_terminal_has_aligned_columns() -> None:
    lines = report().lines()
    assert lines[0] == (
        "Zero-shot classification on cat, split test: cat (01234567), 1,000 pictures, 2 classes"
    )
    ends = {len(line) for line in lines[1:5]}
    assert len(ends) == 1
    assert lines[2].split() == ["acc@1", "45.3", "%", "43.1", "to", "47.5", "1,000"]
    assert "warning: cat has no picture." in lines


def test_a_name_cannot_drive_a_terminal_or_markdown() -> None:
    """An escape sequence, a right-to-left override, and what Markdown would take for a link."""
    made = report("a\x1b[31m\u202e|[x](http://e)<b>\nz")
    told = made.to_markdown()
    for text in ("\n".join(made.lines()), told):
        assert "\x1b" not in text and "\u202e" not in text
    assert "\\|\\[x\\](http://e)\\<b\\>␊z" in told
    assert all(line.count("|") - line.count("\\|") in (0, 3, 4, 5) for line in told.splitlines())


def test_several_datasets_have_one_table_and_a_mean_that_counts_them_alike() -> None:
    """(0.4 + 0.8) / 2 = 0.6, whatever their sizes. The halves of the intervals are 0.03 and 0.04 below,
    0.06 and 0.08 above: their roots of summed squares are 0.05 and 0.10, of which a mean of two takes
    half (MOVER). Ranks have no mean over datasets, nor has a figure that one of them lacks."""
    one = report(
        dataset="data/pets",
        metrics={
            "acc@1": Interval(0.4, 0.37, 0.46, 100),
            "acc@5": Interval(0.9, 0.8, 0.95, 100),
            "mean_rank": Interval(3.0, 2.0, 4.0, 100),
        },
    )
    two = report(
        dataset="more/pets",
        metrics={
            "acc@1": Interval(0.8, 0.76, 0.88, 1000),
            "mean_rank": Interval(1.0, 1.0, 1.0, 1000),
        },
    )
    made, names = overview([one, two])
    assert names == ["pets 1", "pets 2"]
    (mean,) = (n for n in made.metrics if n.startswith("mean of"))
    assert mean == "mean of 2 datasets/acc@1"
    interval = made.metrics[mean]
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.6, 0.575, 0.65))
    assert interval.n == 1100 and made.n == {"datasets": 2, "pictures": 2000}
    assert made.metrics["pets 2/acc@1"] == two.metrics["acc@1"]
    lines = made.lines()
    assert [line.split() for line in lines if line.startswith(("dataset", "pets", "mean"))][
        -3:
    ] == [
        ["pets", "1", "40.0", "%", "90.0", "%", "3"],
        ["pets", "2", "80.0", "%", "–", "1"],
        ["mean", "of", "2", "datasets", "60.0", "%", "–", "–"],
    ]
    assert "40.0 %<small>37.0 to 46.0</small>" in render_report(made)
    assert "40.0 % (37.0 to 46.0)" in made.to_markdown()
    other, names = overview([one, two, report(dataset="data/pets", model="runs/b")])
    assert names == ["pets, cat 1", "pets, cat 2", "pets, b"]
    assert "mean of 2 datasets, cat/acc@1" in other.metrics and len(other.headline) == 1


# ---- the page


def test_the_page_asks_nobody() -> None:
    """No address outside: not in src, href, url(), srcset or @import; its policy says the same."""
    page = render_report(report())
    tags = Page(page)
    for tag, attributes in tags.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, name, value)
        assert "style" not in attributes, "the policy would not let it be"
        assert not [name for name in attributes if name.startswith("on")]
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    assert not {"script", "link", "iframe", "object", "base", "form"} & {t for t, _ in tags.tags}
    policy = next(m["content"] for m in tags.of("meta") if m.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy


def test_names_are_only_names() -> None:
    """A model, class or file may be called anything, HTML or mathematics included."""
    plain = Page(render_report(report("cat")))
    for name in (EVIL, '"><img src=x onerror=alert(1)>', "$\\frac{$", "{{7*7}}", "\x00\x1b\ud800"):
        page = render_report(report(name))
        assert EVIL not in page and "<img src=x" not in page and "49" not in Page(page).said
        assert [tag for tag, _ in Page(page).tags] == [tag for tag, _ in plain.tags]
    assert EVIL in Page(render_report(report(EVIL))).said


def test_only_pictures_that_travel_with_the_page_are_shown() -> None:
    shown = Page(render_report(report())).of("img")
    assert [image["src"] for image in shown] == [DOT]


def test_everything_has_a_name() -> None:
    """For who cannot see: headers have a scope, pictures an alt, figures a label and a caption."""
    page = render_report(report())
    tags = Page(page)
    assert all(header.get("scope") for header in tags.of("th"))
    assert all(image.get("alt") for image in tags.of("img"))
    drawings = [svg for svg in tags.of("svg") if svg.get("aria-hidden") != "true"]
    assert len(drawings) == 4
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in drawings)
    assert page.count("<figure") == page.count("<figcaption") == 6
    levels = [int(tag[1]) for tag, _ in tags.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_the_page_tells_what_was_measured_with_what() -> None:
    said = " ".join(Page(render_report(report())).said.split())
    for text in (
        "Zero-shot classification on cat, split test",
        "43.1 to 47.5 · n = 1,000",
        "cat has no picture.",
        "0123456789abcdef",
        "feedfacefeedface",
        "clipkit eval zeroshot --data 'cat'",
        "Half of the pictures of cat are found.",
        "Calibrate True",
        "75.0 %",  # a cell in a column of shares
        "Got (0.971) dog, cat",
    ):
        assert text in said


def test_the_same_report_gives_the_same_page() -> None:
    assert render_report(report()) == render_report(report())


def test_ids_are_unique_and_references_lead_somewhere() -> None:
    curves = details()["curves"] + [{**details()["curves"][0], "title": "Another"}]
    page = render_report(report(details={"curves": curves}))
    ids = re.findall(r'\bid="([^"]+)"', page)
    used = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert len(ids) == len(set(ids)) > 0
    assert set(used) == set(ids)


def test_a_heat_map_has_a_limit() -> None:
    """With a class more than fits nothing is drawn; the evaluators' table lists the pairs."""
    size = MOST_CLASSES + 1
    counts = np.eye(size, dtype=int) * 10
    counts[3, 5] = 7
    counts[4, 6] = 2
    names = [f"c{number}" for number in range(size)]
    confusion = {"classes": names, "counts": counts.tolist()}
    page = render_report(report(details={"confusion": confusion}))
    assert not [s for s in Page(page).of("svg") if "Confusion" in (s.get("aria-label") or "")]
    smaller = {"classes": names[:-1], "counts": counts[:-1, :-1].tolist()}
    cells = render_report(report(details={"confusion": smaller})).count("<title>c")
    assert cells == MOST_CLASSES + 2  # the empty ones are not drawn


def test_a_report_without_details_is_a_page() -> None:
    bare = report(details={}, warnings=(), settings={}, seconds={}, metrics={}, command="")
    assert "Settings and data" in Page(render_report(bare)).said


def test_drawing_leaves_no_trace_in_matplotlib() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    render_report(report())
    assert dict(mpl.rcParams) == before


@settings(max_examples=30)
@given(name=st.text(max_size=40), value=st.floats(allow_nan=True, allow_infinity=True))
def test_any_name_and_number_can_be_kept_and_shown(name: str, value: float) -> None:
    made = report(
        name,
        metrics={name: Interval(value, NAN, NAN, 1)},
        details={"tables": details(name)["tables"], "words": [name]},
    )
    json.loads(made.to_json(), parse_constant=pytest.fail)
    made.to_markdown()
    assert len({len(line) for line in made.lines()[1:3]}) == 1
    page = Page(render_report(made))
    assert not page.of("script")
