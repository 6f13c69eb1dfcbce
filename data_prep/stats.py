"""Statistics of a dataset, as text and as a figure by matplotlib (imported only when it is drawn)."""

from __future__ import annotations

import heapq
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from clipkit.embed import in_order
from clipkit.errors import ImageError, InputError
from clipkit.images import decode, image_id
from clipkit.records import SPLITS
from clipkit.sources import Broken, Picture, Row, Source
from clipkit.wording import class_sizes, count
from data_prep.clean import LabelError, class_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHEET = (14, 5)  # pictures across and down the contact sheet
_TILE = 144  # pixels
_GAP = 8  # pixels between tiles
_INK, _FAINT, _PAPER = "#1f2430", "#8a93a6", "#ffffff"
_BLUE = "#3b6fd4"
_OF_SPLIT = {"train": "#3b6fd4", "validation": "#e0a32e", "test": "#3aa17e", "": "#8a93a6"}
_WORDS = 24  # drawn

# Stop words: they say nothing about what a picture shows.
_STOP = frozenset(
    """a an the and or of in on at to for from with by as is are was were be been being it its this that
    these those there their his her he she they them him while into onto over up down out off near next
    some one two three who which has have having him not no s t el la los las un una de del en y con der
    die das und ein eine einer einem einen mit auf im am den dem ist von zu""".split()
)


@dataclass(frozen=True, slots=True, eq=False)
class Stats:
    """Counts over all splits together."""

    pictures: Mapping[str, int]  # by split; "" for none
    captions_per_picture: NDArray[np.int64]  # (N,)
    caption_words: NDArray[np.int64]  # (M,) words in each caption
    sizes: NDArray[np.int64]  # (R, 2): width, height of the pictures that could be read
    words: Counter[str]  # without stop words
    labels: Counter[str]  # pictures of each class; one with several classes counts in each
    labelled: int  # pictures with a label
    captions: int
    distinct_captions: int
    unreadable: int
    tiles: tuple[Image.Image, ...]  # a sample by content hash: the same in each run

    @property
    def uncaptioned(self) -> int:
        """Return the number of pictures without a caption."""
        return int((self.captions_per_picture == 0).sum())


_Thumbnail = tuple[str, tuple[int, int], Image.Image]  # image_id, (width, height), small picture


def collect(
    source: Source,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> Stats:
    """Read a source once, with every picture. Raises DatasetError if it gives no picture."""
    pictures: Counter[str] = Counter()
    per_picture: list[int] = []
    lengths: list[int] = []
    sizes: list[tuple[int, int]] = []
    words: Counter[str] = Counter()
    classes: dict[int, list[str]] = {}  # of each labelled picture, by its place in per_picture
    distinct: set[int] = set()
    unreadable = done = 0
    first: Broken | None = None
    # A heap of the smallest content hashes: a sample that does not depend on the order of rows.
    sample: list[tuple[int, int, Image.Image]] = []
    order = itertools.count()
    started: set[Path] = set()
    numbers: dict[Path, int] = {}  # place in per_picture of each file: it may have several rows

    def start(pool: ThreadPoolExecutor, row: Row | Broken) -> Future[_Thumbnail | None] | None:
        if isinstance(row, Broken) or row.picture.path in started:
            return None
        if row.picture.path is not None:
            started.add(row.picture.path)
        return pool.submit(_thumbnail, row.picture)

    for done, (row, future) in enumerate(in_order(source.rows(), start, workers), 1):
        if isinstance(row, Broken):
            first = first or row
            unreadable += 1
        else:
            number, path = len(per_picture), row.picture.path
            if path is not None:
                number = numbers.setdefault(path, number)
            if number == len(per_picture):
                pictures[row.split or ""] += 1
                per_picture.append(0)
            per_picture[number] += len(row.captions)
            with suppress(LabelError):  # `build` lists what is no class
                if names := class_names(row.label, source.classes):
                    classes.setdefault(number, names)
            for caption in row.captions:
                tokens = re.findall(r"\w+(?:['’]\w+)?", caption.casefold())
                lengths.append(len(tokens))
                words.update(token for token in tokens if _is_telling(token))
                distinct.add(hash(caption.casefold()))
            thumbnail = future.result() if future else None
            if future and thumbnail is None:
                unreadable += 1
            elif thumbnail is not None:
                identity, size, rgb = thumbnail
                sizes.append(size)
                heapq.heappush(sample, (-int(identity[:12], 16), next(order), rgb))
                if len(sample) > _SHEET[0] * _SHEET[1]:
                    heapq.heappop(sample)
        if on_progress:
            on_progress(done, source.total)
    if not pictures:
        raise source.nothing_read(done, first)
    return Stats(
        dict(pictures),
        np.array(per_picture, np.int64),
        np.array(lengths, np.int64),
        np.array(sizes, np.int64).reshape(-1, 2),
        words,
        Counter(name for names in classes.values() for name in names),
        len(classes),
        len(lengths),
        len(distinct),
        unreadable,
        tuple(rgb for _, _, rgb in sorted(sample, key=lambda item: item[:2], reverse=True)),
    )


def _is_telling(word: str) -> bool:
    """Return whether a word is no number, no single Latin letter and no stop word."""
    return word not in _STOP and not word.isdigit() and (len(word) > 1 or not word.isascii())


def _thumbnail(picture: Picture) -> _Thumbnail | None:
    """Return a picture's thumbnail and size, None if it cannot be read."""
    try:
        data = picture.read()
        decoded = decode(data, target=_TILE // 2)
    except ImageError:
        return None
    small = decoded.rgb
    small.thumbnail((_TILE, _TILE), Image.Resampling.BICUBIC)
    return image_id(data), (decoded.width, decoded.height), small


def lines(stats: Stats) -> list[str]:
    """Return the statistics as lines of text."""
    total = sum(stats.pictures.values())
    splits = [n for n in (*SPLITS, "") if n in stats.pictures]
    listed = ", ".join(f"{name or 'no split'} {stats.pictures[name]:,}" for name in splits)
    text = [f"pictures   {total:,} ({listed})"]
    if stats.unreadable:
        text.append(f"unreadable {stats.unreadable:,}")
    each = stats.captions_per_picture
    captions = (
        f"captions   {stats.captions:,}, {stats.distinct_captions:,} distinct; "
        f"{each.min()} to {each.max()} a picture, mean {each.mean():.2f}"
    )
    captions += f"; {count(stats.uncaptioned)} without" if stats.uncaptioned else ""
    text.append(captions if stats.captions else "captions   none")
    if stats.labels:
        largest = ", ".join(f"{name} {n:,}" for name, n in stats.labels.most_common(15))
        without = sum(stats.pictures.values()) - stats.labelled
        text.append(f"labels     {class_sizes(stats.labels.values(), without)}")
        text.append(f"classes    {largest}{', ...' if len(stats.labels) > 15 else ''}")
    if stats.caption_words.size:
        low, middle, high = np.percentile(stats.caption_words, (5, 50, 95))
        text.append(
            f"words      {middle:g} in a caption (5 % below {low:g}, 5 % above {high:g}, "
            f"longest {stats.caption_words.max():,})"
        )
        common = ", ".join(f"{word} {n:,}" for word, n in stats.words.most_common(15))
        text.append(f"frequent   {common}")
    if stats.sizes.size:
        sides = stats.sizes.min(axis=1)
        width, height = np.median(stats.sizes, axis=0)
        text.append(
            f"sizes      median {width:.0f} x {height:.0f}; shorter side {sides.min()} to "
            f"{sides.max()} pixels"
        )
    return text


# ---- the figure


def draw(stats: Stats, path: Path, *, title: str) -> None:
    """Draw five plots and a contact sheet to `path`, in the format of its suffix.

    Raises InputError if the file cannot be written.
    """
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
        "text.parse_math": False,  # a dollar in a caption is no formula
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
        summary = f"{total:,} pictures · {stats.captions:,} captions"
        summary += f", {stats.distinct_captions:,} distinct" if stats.captions else ""
        summary += f" · {len(stats.labels):,} classes" if stats.labels else ""
        summary += f" · {stats.unreadable:,} unreadable" if stats.unreadable else ""
        figure.text(0.045, 0.934, summary, size=11.5, color=_FAINT, va="center")
        try:
            with warnings.catch_warnings():
                # Letters that the font lacks are drawn as boxes.
                warnings.filterwarnings("ignore", "Glyph")
                figure.savefig(path, dpi=110)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot write the picture {path}: {error}; name a .png file"
            ) from error


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
        axes.set(xticks=[], yticks=[])
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
    counter, title = stats.words, "Most frequent words"
    if not counter and stats.labels:
        counter, title = stats.labels, "Largest classes"
    common = counter.most_common(_WORDS)
    places = range(len(common))
    bars = axes.bar(places, [count for _, count in common], color=_BLUE, width=0.72)
    axes.bar_label(bars, [f"{c:,}" for _, c in common], color=_FAINT, size=7.5, padding=2)
    shown = [word if len(word) <= 14 else word[:13] + "…" for word, _ in common]
    axes.set_xticks(places, shown, rotation=38, ha="right", rotation_mode="anchor")
    axes.set_yticks([])
    axes.margins(x=0.01, y=0.12)
    _heading(axes, title, f"{len(counter):,} distinct")
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
        axis.set_ticks([], minor=True)
    middle = np.median(stats.sizes, axis=0)
    axes.set_title(
        f"median {middle[0]:.0f} × {middle[1]:.0f}", loc="right", size=9.5, color=_FAINT, pad=9
    )


def _sheet(axes: Axes, stats: Stats) -> None:
    across = min(_SHEET[0], max(1, len(stats.tiles)))
    down = max(1, -(-len(stats.tiles) // across))
    step = _TILE + _GAP
    sheet = Image.new("RGB", (_SHEET[0] * step - _GAP, down * step - _GAP), _PAPER)
    for number, tile in enumerate(stats.tiles):
        y, x = divmod(number, across)
        if (times := _TILE // max(tile.size)) > 1:
            tile = tile.resize((tile.width * times, tile.height * times), Image.Resampling.NEAREST)
        back = Image.new("RGB", (_TILE, _TILE), _PAPER)
        back.paste(tile, ((_TILE - tile.width) // 2, (_TILE - tile.height) // 2))
        ImageDraw.Draw(back).rectangle((0, 0, _TILE - 1, _TILE - 1), outline="#dfe3ea", width=2)
        sheet.paste(back, (x * step, y * step))
    axes.imshow(sheet, interpolation="antialiased", aspect="equal")
    axes.set_axis_off()
    axes.set_anchor("NW")
    axes.set_title("A sample", loc="left", size=11, weight="bold", pad=9)
