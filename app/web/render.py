"""The HTML of each part of the page, from the Jinja templates beside this module.

Every value passes through `printable` and is escaped, whatever it is; a template that names a value
it was not given is an error. The strings become values of Gradio's HTML component, whose own
template here is only `${value}`: Gradio puts the value in with innerHTML and evaluates nothing in
it. A Handlebars hole such as {{value}} must never be used there instead: Gradio evaluates what came
out of it as a JavaScript template literal.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.ext import Extension

from app.corrections import as_query
from app.web.requests import MOST_HITS, PAGE_SIZE, SearchRequest
from app.web.sorting import CLOSE, FLOORS, PHRASINGS, Group, Sorting
from clipkit.query import CHOICES, KEYS, SYNTAX
from clipkit.wording import count, duration, percent, printable, reason_text

if TYPE_CHECKING:
    from app.web.indexing import Run
    from app.web.saved_reports import ReportRow
    from app.web.workspace import FolderRow, SearchAnswer, Status
    from clipkit.catalog import Facets, PictureRow
    from clipkit.embed import Summary
    from clipkit.search import SearchHit

NARROWEST, WIDEST = 0.56, 2.4  # width / height of a tile; the picture is shown whole inside it
GROUP_MOST = 6_000  # pictures of a whole group that one page may show; the CSV has all
GROUP_PAGE = 120  # pictures of a whole group of the Classify page, and the step of "show more"
MOST_LOADED = 600  # pictures that the page loads at once while it is scrolled
SIDES = (640, 1280, 1920, 3840)  # choices of the longer side, in pixels


class _Layout(Extension):
    """Lets a template be laid out in lines without white space in the page: a line break with its
    indentation is nothing before an element or a Jinja tag, and one space before text."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:  # noqa: ARG002
        source = re.sub(r"[ \t]*\n\s*(?=<|\{[{%#])", "", source.strip())
        return re.sub(r"[ \t]*\n\s*", " ", source)


def _ratio(picture: PictureRow) -> str:
    """Return width / height of a picture's tile."""
    return f"{min(max(picture.width / max(picture.height, 1), NARROWEST), WIDEST):.3f}"


def _outcome(summary: Summary) -> str:
    """Return a run's counts, without zeros, as "3 added, 1 skipped"."""
    counts = (
        (summary.added, "added"),
        (summary.moved, "moved"),
        (summary.duplicates, "duplicates"),
        (summary.removed, "removed"),
        (summary.reencoded, f"encoded with {summary.model}"),
        (summary.unchanged, "unchanged"),
        (summary.skipped + summary.skipped_before, "skipped"),
    )
    return ", ".join(f"{n:,} {what}" for n, what in counts if n) or "nothing to do"


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    extensions=[_Layout],
    autoescape=True,
    undefined=StrictUndefined,
    # Markup is a subclass of str: what a macro or |safe made is left as it is.
    finalize=lambda value: printable(value) if type(value) is str else value,
    auto_reload=False,
)
_templates.filters |= {
    "count": count,
    "duration": duration,
    "file_name": lambda path: PurePath(path).name,
    "folder_and_name": lambda path: (f"{PurePath(path).parent.name}/", PurePath(path).name),
    "outcome": _outcome,
    "model_name": lambda spec: PurePath(spec).name if PurePath(spec).is_absolute() else spec,
    "percent": percent,
    "ratio": _ratio,
}


def part(name: str, /, **values: Any) -> str:
    """Return a part of the page from the template of that name. Raises UndefinedError if it lacks a
    value."""
    return _templates.get_template(f"{name}.html").render(values)


def filters(folders: Sequence[FolderRow], facets: Facets, roots: Sequence[str]) -> str:
    """Return the filter panel. Folders stand below their parent, in the order of their paths; parents
    that all share are left out. The page completes `key:` from the same values."""
    rows = sorted(folders, key=lambda folder: PurePath(folder.path).parts)
    parts = [PurePath(folder.path).parts for folder in rows]
    shared = 0  # leading parts that all have, and none consists of alone
    while parts and len({p[shared] for p in parts}) == 1 and min(map(len, parts)) > shared + 1:
        shared += 1
    groups: dict[str, list[tuple[FolderRow, str]]] = {}
    for row, names in zip(rows, parts, strict=True):
        groups.setdefault("/".join(names[shared:-1]), []).append((row, _as_typed(row.path, roots)))
    shapes = CHOICES["orientation"]
    return part("filters", groups=groups, facets=facets, shapes=shapes, sides=SIDES)


def _as_typed(path: str, roots: Sequence[str]) -> str:
    """Return what to type after `folder:`, from the name of the indexed folder on; "" if the name
    cannot be typed."""
    above = [root for root in roots if PurePath(path).is_relative_to(root)]
    typed = os.path.relpath(path, os.path.dirname(max(above, key=len))) if above else path
    return typed if typed == printable(typed) else ""


def help_panel() -> str:
    """Return the help for the query language: a table of what can be typed, from clipkit.query."""
    example = '({}:(?:"[^"]*"|[^\\s,]+))'
    keys = {key: re.split(example.format(key), meaning) for key, meaning in KEYS.items()}
    return part("help", syntax=SYNTAX, keys=keys, choices=CHOICES)


def results(request: SearchRequest, answer: SearchAnswer, status: Status) -> str:
    """Return one page of results. Later pages are larger, so that scrolling far loads fewer."""
    first_weak = len(answer.hits)
    while first_weak and _is_weak(answer.hits[first_weak - 1]):
        first_weak -= 1
    shown = answer.hits[-1].rank if answer.hits else 0
    step = min(max(PAGE_SIZE, shown // 2), MOST_LOADED)
    return part(
        "results",
        request=request,
        answer=answer,
        query=as_query(answer.words) if answer.words else "",
        first_weak=first_weak,
        shown=shown,
        more=min(step, answer.total - shown) if answer.cursor else 0,
        whole=not answer.stable and shown + step <= MOST_HITS,
        status=status,
    )


def _is_weak(hit: SearchHit) -> bool:
    return hit.strength == "weak" and not hit.named


def run(run: Run | None) -> str:
    """Return an indexing run as a card; nothing without a run."""
    if run is None:
        return ""
    reasons = Counter(file.reason for file in run.skipped).most_common()
    return part(
        "run", run=run, reasons=", ".join(f"{n:,} {reason_text(reason)}" for reason, n in reasons)
    )


def sort_page(
    fields: Mapping[str, str],
    *,
    reports: Sequence[ReportRow],
    sorting: Sorting | None = None,
    only: Group | None = None,
    error: str = "",
) -> str:
    """Return the Classify page with the words, the choices and the ticket that the browser sent; with
    `only`, all of one group in place of the best of each."""
    return part(
        "sort",
        **fields,
        choices=PHRASINGS,
        floors=FLOORS,
        only=only,
        group_page=GROUP_PAGE,
        group_most=GROUP_MOST,
        close_lead=CLOSE,
        sorting=sorting,
        error=error,
        reports=reports,
    )
