"""Filters: conditions on pictures, and which pictures fulfil them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from clipkit.catalog.columns import Places, State
from clipkit.catalog.rows import ISO_DATE, below, clean, date_key, fold, fold_path, fold_tag
from clipkit.catalog.store import joined_nums, nums_json
from clipkit.errors import InputError
from clipkit.picture_set import Mask, PictureSet

ORIENTATIONS = {"landscape": np.greater, "portrait": np.less, "square": np.equal}


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions on pictures, all of which must hold.

    `after` (inclusive) and `before` (exclusive) are ISO date prefixes, "2023", "2023-05" or
    "2023-05-01", each meaning the start of that period. A picture without an EXIF date counts as
    taken when its oldest present file was last modified (local time).
    Any of `folders` (the place lies below it; one that is not absolute may be anywhere in the
    path), `cameras` (substring) and `formats` (whole, as Pillow names them: "jpeg") may hold; all
    of `paths` (substring of the place) and `tags` (whole) must. `folders` and `paths` must hold for
    one and the same place. Letter case and Unicode form matter for absolute `folders` only.
    """

    after: str | None = None
    before: str | None = None
    paths: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    cameras: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    min_width: int = 0
    min_height: int = 0
    min_side: int = 0  # of the longer side
    camera: str | None = None  # whole, as stored
    orientation: str | None = None  # "landscape", "portrait" or "square"


def check(filters: Filters) -> None:
    """Raise InputError for a malformed date or an unknown orientation."""
    for date in (filters.after, filters.before):
        if date is not None and not ISO_DATE.fullmatch(date):
            raise InputError(f"{date!r} is not a date; use the form 2023, 2023-05 or 2023-05-01")
    if filters.orientation is not None and filters.orientation not in ORIENTATIONS:
        choices = ", ".join(ORIENTATIONS)
        raise InputError(f"orientation {filters.orientation!r} is not one of {choices}")


def matching(state: State, filters: Filters) -> PictureSet:
    """See Catalog.matching."""
    return state.kept_set(filters, lambda: _matching(state, filters))


def _matching(state: State, filters: Filters) -> PictureSet:
    passing = state.live().copy()

    if filters.after is not None:
        passing &= state.fact("dated") >= date_key(filters.after)
    if filters.before is not None:
        dated = state.fact("dated")
        passing &= (dated < date_key(filters.before)) & (dated > 0)
    if filters.cameras or filters.camera is not None:
        labels = dict(state.db.execute("SELECT id, text FROM labels").fetchall())
        wanted = [fold(camera) for camera in filters.cameras]
        if wanted:
            cameras = [key for key, text in labels.items() if any(w in fold(text) for w in wanted)]
            passing &= _one_of(state.fact("camera"), cameras)
        if filters.camera is not None:
            same = [key for key, text in labels.items() if text == clean(filters.camera)]
            passing &= _one_of(state.fact("camera"), same)
    if filters.formats:
        names = {clean(name).upper() for name in filters.formats}
        labels = dict(state.db.execute("SELECT id, text FROM labels").fetchall())
        formats = [key for key, text in labels.items() if text.upper() in names]
        passing &= _one_of(state.fact("format"), formats)
    if filters.min_width:
        passing &= state.fact("width") >= filters.min_width
    if filters.min_height:
        passing &= state.fact("height") >= filters.min_height
    if filters.min_side:
        longer = np.maximum(state.fact("width"), state.fact("height"))
        passing &= longer >= filters.min_side
    if filters.orientation is not None:
        compare = ORIENTATIONS[filters.orientation]
        passing &= compare(state.fact("width"), state.fact("height"))
    if filters.paths or filters.folders:  # one place must fulfil both
        _keep(passing, _at_places(state.places(), filters))
    result = PictureSet.of_mask(passing)
    for tag in filters.tags:
        result = result & _tagged(state, fold_tag(tag))
    return result


def _one_of(codes: np.ndarray, wanted: list[int]) -> Mask:
    """Return which codes (N,) are among a few wanted ones."""
    flags = np.zeros(max(int(codes.max(initial=0)), *wanted, 0) + 1, np.bool_)
    flags[wanted] = True
    found: Mask = flags[codes]
    return found


def _keep(passing: Mask, also: Mask) -> None:
    """Narrow `passing` to those in `also`, which may be shorter."""
    size = min(len(passing), len(also))
    passing[:size] &= also[:size]
    passing[size:] = False


def _at_places(places: Places, filters: Filters) -> Mask:
    """Return by num which pictures have a place that fulfils both `paths` and `folders`."""
    found = np.ones(len(places.nums), np.bool_)
    for path in filters.paths:
        found &= places.containing(fold_path(path))
    if filters.folders:
        wanted = np.zeros(len(places.folder_paths), np.bool_)
        for folder in filters.folders:
            if os.path.isabs(folder):
                low, high = below(folder)
                wanted |= np.array([low <= path < high for path in places.folder_paths], np.bool_)
            else:
                part = f"/{fold_path(os.path.normpath(folder))}/"
                wanted |= np.array([part in name for name in places.folder_names], np.bool_)
        found &= places.in_folders(wanted)
    return places.of(found)


def _tagged(state: State, tag: str) -> PictureSet:
    """Return the pictures with a folded tag."""
    row = state.db.execute("SELECT id FROM labels WHERE text = ?", (tag,)).fetchone()
    if row is None:
        return PictureSet()
    sql = "SELECT group_concat(num) FROM picture_tags WHERE tag = ?"
    some = f"{sql} AND num IN (SELECT value FROM json_each(?))"
    return state.kept_set(
        ("tag", tag),
        lambda: PictureSet.of_sorted(joined_nums(state.db, sql, row)),
        lambda nums: joined_nums(state.db, some, (*row, nums_json(nums))),
    )
