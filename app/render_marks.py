"""What the page shows of corrections: the two buttons on a hit, how many there are, the way out.

As render.py: values in, safe HTML out.
"""

from __future__ import annotations

from app.render import count, text

__all__ = ["buttons", "summary"]

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
