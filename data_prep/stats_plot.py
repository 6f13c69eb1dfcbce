"""The picture of a data set: five plots and a contact sheet, by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from clipkit.errors import InputError
from clipkit.records import SPLITS
from data_prep.stats import SHEET, TILE, Stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT, _PAPER = "#1f2430", "#8a93a6", "#ffffff"
_BLUE = "#3b6fd4"
_OF_SPLIT = {"train": "#3b6fd4", "validation": "#e0a32e", "test": "#3aa17e", "": "#8a93a6"}
_WORDS = 24
_GAP = 8  # pixels between the tiles of the sheet


def draw(stats: Stats, path: Path, *, title: str) -> None:
    """Writes the picture to `path`, in the format that its suffix names. InputError if it cannot."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 9.5,
        "text.color": _INK,
        "axes.labelcolor": _FAINT,
        "axes.edgecolor": "#d5d9e2",
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "text.parse_math": False,  # a caption's dollars are dollars
        "font.family": ["DejaVu Sans"],
    }
    with rc_context(style):
        figure = Figure(figsize=(15, 13), facecolor=_PAPER)
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            3,
            4,
            height_ratios=(1.0, 1.0, 2.35),
            left=0.045,
            right=0.97,
            top=0.895,
            bottom=0.02,
            hspace=0.42,
            wspace=0.24,
        )
        _lengths(figure.add_subplot(grid[0, :2]), stats)
        _per_picture(figure.add_subplot(grid[0, 2]), stats)
        _splits(figure.add_subplot(grid[0, 3]), stats)
        _words(figure.add_subplot(grid[1, :3]), stats)
        _sizes(figure.add_subplot(grid[1, 3]), stats)
        _sheet(figure.add_subplot(grid[2, :]), stats)
        total = sum(stats.pictures.values())
        figure.text(0.045, 0.962, title, size=21, weight="bold", va="center")
        told = f"{total:,} pictures · {stats.captions:,} captions, {stats.distinct_captions:,} distinct"
        told += f" · {stats.unreadable:,} unreadable" if stats.unreadable else ""
        figure.text(0.045, 0.934, told, size=11.5, color=_FAINT, va="center")
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import warnings

    try:
        with (
            warnings.catch_warnings()
        ):  # words in letters that the font lacks: boxes are the answer
            warnings.filterwarnings("ignore", "Glyph")
            figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the picture {path}: {error}; name a .png file") from error


def _heading(axes: Axes, text: str, note: str = "") -> None:
    axes.set_title(text, loc="left", size=11, weight="bold", pad=9)
    if note:
        axes.set_title(note, loc="right", size=9.5, color=_FAINT, pad=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.yaxis.grid(True, color="#eceff4")
    axes.set_axisbelow(True)


def _lengths(axes: Axes, stats: Stats) -> None:
    words = stats.caption_words
    if not words.size:
        _heading(axes, "Words in a caption", "no captions")
        return
    last = int(np.percentile(words, 99.5)) + 1  # the tail goes into the last bar
    step = max(1, -(-last // 50))
    edges = np.arange(0.5, last + step + 0.5, step)
    axes.hist(np.clip(words, 1, edges[-1]), bins=edges.tolist(), color=_BLUE, rwidth=0.88)
    middle = float(np.median(words))
    axes.axvline(middle, color=_INK, lw=1, ls=(0, (3, 3)))
    _heading(axes, "Words in a caption", f"median {middle:g}, longest {words.max():,}")


def _per_picture(axes: Axes, stats: Stats) -> None:
    counts = np.minimum(stats.captions_per_picture, 10)
    values, heights = np.unique(counts, return_counts=True)
    bars = axes.bar(values, heights, color=_BLUE, width=0.7)
    axes.bar_label(bars, [f"{h:,}" for h in heights], color=_FAINT, size=8.5, padding=2)
    axes.set_xticks(values, [f"{v}+" if v == 10 else str(v) for v in values])
    axes.set_xlim(min(values) - 0.8, max(values) + 0.8)
    axes.set_yticks([])
    axes.margins(y=0.14)
    mean = stats.captions_per_picture.mean()
    _heading(axes, "Captions of a picture", f"mean {mean:.2g}")


def _splits(axes: Axes, stats: Stats) -> None:
    names = [name for name in (*SPLITS, "") if name in stats.pictures]
    heights = [stats.pictures[name] for name in names]
    total = sum(heights)
    bars = axes.barh(names, heights, color=[_OF_SPLIT[name] for name in names], height=0.62)
    labels = [f"{h:,}  ({h / total:.0%})" for h in heights]
    axes.bar_label(bars, labels, color=_INK, size=9, padding=4)
    axes.set_yticks(range(len(names)), [name or "no split" for name in names])
    axes.set_xlim(0, max(heights) * 1.45)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xticks([])
    _heading(axes, "Pictures in the splits")
    axes.spines["bottom"].set_visible(False)
    axes.yaxis.grid(False)
    axes.tick_params(axis="y", labelcolor=_INK)


def _words(axes: Axes, stats: Stats) -> None:
    common = stats.words.most_common(_WORDS)
    places = range(len(common))
    bars = axes.bar(places, [count for _, count in common], color=_BLUE, width=0.72)
    axes.bar_label(bars, [f"{c:,}" for _, c in common], color=_FAINT, size=7.5, padding=2)
    shown = [word if len(word) <= 14 else word[:13] + "…" for word, _ in common]
    axes.set_xticks(places, shown, rotation=38, ha="right", rotation_mode="anchor")
    axes.set_yticks([])
    axes.margins(x=0.01, y=0.12)
    _heading(axes, "Most frequent words", f"{len(stats.words):,} distinct")
    axes.tick_params(axis="x", labelcolor=_INK)


def _sizes(axes: Axes, stats: Stats) -> None:
    _heading(axes, "Sizes in pixels")
    if not stats.sizes.size:
        return
    sizes, counts = np.unique(stats.sizes, axis=0, return_counts=True)
    area = 12 + 500 * counts / counts.sum()
    axes.scatter(sizes[:, 0], sizes[:, 1], s=area, color=_BLUE, alpha=0.45, linewidths=0)
    room = 1.25 if sizes.max() > 2 * sizes.min() else 2.0  # of one size: still some ticks about it
    limits = (sizes.min() / room, sizes.max() * room)
    axes.plot(limits, limits, color="#d5d9e2", lw=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits, xlabel="width", ylabel="height")
    ticks = [t for t in 2.0 ** np.arange(4, 16) if limits[0] <= t <= limits[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_minor_locator(_no_ticks())
    middle = np.median(stats.sizes, axis=0)
    axes.set_title(
        f"median {middle[0]:.0f} × {middle[1]:.0f}", loc="right", size=9.5, color=_FAINT, pad=9
    )


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _sheet(axes: Axes, stats: Stats) -> None:
    across = min(SHEET[0], max(1, len(stats.tiles)))
    down = max(1, -(-len(stats.tiles) // across))
    step = TILE + _GAP
    sheet = Image.new("RGB", (SHEET[0] * step - _GAP, down * step - _GAP), _PAPER)
    for number, tile in enumerate(stats.tiles):
        y, x = divmod(number, across)
        back = Image.new("RGB", (TILE, TILE), _PAPER)
        back.paste(tile, ((TILE - tile.width) // 2, (TILE - tile.height) // 2))
        ImageDraw.Draw(back).rectangle((0, 0, TILE - 1, TILE - 1), outline="#dfe3ea", width=2)
        sheet.paste(back, (x * step, y * step))
    axes.imshow(sheet, interpolation="antialiased", aspect="equal")
    axes.set_axis_off()
    axes.set_anchor("NW")
    axes.set_title("A sample", loc="left", size=11, weight="bold", pad=9)
