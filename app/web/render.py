"""Hits, runs and empty states as HTML: pure functions, values in, text out.

Every text that comes from outside (file names, captions, queries, errors) passes through `text`,
which escapes it for HTML and makes it printable. The strings become values of Gradio's HTML
component, whose template here is only `${value}`: Gradio puts the value in with innerHTML and
evaluates nothing in it. A Handlebars hole such as {{value}} must never be used instead: Gradio
evaluates what came out of it as a JavaScript template literal.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from clipkit.wording import count, duration, printable

if TYPE_CHECKING:
    from app.web.indexing import Run

_KINDS = (("yes", True, "check", "right"), ("no", False, "close", "wrong"))


def buttons(rank: int, query: str | None, right: bool | None) -> str:
    """A check and a cross for the hit of this rank; `right` is its present mark, None without one.
    Nothing without a `query` that a mark could speak of."""
    if query is None:
        return ""
    return "".join(
        f'<button type="button" class="mark" data-do="mark" data-right="{sent}" '
        f'aria-pressed="{"true" if right is value else "false"}" '
        f'aria-label="Result {rank} is {word} for “{text(query)}”" '
        f'title="{word.capitalize()} for this search"><i class="i-{icon}"></i></button>'
        for sent, value, icon, word in _KINDS
    )


def summary(total: int) -> str:
    """How many corrections there are, and their file; hidden while there are none."""
    return (
        f'<span class="corrections"{"" if total else " hidden"}>'
        f'<span class="total">{count(total, "correction")}</span> '
        '<a href="corrections.jsonl" download="clipkit-corrections.jsonl" '
        'title="Right and wrong results as JSONL, for clipkit data build">Export corrections</a></span>'
    )


BANDS: Mapping[str, str] = {
    "strong": "Stands out clearly from the rest of the library",
    "fair": "Above the rest of the library, not by much",
    "weak": "Hardly above the rest of the library",
}
NARROWEST, WIDEST = 0.56, 2.4  # width / height of a tile; the picture is shown whole inside it


@dataclass(frozen=True, slots=True)
class Card:
    """What one result shows. `score` and `strength` are None where nothing was compared."""

    rank: int
    image_id: str
    name: str  # file name
    caption: str  # empty: there is none
    width: int
    height: int
    score: float | None = None
    strength: str | None = None
    drawn: bool = False  # rather a drawing than a photo: stands on white
    marks: str = ""  # safe HTML: the buttons of render_marks.py


def text(value: str) -> str:
    """`value` printable and escaped, for an element's content and for quoted attributes."""
    return html.escape(printable(value), quote=True)


def facts(pairs: Sequence[tuple[int, str]]) -> str:
    """[(3, "added"), (0, "moved")] -> "3 added": what did not happen goes without saying."""
    return ", ".join(f"{number:,} {word}" for number, word in pairs if number) or "nothing to do"


# ---- the header and the filters


def status(
    *, spec: str, encoder_id: str | None, model: str, pictures: int, newest: str | None
) -> str:
    """Which model and which index answer. `model` is "ready", "loading" or "unloaded"."""
    identity = f" <small>{text(encoder_id[:8])}</small>" if encoder_id else ""
    when = f'<time datetime="{text(newest)}">{text(newest[:10])}</time>' if newest else ""
    states = {"ready": "ready", "loading": "is being loaded"}
    title = f"Model {spec}, encoder {encoder_id or 'not known yet'}: "
    title += states.get(model, "is loaded by the first search")
    return (
        f'<p class="status" data-model="{text(model)}" data-pictures="{pictures}">'
        f'<span class="model" title="{text(title)}"><i class="dot"></i>{text(spec)}{identity}</span>'
        f"<span>{count(pictures)}</span>{f'<span>indexed {when}</span>' if when else ''}</p>"
    )


def filters(folders: Sequence[tuple[str, str, int]]) -> str:
    """Dates and folders, the latter as (path, key, pictures below); the page sends the key."""
    parts = [PurePath(path).parts for path, _, _ in folders]
    shared = 0  # leading parts that all have, and none consists of alone
    while parts and len({p[shared] for p in parts}) == 1 and min(map(len, parts)) > shared + 1:
        shared += 1
    options = "".join(
        f'<option value="{text(key)}" title="{text(path)}">'
        f"{text('/'.join(names[shared:]))} ({pictures:,})</option>"
        for (path, key, pictures), names in zip(folders, parts, strict=True)
    )
    return (
        '<div class="narrow"><label>Folder <select name="folder"><option value="">All folders'
        f'</option>{options}</select></label><label>From <input type="date" name="after"></label>'
        '<label>To <input type="date" name="until"></label>'
        '<button type="button" class="plain" data-do="clear-filters">Clear</button></div>'
    )


# ---- before the first search


def home(
    *, pictures: int, chips: Sequence[str], newest: Sequence[Card], corrections: str = ""
) -> str:
    """What invites to search. `corrections` is safe HTML."""
    buttons = "".join(
        f'<button type="button" class="chip" data-do="words" data-words="{text(chip)}">'
        f"{text(chip)}</button>"
        for chip in chips
    )
    tiles = "".join(_tile(card, bare=True) for card in newest)
    return (
        f'<div class="home" data-view="home"><div class="chips">{buttons}</div>'
        '<p class="hint">Or ask with a picture: drop, paste or choose one to find its like among '
        f"{count(pictures)}.</p>"
        + (f'<p class="hint">{corrections}</p>' if corrections else "")
        + (f'<h2>Newest pictures</h2><ol class="grid">{tiles}</ol>' if tiles else "")
        + "</div>"
    )


def empty(*, may_index: bool, indexing: bool) -> str:
    """What to do while there is nothing to search."""
    if indexing:
        return (
            '<div class="home" data-view="empty"><h1>Reading your pictures</h1><p class="lead">You '
            "can search as soon as the first ones are in, a few seconds from now.</p></div>"
        )
    return (
        '<div class="home" data-view="empty"><h1>Nothing indexed yet</h1><p class="lead">Name a '
        "folder of pictures on this computer. clipkit reads it with all folders inside it and "
        "leaves every file as it is. Nothing is sent anywhere.</p>"
        f'{add_form(may_index=may_index)}<p class="hint">Or in a terminal: '
        "<code>clipkit index ~/Pictures</code></p></div>"
    )


def add_form(*, may_index: bool) -> str:
    """The form that names a folder to index, or why there is none."""
    if not may_index:
        return (
            '<p class="hint">Other computers can reach this page, so it does not index. On the '
            "server: <code>clipkit index FOLDER</code></p>"
        )
    return (
        '<form class="add" data-do="index"><input type="text" name="folder" required '
        'placeholder="/home/me/Pictures" aria-label="Folder to index" spellcheck="false" '
        'autocomplete="off" autocapitalize="off">'
        '<button type="submit" class="primary">Index</button></form>'
    )


# ---- results


def results(
    cards: Sequence[Card],
    *,
    question: str,
    key: str,
    ticket: str,
    total: int,
    seconds: float,
    page: int,
    query: str = "",
    corrections: str = "",
) -> str:
    """The gallery.

    `question` and `corrections` are safe HTML. `query` is sent with a mark of right or wrong. `key`,
    hex digits, is the question's own: Gradio changes what stands on the page node by node, so a longer
    list for one question only grows, while the element's name makes another question replace all.
    `ticket` is the page's number, by which it knows its answer.
    """
    bands = [card.strength for card in cards]
    first_weak = len(bands)
    while first_weak and bands[first_weak - 1] == "weak":
        first_weak -= 1
    tiles = [_tile(card) for card in cards]
    if tiles and first_weak == 0:
        said = "Nothing stands out for this. These are the nearest"
        tiles.insert(0, f'<li class="divider all"><span>{said}</span></li>')
    elif first_weak < len(tiles):
        tiles.insert(first_weak, '<li class="divider"><span>Weak from here on</span></li>')
    body = f'<ol class="grid">{"".join(tiles)}</ol>'
    if not cards:
        body = (
            '<div class="nothing"><p>No picture passes this.</p><button type="button" '
            'data-do="clear-filters">Clear the filters</button></div>'
        )
    elif len(cards) < total:
        more = min(page, total - len(cards))
        body += (
            f'<div class="more"><button type="button" data-do="more" data-k="{len(cards) + more}">'
            f"Show {more:,} more</button></div>"
        )
    return (
        f'<found-{key} class="results" data-view="results" data-ticket="{text(ticket)}" '
        f'data-query="{text(query)}"><div class="summary"><h2>{question}</h2><p>{len(cards):,} of '
        f"{count(total)}, {duration(seconds)}{corrections}</p></div>{body}</found-{key}>"
    )


def failure(sentence: str, *, ticket: str = "") -> str:
    """An error as the sentence that it is."""
    return (
        '<div class="results failure" role="alert" data-view="results" '
        f'data-ticket="{text(ticket)}"><p>{text(sentence)}</p></div>'
    )


def _tile(card: Card, *, bare: bool = False) -> str:
    ratio = min(max(card.width / max(card.height, 1), NARROWEST), WIDEST)
    identity, alt, name = text(card.image_id), text(card.caption or card.name), text(card.name)
    band = card.strength if card.strength in BANDS else ""
    score = "" if card.score is None else f"{card.score:.3f}"
    label = alt if bare else f"Result {card.rank}: {alt}"
    under = ""
    if not bare:
        said = f'<span class="band" title="{BANDS[band]}">{band}</span>' if band else ""
        if score:
            said += f'<span class="score" title="Cosine to what was asked">{score[:-1]}</span>'
        under = (
            f'<div class="under">{said}<span class="name" title="{name}">{name}</span>'
            '<button type="button" class="icon" data-do="similar" title="Find similar" '
            f'aria-label="Find pictures like result {card.rank}"><i class="i-similar"></i></button>'
            "</div>"
        )
    classes = " ".join(filter(None, ("hit", band, "drawn" if card.drawn else "")))
    return (
        f'<li class="{classes}" data-id="{identity}" data-score="{score}" data-band="{band}" '
        f'style="--ratio:{ratio:.3f}"><button type="button" class="open" data-do="open" '
        f'aria-label="{label}"><img src="thumbnails/{identity}" alt="{alt}" loading="lazy" '
        f'decoding="async"></button>{card.marks}{under}</li>'
    )


# ---- an indexing run


def run_card(told: Run) -> str:
    """An indexing run as it stands, told as a card."""
    progress, summary = told.progress, told.summary
    done = total = 0
    if told.error is not None:
        line = told.error
    elif summary is not None:
        pairs = [
            (summary.added, "added"),
            (summary.moved, "moved"),
            (summary.duplicates, "duplicates"),
            (summary.removed, "removed"),
            (summary.unchanged, "unchanged"),
            (summary.skipped + summary.skipped_before, "skipped"),
        ]
        line = f"{facts(pairs)}, in {duration(summary.seconds)}"
        if summary.unavailable:
            line += ". The folder is empty or not mounted, so nothing was removed"
    elif progress is None:
        line = "Getting ready"
    elif progress.phase == "walking":
        line = f"Looking through the folders: {count(progress.seen, 'file')} so far"
    elif progress.phase == "finishing":
        line = "Writing the last of it"
    else:
        done, total = progress.done, progress.total
        line = f"{done:,} of {count(total)}"
        if progress.rate:
            line += f" · {progress.rate:,.0f} a second"
        if progress.eta_seconds is not None:
            line += f" · {duration(progress.eta_seconds)} left"
        if progress.skipped:
            line += f" · {progress.skipped:,} skipped"
    return run(
        folders=told.folders,
        state=told.state,
        line=line,
        done=done,
        total=total,
        skipped=[(row.path, row.reason, row.message) for row in told.skipped],
        skipped_total=told.skipped_total,
    )


def run(
    *,
    folders: Sequence[str],
    state: str,
    line: str,
    done: int = 0,
    total: int = 0,
    skipped: Sequence[tuple[str, str, str]] = (),
    skipped_total: int = 0,
) -> str:
    """A run as a card: `state` as in Run.state, `line` the sentence under the title, `skipped` as
    (path, reason, message)."""
    titles = {
        "running": "Indexing",
        "stopping": "Stopping",
        "done": "Indexed",
        "stopped": "Stopped",
        "failed": "Not indexed:",
    }
    button = (
        '<button type="button" class="icon" data-do="dismiss" aria-label="Dismiss">'
        '<i class="i-close"></i></button>'
    )
    bar = ""
    if state in ("running", "stopping"):
        button = '<button type="button" data-do="stop">Stop</button>' if state == "running" else ""
        bar = (
            f'<progress value="{done}" max="{total}"></progress>'
            if total
            else "<progress></progress>"
        )
    where = ", ".join(map(text, folders))
    return (
        f'<section class="run {state}" data-state="{state}" '
        f'role="{"alert" if state == "failed" else "status"}"><div class="bar"><h3>{titles[state]} '
        f'<span title="{where}">{where}</span></h3>{button}</div>{bar}<p>{text(line)}</p>'
        f"{_skipped(skipped, skipped_total)}</section>"
    )


def _skipped(rows: Sequence[tuple[str, str, str]], total: int) -> str:
    if not total:
        return ""
    reasons = Counter(reason for _, reason, _ in rows).most_common()
    items = "".join(
        f"<li><b>{text(path)}</b><span>{text(message)}</span></li>" for path, _, message in rows
    )
    if total > len(rows):
        items += f"<li>and {total - len(rows):,} more: <code>clipkit status --skipped</code></li>"
    named = text(", ".join(f"{number:,} {reason}" for reason, number in reasons))
    title = f"{count(total, 'file')} skipped: {named}"
    return f"<details><summary>{title}</summary><ul>{items}</ul></details>"
