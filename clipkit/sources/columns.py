"""Which columns hold the picture, captions, tags, label and split: by name, then by content."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from clipkit.errors import DatasetError
from clipkit.images import SUFFIXES
from clipkit.sources.rows import Broken, Options, Row, split_name, strings, tag_list

SAMPLE = 200  # rows that `choose` looks at

# Compared as _key makes them: lower case, letters only, no accents. In order of preference.
_IMAGE = (
    "filename file filepath image img picture photo imagepath imgpath imagefile imgfile imagename "
    "imgname picturepath picturefile photopath path bild bilddatei bildpfad datei dateiname dateipfad "
    "foto fotodatei archivo imagen fichier cheminimage nomfichier imageid imgid photoid pictureid id "
    "imageurl url"
).split()
_CAPTION = (
    "caption captions text texts txt description imagedescription descriptions alt alttext altcaption "
    "sentence sentences comment comments prompt prompts bildbeschreibung beschreibung bildunterschrift "
    "beschriftung unterschrift bildtext alternativtext legende legend descripcion pie leyenda "
    "captiontext imagecaption rawcaption"
).split()
_WEAK_CAPTION = "title titel titre titulo name label labels class query raw".split()
_TAGS = "keywords keyword tags tag stichworte schlagworte schlagwort motscles etiquetas".split()
_LABEL = "labels label finelabel class classes cls target category klasse clase classe".split()
_SPLIT = "split subset partition set fold datasplit".split()


@dataclass(frozen=True, slots=True)
class Columns:
    """The roles of a table's columns, or of the keys of JSON objects."""

    image: str
    captions: tuple[str, ...]
    tags: tuple[str, ...] = ()
    label: str | None = None
    split: str | None = None
    other_images: tuple[str, ...] = ()  # name the picture in rows that lack `image`

    def __str__(self) -> str:
        captions = f"captions from {', '.join(map(repr, self.captions))}"
        more = f", tags from {', '.join(map(repr, self.tags))}" if self.tags else ""
        more += f", labels from {self.label!r}" if self.label else ""
        more += f", splits from {self.split!r}" if self.split else ""
        return f"pictures from {self.image!r}, {captions if self.captions else 'no captions'}{more}"

    def row(
        self,
        place: str,
        fields: Mapping[str, Any],
        make: Callable[..., Row | Broken],
        split: str | None,
    ) -> Row | Broken:
        """Return the row of one object: make(picture, place, captions, label, split, meta).

        `split` is that of rows which name none; the columns without a role go to `meta`.
        """
        rest = dict(fields)
        keys = (self.image, *(() if rest.get(self.image) else self.other_images))
        picture = next((value for key in keys if (value := rest.pop(key, None))), None)
        captions: list[str] = []
        for column in self.captions:
            value = rest.pop(column, None)
            texts = () if value is None else strings(value)
            if texts is None:
                detail = f"{column} must be a string or a list of strings, got {value!r:.80}"
                return Broken(place, "wrong-type", detail)
            captions += texts
        own_split = rest.pop(self.split, None) if self.split else None
        tags = [tag for column in self.tags for tag in tag_list(rest.pop(column, None))]
        meta = ({"keywords": tags} if tags else {}) | rest
        label = fields.get(self.label) if self.label else None
        label = None if label == "" else label
        return make(picture, place, tuple(captions), label, split_name(own_split) or split, meta)


def choose(rows: Sequence[Mapping[str, object]], options: Options, *, where: str) -> Columns:
    """Return the columns' roles, from their names and a sample of rows.

    Raises DatasetError, which lists the columns, if no column is the picture's, or none is the
    captions' and there are neither labels nor tags, unless options.uncaptioned.
    """
    sample = [{key: _first_value(value) for key, value in row.items()} for row in rows]
    names = list(dict.fromkeys(name for row in sample for name in row))
    if options.image_column:
        image = _named(options.image_column, names, where)
    else:
        image = _image(names, sample, where)
    rest = [name for name in names if name != image]
    tags = tuple(name for name in rest if _key(name) in _TAGS)
    split, label = _first(_SPLIT, rest), _first(_LABEL, rest)
    if options.caption_columns:
        captions = tuple(_named(name, names, where) for name in options.caption_columns)
    else:
        free = [name for name in rest if name not in (*tags, split)]
        optional = bool(tags) or options.uncaptioned
        captions = _captions(free, sample, names, label, where, optional=optional)
    others = tuple(
        name
        for name in rest
        if _key(name) in _IMAGE and not any(row.keys() >= {name, image} for row in sample)
    )
    return Columns(
        image,
        captions,
        tuple(name for name in tags if name not in captions),
        label,
        split if split not in captions else None,
        others,
    )


def looks_like_picture(value: object) -> bool:
    """Return whether a cell is the name of a picture file."""
    return isinstance(value, str) and PurePosixPath(value.strip()).suffix.lower() in SUFFIXES


def _image(names: list[str], sample: Sequence[Mapping[str, object]], where: str) -> str:
    def share(name: str) -> float:
        return sum(looks_like_picture(row.get(name)) for row in sample) / len(sample)

    filled = [name for name in names if sample and share(name) > 0.5]
    image = _first(_IMAGE, filled) or (filled[0] if filled else _first(_IMAGE, names))
    if image is None:
        raise DatasetError(
            f"{where}: no column names picture files; it has {_list(names)}; rename the column "
            "'image', or give `clipkit data build` its name as --image-column"
        )
    return image


def _captions(
    free: list[str],
    sample: Sequence[Mapping[str, object]],
    names: list[str],
    label: str | None,
    where: str,
    *,
    optional: bool,
) -> tuple[str, ...]:
    labels = [value for row in sample if (value := row.get(label or "")) is not None]
    # Class names may serve as captions, class numbers may not.
    if not (labels and all(isinstance(v, str) and not v.isdigit() for v in labels)):
        free = [name for name in free if name != label]
    for known in (_CAPTION, _WEAK_CAPTION):
        if named := [name for name in free if _key(name) in known]:
            return tuple(named)
    wordy = [name for name in free if _wordy(name, sample)]
    if len(wordy) == 1:
        return (wordy[0],)
    if label is not None or optional:
        return ()
    raise DatasetError(
        f"{where}: no column is plainly the captions; it has {_list(names)}; rename the column "
        "'caption', or give `clipkit data build` its name as --caption-column, or keep pictures "
        "without captions by --uncaptioned keep"
    )


def _wordy(name: str, sample: Sequence[Mapping[str, object]]) -> bool:
    """Return whether most values are several words."""
    values = [row.get(name) for row in sample]
    several = [v for v in values if isinstance(v, str) and len(re.findall(r"[^\W\d_]+", v)) > 1]
    return len(several) * 2 > len(values)


def _named(name: str, names: list[str], where: str) -> str:
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


def _first_value(value: object) -> object:
    """Return a list's first entry, and the file name of a picture that is an object with bytes."""
    if isinstance(value, list) and value:
        return value[0]
    return (value.get("path") or "picture.jpg") if isinstance(value, Mapping) else value


def _list(names: Sequence[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:30])
    return (listed + (", ..." if len(names) > 30 else "")) if names else "no columns"
