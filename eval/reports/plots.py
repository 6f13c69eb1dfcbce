"""Draw plots as inline SVG whose colours come from the page's style sheet, light or dark.

matplotlib draws with placeholder colours; `_page_svg` turns each into a class (`fill-1`, `line-ink`,
...) and every `style` attribute into presentation attributes, which a strict content security policy
allows. Equal values give equal bytes. The legend is HTML, where long names wrap.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np

from clipkit.wording import printable
from eval.reports.wording import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 6  # colours of the style sheet; a seventh series reuses the first
WIDTH, HEIGHT = 4.9, 3.3  # inches of 72 units: text of 11 units stays readable on a phone
LINES = ("-", (0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (3, 1.5)), (0, (8, 2)))
DASHES = ("", "8 3", "2 2.6", "9 3 2 3", "5 2.4", "12 3")  # LINES as the page's legend draws them
MARKERS = "os^Dvp"
INK, GRID, PAPER = "#010101", "#020202", "#030303"
_HUES = tuple(f"#0400{number:02x}" for number in range(1, SERIES + 1))
_CLASSES = {INK: "ink", GRID: "grid", PAPER: "paper"} | {
    hue: str(number) for number, hue in enumerate(_HUES, 1)
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def curves(curve: Mapping[str, Any]) -> str:
    """Draw lines over x, with a band where a series has `low` and `high`. html.py lists the keys."""
    figure, axes = _axes(curve["x_label"], curve["y_label"])
    if curve.get("log_x"):
        axes.set_xscale("log")
    for number, series in enumerate(curve["series"]):
        hue = _HUES[series.get("hue", number) % SERIES]
        dash = series.get("dash", number) % SERIES
        x, y = _floats(series["x"]), _floats(series["y"])
        if series.get("low") and series.get("high"):
            low, high = _floats(series["low"]), _floats(series["high"])
            axes.fill_between(x, low, high, color=hue, alpha=0.16, linewidth=0)
        if series.get("faint"):
            axes.plot(x, y, color=hue, alpha=0.3, linewidth=1)
            continue
        marker = MARKERS[dash] if len(x) <= 12 else ""
        axes.plot(
            x, y, color=hue, linestyle=LINES[dash], marker=marker, markersize=4, linewidth=1.8
        )
    if "mark" in curve:
        axes.axvline(curve["mark"], color=INK, linestyle=LINES[2], linewidth=1.2)
    if curve.get("log_x"):
        _plain_log_ticks(axes, [float(x) for s in curve["series"] for x in s["x"]])
    _percents(axes, curve["y_label"])
    return _page_svg(figure, curve["title"])


def reliability(diagram: Mapping[str, Any]) -> str:
    """Draw accuracy over confidence per bin, with the diagonal; below it the bin's size."""
    figure = _figure(3.9)
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1), "hspace": 0.08}
    )
    bins = [b for b in diagram["bins"] if b["n"]]
    left = _floats([b["low"] for b in bins])
    width = _floats([b["high"] for b in bins]) - left
    _plain_axes(upper, "", "accuracy")
    _plain_axes(lower, "confidence", "n")
    upper.bar(left, _floats([b["accuracy"] for b in bins]), width, align="edge", color=_HUES[0],
              alpha=0.28, edgecolor=PAPER, linewidth=1)  # fmt: skip
    upper.plot([0, 1], [0, 1], color=INK, linestyle=LINES[1], linewidth=1.2, alpha=0.6)
    upper.plot(_floats([b["confidence"] for b in bins]), _floats([b["accuracy"] for b in bins]),
               color=_HUES[0], marker="o", markersize=4, linewidth=1.8)  # fmt: skip
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    counts = _floats([b["n"] for b in bins])
    lower.bar(
        left, counts, width, align="edge", color=INK, alpha=0.35, edgecolor=PAPER, linewidth=1
    )
    lower.set_yticks([0, float(counts.max(initial=1))])
    return _page_svg(figure, diagram["title"])


def scatter(plot: Mapping[str, Any]) -> str:
    """Draw numbered points, the best ones (a Pareto front) filled and joined."""
    figure, axes = _axes(plot["x_label"], plot["y_label"])
    points = plot["points"]
    best = sorted((float(p["x"]), float(p["y"])) for p in points if p.get("best"))
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color=_HUES[0], linewidth=1.4, alpha=0.5)
    for number, point in enumerate(points, 1):
        chosen = bool(point.get("best"))
        x, y = float(point["x"]), float(point["y"])
        axes.plot([x], [y], marker="o", markersize=13, color=_HUES[0] if chosen else PAPER,
                  markeredgecolor=_HUES[0] if chosen else INK, markeredgewidth=1)  # fmt: skip
        axes.annotate(str(number), (x, y), ha="center", va="center_baseline", fontsize=8.5,
                      color=PAPER if chosen else INK)  # fmt: skip
    xs = [float(p["x"]) for p in points]
    if xs and 0 < 8 * min(xs) < max(xs):  # too wide for an even scale
        axes.set_xscale("log")
        _plain_log_ticks(axes, xs)
    axes.margins(0.08, 0.12)
    _percents(axes, plot["y_label"])
    return _page_svg(figure, plot["title"])


def confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Draw a heat map with a row per true class; a cell's opacity is its share of the row.

    Not matplotlib's, so that empty cells cost nothing and each cell has a tooltip.
    """
    size = len(classes)
    cell = max(9, min(34, 520 // size))
    edge = 6.2 * min(16, max(len(name) for name in classes)) + 10
    side = size * cell
    top = 0.75 * edge + 14
    parts = []
    for row, (name, numbers) in enumerate(zip(classes, counts, strict=True)):
        total = sum(numbers) or 1
        middle = top + (row + 0.5) * cell + 3.5
        parts.append(_text(edge - 6, middle, _short(name), "end"))
        for column, number in enumerate(numbers):
            x, y = edge + column * cell, top + row * cell
            if number:
                share = number / total
                tooltip = f"{name} → {classes[column]}: {number:,} of {total:,}"
                tone = "fill-1" if row == column else "fill-2"
                parts.append(
                    f'<rect class="{tone}" x="{x:g}" y="{y:g}" width="{cell - 1}" '
                    f'height="{cell - 1}" fill-opacity="{0.05 + 0.6 * share:.2f}">'
                    f"<title>{escape(printable(tooltip), quote=False)}</title></rect>"
                )
            if number and cell >= 26:
                parts.append(
                    _text(x + cell / 2, y + cell / 2 + 3.5, f"{number}", "middle", ink="strong")
                )
        x = edge + (row + 0.5) * cell + 3
        turned = f' transform="rotate(-50 {x:g} {top - 5:g})"'
        parts.append(_text(x, top - 5, _short(name), "start", turned))
    box = f"0 0 {edge + side + 0.6 * edge:g} {top + side + 2:g}"
    frame = f'<rect class="line-grid" fill="none" x="{edge - 1:g}" y="{top - 1:g}" '
    frame += f'width="{side + 1}" height="{side + 1}"/>'
    label = f"Confusion of {size} classes: true class by row, predicted class by column"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{frame}{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "", *, ink: str = "ink") -> str:
    return (
        f'<text class="fill-{ink}" x="{x:g}" y="{y:g}" font-size="11" text-anchor="{anchor}"{more}>'
        f"{escape(printable(text), quote=False)}</text>"
    )


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


# ---- drawing


def _figure(height: float = HEIGHT) -> Figure:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = _figure()
    axes = figure.subplots()
    _plain_axes(axes, x_label, y_label)
    return figure, axes


def _plain_axes(axes: Axes, x_label: str, y_label: str) -> None:
    # parse_math: a name with two dollar signs is not a formula
    axes.set_xlabel(_label(x_label), color=INK, fontsize=11, parse_math=False)
    axes.set_ylabel(_label(y_label), color=INK, fontsize=11, parse_math=False)
    axes.tick_params(colors=INK, labelsize=10.5, length=0, pad=5, which="both")
    axes.grid(visible=True, axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def _label(text: str) -> str:
    # matplotlib measures text with a font that has no pictures of control characters
    return printable(re.sub(r"[\x00-\x1f]", " ", text))


def _plain_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Put ticks at the values if there are few, else at powers of ten, written as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    distinct = sorted({value for value in values if value > 0})
    if 1 < len(distinct) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(distinct))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.4g}"))


def _percents(axes: Axes, y_label: str) -> None:
    """Write the ticks of an axis of shares as percent."""
    from matplotlib.ticker import PercentFormatter

    low, high = axes.get_ylim()
    if is_share(y_label) and low >= -0.2 and high <= 1.2:
        axes.yaxis.set_major_formatter(PercentFormatter(1, 1 if high - low < 0.05 else 0, " %"))


def _floats(values: Sequence[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


# ---- from matplotlib's SVG to the page's


def _page_svg(figure: Figure, title: str) -> str:
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "clipkit", "svg.fonttype": "none"}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    root = ET.fromstring(out.getvalue())
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _move_style(element)
    _name_ids(
        root, hashlib.blake2b(out.getvalue() + printable(title).encode(), digest_size=4).hexdigest()
    )
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-label": printable(title)}
    return ET.tostring(root, encoding="unicode")


def _move_style(element: ET.Element) -> None:
    """Turn the style into attributes, and placeholder colours into classes."""
    if element.tag != "text":
        element.text = None  # white space
    element.tail = None
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    for part in element.attrib.pop("style", "").split(";"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name == "font":  # "11px 'DejaVu Sans', ...": the page has its own
            element.set("font-size", re.sub(r"px.*", "", value).split()[-1])
        elif name and name != "font-family":
            element.set(name, value)
    classes = []
    for name, kind in (("fill", "fill"), ("stroke", "line")):
        if (colour_class := _CLASSES.get(element.get(name, ""))) is not None:
            del element.attrib[name]
            classes.append(f"{kind}-{colour_class}")
    if element.tag == "text" and not classes:
        classes.append("fill-ink")
    if classes:
        element.set("class", " ".join(classes))


def _name_ids(root: ET.Element, mark: str) -> None:
    """Keep the ids that are referred to, with a prefix that is unique in a page of many plots."""
    used: set[str] = set()
    for element in root.iter():
        if (link := element.attrib.pop(_LINK, None)) is not None:
            element.set("href", f"#{mark}-{link.removeprefix('#')}")
            used.add(link.removeprefix("#"))
        if (clip := element.get("clip-path")) is not None:
            name = clip.removeprefix("url(#").removesuffix(")")
            element.set("clip-path", f"url(#{mark}-{name})")
            used.add(name)
    for element in root.iter():
        if (name := element.attrib.pop("id", "")) in used:
            element.set("id", f"{mark}-{name}")
