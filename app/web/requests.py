"""A search as the page and the HTTP API ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

PAGE_SIZE = 24  # pictures per page of results, if the request does not say
MOST_HITS = 2_400  # in one answer; a cursor goes on from there


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """One search: by words, by pictures, by one of the library, or by several of these together."""

    words: str = ""
    images: tuple[str | bytes, ...] = ()  # examples: an image_id, or a file's bytes
    similar: str | None = (
        None  # image_id of an example in the library, itself left out of the results
    )
    folder: str | None = None  # FolderRow.key, or an absolute path
    after: date | None = None
    until: date | None = None  # inclusive
    sort: str | None = None  # one of CHOICES["sort"]
    orientation: str | None = None  # one of CHOICES["orientation"]
    format: str | None = None
    camera: str | None = None  # its whole name
    size: int = 0  # least length of the longer side, in pixels
    limit: int = PAGE_SIZE
    cursor: str | None = None  # SearchAnswer.cursor of the page before

    @property
    def before(self) -> date | None:
        """The first day after `until`."""
        return self.until + timedelta(days=1) if self.until and self.until < date.max else None
