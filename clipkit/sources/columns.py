"""Which columns hold the picture, its captions, its tags and its split: by name, then by content."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES
from clipkit.sources.rows import Options

# Compared as _key makes them: lower case, letters only, no accents. In order of preference.
_IMAGE = (
    "filename file filepath image img picture photo imagepath imgpath imagefile imgfile imagename "
    "imgname picturepath picturefile photopath path bild bilddatei bildpfad datei dateiname dateipfad "
    "foto fotodatei archivo imagen fichier cheminimage nomfichier imageid imgid photoid pictureid id "
    "imageurl url"
).split()
_CAPTION = (
    "caption captions text texts description imagedescription descriptions alt alttext altcaption "
    "sentence sentences comment comments prompt prompts bildbeschreibung beschreibung bildunterschrift "
    "beschriftung unterschrift bildtext alternativtext legende legend descripcion pie leyenda "
    "captiontext imagecaption rawcaption"
).split()
_WEAK_CAPTION = "title titel titre titulo name label labels class query raw".split()
_TAGS = "keywords keyword tags tag stichworte schlagworte schlagwort motscles etiquetas".split()
_SPLIT = "split subset partition set fold datasplit".split()


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table, or keys of objects, mean what."""

    image: str
    captions: tuple[str, ...]
    tags: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        words = ", ".join(map(repr, self.captions))
        more = f", tags from {self.tags!r}" if self.tags else ""
        more += f", splits from {self.split!r}" if self.split else ""
        return f"pictures from {self.image!r}, captions from {words}{more}"


def choose(sample: Sequence[Mapping[str, object]], options: Options, *, where: str) -> Columns:
    """The columns' roles, from their names and a sample of rows.

    DatasetError if the picture's or the captions' column cannot be told, with the columns there are.
    """
    names = list(dict.fromkeys(name for row in sample for name in row))
    if options.image_column:
        image = _given(options.image_column, names, where)
    else:
        image = _image(names, sample, where)
    rest = [name for name in names if name != image]
    tags = _first(_TAGS, rest)
    split = _first(_SPLIT, rest)
    if options.caption_columns:
        captions = tuple(_given(name, names, where) for name in options.caption_columns)
    else:
        free = [name for name in rest if name not in (tags, split)]
        captions = _captions(free, sample, names, where)
    return Columns(image, captions, *(c if c not in captions else None for c in (tags, split)))


def looks_like_picture(value: object) -> bool:
    return isinstance(value, str) and PurePosixPath(value.strip()).suffix.lower() in SUFFIXES


def _image(names: list[str], sample: Sequence[Mapping[str, object]], where: str) -> str:
    def share(name: str) -> float:
        return sum(looks_like_picture(row.get(name)) for row in sample) / len(sample)

    filled = [name for name in names if sample and share(name) > 0.5]
    known = _first(_IMAGE, filled) or (filled[0] if filled else _first(_IMAGE, names))
    if known is None:
        raise DatasetError(
            f"{where}: no column names picture files; it has {_list(names)}; "
            "say which with --image-column"
        )
    return known


def _captions(
    free: list[str], sample: Sequence[Mapping[str, object]], names: list[str], where: str
) -> tuple[str, ...]:
    for words in (_CAPTION, _WEAK_CAPTION):
        if found := [name for name in free if _key(name) in words]:
            return tuple(found)
    wordy = [name for name in free if _wordy(name, sample)]
    if len(wordy) == 1:
        return (wordy[0],)
    raise DatasetError(
        f"{where}: no column is plainly the captions; it has {_list(names)}; "
        "say which with --caption-column"
    )


def _wordy(name: str, sample: Sequence[Mapping[str, object]]) -> bool:
    """Whether most of its values are several words."""
    values = [row.get(name) for row in sample]
    several = [v for v in values if isinstance(v, str) and len(re.findall(r"[^\W\d_]+", v)) > 1]
    return len(several) * 2 > len(values)


def _given(name: str, names: list[str], where: str) -> str:
    for candidate in names:
        if candidate == name or candidate.strip().casefold() == name.strip().casefold():
            return candidate
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DatasetError(f"{where} has no column {name!r}; it has {_list(names)}{hint}")


def _first(known: list[str], names: Sequence[str]) -> str | None:
    keys = {_key(name): name for name in reversed(names)}
    return next((keys[word] for word in known if word in keys), None)


def _key(name: str) -> str:
    """ "Image_Path 1" -> "imagepath", "Descripción" -> "descripcion"."""
    plain = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in plain if "a" <= c <= "z")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:30])
    return (shown + (", ..." if len(names) > 30 else "")) if names else "no columns"
