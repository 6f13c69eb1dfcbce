"""The evaluation page: "sort my pictures into these words" and the saved reports, as HTML.

As render.py: every text from outside passes through `text`, and the strings become values of
Gradio's HTML component. ui.py sends the events here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from app.web.render import NARROWEST, WIDEST, text
from app.web.sorting import (
    BEST_SHOWN,
    CHOICES,
    CLOSE,
    Evaluation,
    Group,
    Guess,
    Question,
    ReportRow,
    Sorting,
)
from clipkit.errors import ClipkitError
from clipkit.wording import count, percent

log = logging.getLogger(__name__)

FAULT = "clipkit failed in a way it does not know; the terminal that runs it says more"
EXAMPLE = "dog, cat, people, building, food, flower"


class EvaluationPage:
    """What stands in the results' place while the evaluation page is open."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation

    def answer(self, data: Mapping[str, Any]) -> str:
        """The page for what the browser sent: with words, also what sorting into them gives."""
        words, choice, ticket = (str(data.get(key) or "") for key in ("words", "choice", "ticket"))
        outcome = ""
        if words.strip():
            try:
                outcome = _sorting(self._evaluation.sort(Question.from_page(data)))
            except ClipkitError as error:
                outcome = _failure(str(error))
            except (
                Exception
            ):  # the page's edge: a sentence for the person, the rest for the terminal
                log.exception("sorting failed")
                outcome = _failure(FAULT)
        return (
            f'<div class="evaluate" data-view="evaluate" data-ticket="{text(ticket)}">'
            f"{_form(words, choice)}<div>{outcome}</div>{_reports(self._evaluation.reports())}</div>"
        )


def _form(words: str, choice: str) -> str:
    options = "".join(
        f'<option value="{text(name)}"{" selected" if name == choice else ""}>{text(said)}</option>'
        for name, said in CHOICES.items()
    )
    return (
        '<h1>Sort my pictures into these words</h1><form class="sort" data-do="sort">'
        f'<textarea name="words" rows="3" maxlength="50000" placeholder="{EXAMPLE}" '
        'aria-label="Words, with commas between them or a line each" spellcheck="false">'
        f"{_lines(words)}</textarea>"
        f'<div class="row"><label>Words are put <select name="choice">{options}</select></label>'
        '<button type="submit" class="primary">Sort</button></div></form>'
    )


def _lines(words: str) -> str:
    """The words as they were typed, lines and all."""
    return "\n".join(text(line) for line in words.splitlines())


def _failure(sentence: str) -> str:
    return f'<p class="notice" role="alert">{text(sentence)}</p>'


# ---- the outcome


def _sorting(sorting: Sorting) -> str:
    largest = max(group.share for group in sorting.groups) or 1.0
    rows = "".join(_share(group, largest) for group in sorting.groups)
    said = (
        f"{count(len(sorting.nums))} in {count(len(sorting.groups), 'word')}, "
        f"{sorting.seconds:.1f} s. {count(sorting.close_total)} "
        f"{'is' if sorting.close_total == 1 else 'are'} a close call. Every picture goes to the word "
        "that fits best, even where none fits."
    )
    words = "".join(_group(group) for group in sorting.groups if group.count)
    return (
        f'<sorted-{sorting.key}><div class="summary"><p>{said}</p>'
        f'<a class="button" href="sortings/{sorting.key}.csv" download="clipkit-sorted.csv">'
        "Download as CSV</a></div>"
        '<table class="shares"><thead><tr><th scope="col">Word</th><th scope="col">Pictures</th>'
        '<th scope="col">Share</th><th scope="col" title="Mean probability of the word over its '
        'pictures">How sure</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>{words}{_close(sorting)}</sorted-{sorting.key}>"
    )


def _share(group: Group, largest: float) -> str:
    sure = "–" if group.confidence is None else percent(group.confidence)
    width = 100 * group.share / largest
    return (
        f'<tr><th scope="row">{text(group.word)}<i class="bar" style="width:{width:.1f}%"></i></th>'
        f"<td>{group.count:,}</td><td>{percent(group.share)}</td><td>{sure}</td></tr>"
    )


def _group(group: Group) -> str:
    shown = "" if group.count <= BEST_SHOWN else f", the surest {len(group.best)}"
    tiles = "".join(
        _tile(guess, f"{percent(guess.probability)}", f"{group.word}, {number}")
        for number, guess in enumerate(group.best, 1)
    )
    return (
        f'<section class="word"><h2>{text(group.word)} <small>{count(group.count)}{shown}</small></h2>'
        f'<ol class="grid">{tiles}</ol></section>'
    )


def _close(sorting: Sorting) -> str:
    if not sorting.close:
        return ""
    tiles = "".join(
        _tile(
            guess,
            f"{guess.word} {percent(guess.probability)}, {guess.second} "
            f"{percent(guess.second_probability)}",
            f"Close call {number}",
        )
        for number, guess in enumerate(sorting.close, 1)
    )
    shown = (
        "" if sorting.close_total == len(sorting.close) else f", the closest {len(sorting.close)}"
    )
    return (
        f'<section class="word close"><h2>Unsure <small>{count(sorting.close_total)}{shown}: the first '
        f"word leads by less than {100 * CLOSE:.0f} %</small></h2>"
        f'<ol class="grid">{tiles}</ol></section>'
    )


def _tile(guess: Guess, under: str, label: str) -> str:
    """A picture as in the results, so that the viewer opens it: with what was found under it."""
    row = guess.row
    ratio = min(max(row.width / max(row.height, 1), NARROWEST), WIDEST)
    name = PurePath(row.path).name
    alt = text(row.captions[0] if row.captions else name)
    drawn = " drawn" if row.format in ("PNG", "GIF") else ""
    return (
        f'<li class="hit{drawn}" data-id="{text(row.image_id)}" data-score="" data-band="" '
        f'style="--ratio:{ratio:.3f}"><button type="button" class="open" data-do="open" '
        f'aria-label="{text(label)}: {alt}"><img src="thumbnails/{text(row.image_id)}" alt="{alt}" '
        f'loading="lazy" decoding="async"></button><div class="under"><span class="said" '
        f'title="{text(under)}">{text(under)}</span></div></li>'
    )


# ---- reports


def _reports(rows: Sequence[ReportRow]) -> str:
    if not rows:
        return (
            '<section class="reports"><h2>Reports</h2><p class="hint">None yet. Make one in a '
            "terminal: <code>clipkit eval retrieval --data FOLDER</code>, or compare models with "
            "<code>clipkit eval compare A B --data FOLDER</code></p></section>"
        )
    items = "".join(
        f'<li><a href="reports/{text(row.name)}" target="_blank" rel="noopener">{text(row.title)}</a>'
        f"<span>{text(', '.join(row.models))}</span>"
        f'<time datetime="{text(row.created_at)}">{text(row.created_at[:10])}</time></li>'
        for row in rows
    )
    return f'<section class="reports"><h2>Reports</h2><ul>{items}</ul></section>'
