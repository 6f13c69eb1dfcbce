"""Why a search finds nothing: which filter or phrase leaves no picture, and what to try instead."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import PurePath

from clipkit.catalog import Catalog, Filters
from clipkit.query import Query, Term, format
from clipkit.wording import printable

_NOTHING = {  # by key: what is said of a value that no picture passes
    "after": "no picture is dated {} or later",
    "before": "no picture is dated before {}",
    "path": "no path contains “{}”",
    "camera": "no camera's name contains “{}”",
    "format": "no picture has the format {}",
    "tag": "no picture has the tag “{}”",
    "width": "no picture is {} pixels wide",
    "height": "no picture is {} pixels high",
    "orientation": "no picture is {}",
}
_ANY_OF = ("folder", "camera", "format")  # keys of which one value must hold: one condition
FILTERS = "the filters"  # those given beside the query
MOST_OFFERS = 3
MOST_FOLDERS = 100_000  # among which the like of a mistyped name is looked for


@dataclass(frozen=True, slots=True)
class Offer:
    """Another search, which finds something."""

    label: str  # "Search without after:2023"
    query: str
    keeps_filters: bool  # the filters that were given beside the query
    total: int


@dataclass(frozen=True, slots=True)
class Empty:
    """Why a search found nothing, in a sentence without its full stop, and searches to try instead."""

    sentence: str
    offers: tuple[Offer, ...] = ()


def explain_empty(
    query: Query,
    filters: Filters | None,
    *,
    count: Callable[[Query, Filters | None], int],
    catalog: Catalog,
) -> Empty | None:
    """Say which conditions of a search leave no picture; None if it has none that could.

    `filters` were given beside the query. `count` returns how many pictures pass the filters and
    phrases of a query, and further filters.
    """
    conditions = _conditions(query)
    if filters not in (None, Filters()):
        conditions[FILTERS] = Query()

    def rest(dropped: Collection[str]) -> tuple[Query, Filters | None]:
        kept = [condition for name, condition in conditions.items() if name not in dropped]
        return replace(
            query,
            phrases=tuple(phrase for condition in kept for phrase in condition.phrases),
            filters=tuple(item for condition in kept for item in condition.filters),
        ), None if FILTERS in dropped else filters

    def offers(*searches: tuple[str, tuple[Query, Filters | None]]) -> tuple[Offer, ...]:
        found = (
            Offer(label, format(left), given is not None, count(left, given))
            for label, (left, given) in searches
        )
        return tuple(offer for offer in found if offer.total)

    impossible = [
        name
        for name, alone in conditions.items()
        if not count(alone, filters if name == FILTERS else None)
    ]
    if impossible:
        sentences, searches = [], []
        for name in impossible:
            sentence, instead = _nothing_passes(conditions[name], count, catalog)
            sentences.append(sentence)
            if instead is not None:
                left, given = rest([name])
                left = replace(
                    left,
                    phrases=(*left.phrases, *instead.phrases),
                    filters=(*left.filters, *instead.filters),
                )
                searches.append((f"Search for {format(instead)}", (left, given)))
        searches.append((_label(impossible), rest(impossible)))
        sentence = "; ".join(sentences)
        return Empty(sentence[0].upper() + sentence[1:], offers(*searches))
    if len(conditions) < 2:
        return None
    names = list(conditions)
    each = offers(*((_label([name]), rest([name])) for name in names))
    best = tuple(sorted(each, key=lambda offer: -offer.total)[:MOST_OFFERS])
    return Empty(
        f"No picture passes {', '.join(names[:-1])} and {names[-1]} together",
        best or offers((_label(names), rest(names))),
    )


def _label(dropped: Collection[str]) -> str:
    return f"Search without {' and '.join(dropped)}"


def _conditions(query: Query) -> dict[str, Query]:
    """Split the phrases and filters of a query into queries of one condition each, by their texts."""
    parts = [Query(phrases=(phrase,)) for phrase in query.phrases]
    parts += [Query(filters=(item,)) for item in query.filters if item.key not in _ANY_OF]
    several = sorted((item for item in query.filters if item.key in _ANY_OF), key=lambda i: i.key)
    parts += [Query(filters=tuple(group)) for _, group in groupby(several, lambda i: i.key)]
    return {printable(format(part)): part for part in parts}


def _nothing_passes(
    condition: Query, count: Callable[[Query, Filters | None], int], catalog: Catalog
) -> tuple[str, Query | None]:
    """Say that no picture passes a condition; return also one to try instead, or None."""
    if condition.phrases:
        text = condition.phrases[0].text
        sentence = f"no file name, folder, caption or tag has “{printable(text)}”"
        longer = Query(phrases=(Term(text + "*"),))
        if not text.endswith("*") and (total := count(longer, None)):
            return f"{sentence} as whole words; {total:,} have words that begin so", longer
        return sentence, None
    if not condition.filters:
        return "no picture passes the filters", None
    values = [printable(item.value) for item in condition.filters]
    key = condition.filters[0].key
    if key != "folder":
        said = _NOTHING.get(key, f"no picture passes {key}:{{}}")
        return said.format(" or ".join(values)), None
    near = _like_folder(values[0], catalog)
    sentence = f"no folder is called “{' or '.join(values)}”"
    if near is None:
        return sentence, None
    instead = Query(filters=(replace(condition.filters[0], value=near),))
    return f"{sentence}; did you mean “{near}”?", instead


def _like_folder(value: str, catalog: Catalog) -> str | None:
    """Return the name of the folder that is most like a mistyped one; None if none is."""
    paths = [PurePath(folder) for folder, _ in catalog.folders(MOST_FOLDERS)]
    names = {path.name.casefold(): path.name for path in reversed(paths)}  # the fullest folder wins
    wanted = PurePath(value).name.casefold()
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
    return names[near[0]] if near else None
