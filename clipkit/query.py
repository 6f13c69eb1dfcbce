"""The query language: parse what a person types into a Query. Needs no file, catalog or model.

    dog on a beach            free words are one text to look for
    dog beach^2               ^w is a weight from 0.01 to 10; a weighted word is a text of its own
    -leash  -"red car"^0.5    push away
    +./ref.jpg^0.5            an example picture; quote a path with spaces: +"my file.jpg"
    "invoice 42"              must match file name, folder, caption or tag
    "IMG_20*"                 ... in a word that begins so
    after:2023 path:trips     filters, see KEYS; quote a value with spaces: camera:"canon eos"
    sort:date                 the order in which hits are shown: score, date or name

Everything else is a word: `t-shirt`, a lone `-`, `--`, `12:30`, `http://x`, `5"`, `note:`.
A backslash escapes - + ^ : a quote, a backslash, or a space, which then joins two words; before any
other character it is an ordinary character. Curly quotes are quotes, since phones type them.

`parse(format(query)) == query` for every Query, and `parse` raises QueryError only.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from clipkit.errors import QueryError

KEYS = MappingProxyType(
    {
        "after": "taken on or after a date: after:2023, after:2023-05, after:2023-05-01",
        "before": "taken before a date: before:2023 is up to the end of 2022",
        "path": "the path contains this: path:trips",
        "folder": "lies below a folder of this name, or this end of a path: folder:photos/2023",
        "camera": 'the camera\'s name contains this: camera:canon, camera:"eos 80d"',
        "format": "the file format: format:png",
        "tag": "has this tag: tag:holiday",
        "width": "at least this many pixels wide: width:1920",
        "height": "at least this many pixels high: height:1080",
        "orientation": "landscape, portrait or square: orientation:portrait",
        "sort": "score, date (newest first) or name: sort:date",
    }
)
# What else a person can type, as (example, meaning). With KEYS, all that the page's help shows.
SYNTAX = (
    ("a dog on a beach", "what the picture shows, in plain words"),
    ("beach -dog", "push a word away"),
    ('street -"red car"', "push several words away"),
    ("beach^2 dog", "weigh a word, from 0.01 to 10"),
    ('"IMG 20"', "must occur in file name, folder, caption or tag"),
    ('"IMG_20*"', "the same, in a word that begins so"),
)
MAX_CHARS = 10_000
MAX_PARTS = 64  # terms, examples, phrases and filters; the free words together are one
MIN_WEIGHT, MAX_WEIGHT = 0.01, 10.0

_PATHS = ("path", "folder")
_ONCE = ("after", "before", "width", "height", "orientation", "sort")
CHOICES = {
    "orientation": ("landscape", "portrait", "square"),
    "sort": ("score", "date", "name"),
}
# The decoder's name of a format, by the file suffix.
_FORMATS = {"JPG": "JPEG", "JPE": "JPEG", "JFIF": "JPEG", "TIF": "TIFF", "HEIC": "HEIF"}
_QUOTES = '"“”„'
_SIGNS = frozenset(_QUOTES + "-+")
_ESCAPE = rf"\\[{_QUOTES}\\\-+^: ]"
_QUOTED = re.compile(rf"[{_QUOTES}]((?>{_ESCAPE}|[^{_QUOTES}])*)[{_QUOTES}](?:\^(?P<weight>\S*))?")
_BARE = re.compile(rf"((?:{_ESCAPE}|\S)+?)(?:\^(?P<weight>[^\s^]*))?(?=\s|\Z)")
_VALUE = re.compile(rf"(?:{_ESCAPE}|\S)*")
_BLANKS = re.compile(r"\s*")
_KEY = re.compile(r"([A-Za-z]+):")
_WEIGHT = re.compile(r"[0-9]{1,9}(\.[0-9]{0,25})?|\.[0-9]{1,25}")
_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2}))?(?:-([0-9]{2}))?")
_PIXELS = re.compile(r"(>=|>|)([0-9]{1,7})")
# Control characters separate words like spaces: a NUL would cut a path or a full-text query short.
_CONTROLS = dict.fromkeys((*range(32), 127), " ")


@dataclass(frozen=True, slots=True)
class Term:
    """A text and its weight. `parse` leaves no double, leading or trailing spaces in the text."""

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)


@dataclass(frozen=True, slots=True)
class Example:
    """An example picture, named by a file's path or by a picture's image_id, and its weight."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self.weight)


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition: a key of KEYS but `sort`, and its value in canonical form.

    Dates are ISO prefixes (2023, 2023-05, 2023-05-01), formats the decoder's names (JPEG), widths
    and heights the least number of pixels (1920), the rest is text as typed.
    """

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed query. An empty one is valid and matches everything."""

    terms: tuple[Term, ...] = ()
    exclude: tuple[Term, ...] = ()
    examples: tuple[Example, ...] = ()
    phrases: tuple[Term, ...] = ()
    filters: tuple[Filter, ...] = ()
    sort: str | None = None

    def __str__(self) -> str:
        return format(self)


def parse(text: str) -> Query:
    """Parse a query. Raises QueryError with the problem, its position (from 1) and the remedy."""
    if len(text) > MAX_CHARS:
        raise QueryError(
            f"query has {len(text):,} characters; the limit is {MAX_CHARS:,}; shorten it"
        )
    return _Parser(text.translate(_CONTROLS)).query()


def format(query: Query) -> str:
    """Format a query so that `parse` returns the same one."""
    parts = []
    for number, term in enumerate(query.terms):
        if number == 0 and term.weight == 1.0:  # the free words; any other text has its weight
            parts += [_escape_word(word) for word in term.text.split(" ")]
        else:
            parts.append(_escape_word(term.text).replace(" ", "\\ ") + f"^{float(term.weight)!r}")
    parts += ["-" + _quote(term.text) + _suffix(term.weight) for term in query.exclude]
    parts += ["+" + _quote(example.path) + _suffix(example.weight) for example in query.examples]
    parts += [_quote(term.text) + _suffix(term.weight) for term in query.phrases]
    parts += [f"{item.key}:{_quote_if_needed(item.value)}" for item in query.filters]
    if query.sort is not None:
        parts.append(f"sort:{query.sort}")
    return " ".join(parts)


class _Parser:
    """One pass over the text. `self.at` is the index of the next character to read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.words: list[str] = []  # free words
        self.weighted: list[Term] = []
        self.exclude: list[Term] = []
        self.examples: list[Example] = []
        self.phrases: list[Term] = []
        self.filters: list[Filter] = []
        self.sort: str | None = None

    def query(self) -> Query:
        items = 0
        while self._read(_BLANKS).end() < len(self.text):
            self._item()
            items += 1
            if items - len(self.words) > MAX_PARTS:
                raise QueryError(
                    f"query has more than {MAX_PARTS} terms, examples, phrases and filters "
                    f"at position {self.at}; leave some out"
                )
        free = (Term(" ".join(self.words)),) if self.words else ()
        return Query(
            terms=(*free, *self.weighted),
            exclude=tuple(self.exclude),
            examples=tuple(self.examples),
            phrases=tuple(self.phrases),
            filters=tuple(self.filters),
            sort=self.sort,
        )

    def _item(self) -> None:
        start, sign = self.at, self.text[self.at]
        after = self.text[start + 1 : start + 2]
        if sign in _QUOTES:
            text, weight = self._text()
            self.phrases.append(Term(_words(text, start), weight or 1.0))
        # a sign directly precedes its word; a lone or a doubled one is a word itself
        elif sign in "-+" and after.strip() and after != sign:
            self.at += 1
            self._signed(sign, start)
        elif (key := _KEY.match(self.text, start)) and self._is_filter(key):
            self._filter(key[1].lower(), start, key.end())
        else:
            text, weight = self._text()
            if weight is None:
                self.words.append(_words(text, start))
            else:
                self.weighted.append(Term(_words(text, start), weight))

    def _signed(self, sign: str, start: int) -> None:
        key = _KEY.match(self.text, self.at)
        if sign == "-" and key and key[1].lower() in KEYS:
            raise QueryError(
                f"filter '{key[0]}' at position {start + 1} cannot be excluded; "
                f'to push the words away quote them: -"{key[0]}..."'
            )
        text, weight = self._text()
        if sign == "+":
            self.examples.append(Example(_file_name(text, start), weight or 1.0))
        else:
            self.exclude.append(Term(_words(text, start), weight or 1.0))

    def _is_filter(self, key: re.Match[str]) -> bool:
        """Return whether a word is meant as a filter: web addresses (http://x) and prose ("note: ...")
        have a colon after letters, too."""
        rest = self.text[key.end() : key.end() + 2]
        return key[1].lower() in KEYS or (bool(rest[:1].strip()) and rest != "//")

    def _filter(self, key: str, start: int, value_at: int) -> None:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise QueryError(
                f"unknown key '{_shorten(key)}' at position {start + 1}; did you mean '{near}'? "
                f"Keys are {', '.join(KEYS)}; to search for the words themselves write "
                f"{_shorten(key)}\\:..."
            )
        self.at = value_at
        value = self._quoted()[0] if self._at_quote() else _unescape(self._read(_VALUE)[0])
        if not value.strip():
            raise QueryError(f"'{key}:' at position {start + 1} needs a value; {KEYS[key]}")
        before = self.sort if key == "sort" else any(key == item.key for item in self.filters)
        if key in _ONCE and before:
            raise QueryError(f"'{key}:' is given twice, again at position {start + 1}; keep one")
        value = _file_name(value, start) if key in _PATHS else _words(value, start)
        canonical = _canonical(key, value, value_at + 1)
        if key == "sort":
            self.sort = canonical
        else:
            self.filters.append(Filter(key, canonical))

    def _read(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Match a pattern, which cannot fail, at the current position and move past it."""
        match = pattern.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return match

    def _at_quote(self) -> bool:
        return self.text[self.at : self.at + 1] in (*_QUOTES,)

    def _text(self) -> tuple[str, float | None]:
        """Read a quoted text or a word, and its weight if it ends in ^w."""
        if self._at_quote():
            return self._quoted()
        match = self._read(_BARE)
        return _unescape(match[1]), _weight(match)

    def _quoted(self) -> tuple[str, float | None]:
        match = _QUOTED.match(self.text, self.at)
        if match is None:
            raise QueryError(
                f"quote at position {self.at + 1} is not closed; add a closing quote, "
                'or write \\" for the character itself'
            )
        self.at = match.end()
        return _unescape(match[1]), _weight(match)


def _unescape(text: str) -> str:
    return re.sub(_ESCAPE, lambda match: match[0][1], text)


def _weight(match: re.Match[str]) -> float | None:
    digits, position = match["weight"], match.start("weight")  # from 1: that of the ^
    if digits is None:
        return None
    if not _WEIGHT.fullmatch(digits):
        raise QueryError(
            f"weight '{_shorten(digits)}' at position {position} is not a number; write ^ and a "
            f"number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, or \\^ for the character itself"
        )
    _check_weight(float(digits), f" at position {position}")
    return float(digits)


def _words(text: str, start: int) -> str:
    """Return text for a model or the catalog, with single spaces."""
    return " ".join(_file_name(text, start, surrogates="strict").split())


def _file_name(text: str, start: int, *, surrogates: str = "surrogateescape") -> str:
    """Return a name as the file system has it: bytes that are not UTF-8 are lone surrogates."""
    if not text.strip():
        raise QueryError(f"text at position {start + 1} is empty; leave it out")
    try:
        text.encode(errors=surrogates)
    except UnicodeEncodeError:
        message = f"text at position {start + 1} is not valid Unicode; type it again"
        raise QueryError(message) from None
    return text


def _canonical(key: str, value: str, position: int) -> str:
    """Return the value in the form that Filter documents. Raises QueryError."""
    if key in ("after", "before"):
        return _date(key, value, position)
    if key in ("width", "height"):
        return _pixels(key, value, position)
    if key in CHOICES:
        choice = value.lower()
        if choice not in CHOICES[key]:
            near = difflib.get_close_matches(choice, CHOICES[key], n=1, cutoff=0.0)[0]
            raise QueryError(
                f"unknown {key} '{_shorten(value)}' at position {position}; did you mean "
                f"'{near}'? It is one of {', '.join(CHOICES[key])}"
            )
        return choice
    if key == "format":
        name = value.lstrip(" .").upper()
        return _FORMATS.get(name, name) or value
    return value


def _date(key: str, value: str, position: int) -> str:
    if match := _DATE.fullmatch(value):
        year, month, day = (int(part) if part else 1 for part in match.groups())
        try:
            datetime.date(year, month, day)
            return match[0]
        except ValueError:  # month 13, 30 February, year 0
            pass
    raise QueryError(
        f"'{_shorten(value)}' at position {position} is not a date; "
        f"use the form {key}:2023, {key}:2023-05 or {key}:2023-05-01"
    )


def _pixels(key: str, value: str, position: int) -> str:
    match = _PIXELS.fullmatch(value)
    if match is None:
        raise QueryError(
            f"'{_shorten(value)}' at position {position} is not a number of pixels; "
            f"use the form {key}:1000 or {key}:>1000"
        )
    return str(int(match[2]) + (match[1] == ">"))


def _check_weight(weight: float, where: str = "") -> None:
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:  # false for NaN, too
        raise QueryError(
            f"weight {weight:g}{where} is out of range; "
            f"weights are {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
        )


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _escape(text: str, signs: Iterable[str]) -> str:
    return "".join("\\" + char if char in signs else char for char in text)


def _escape_word(text: str) -> str:
    """Escape a free word: quotes and signs matter only in front, a colon only after a key."""
    word = _escape(text, "\\^")
    if _KEY.match(word):
        word = word.replace(":", "\\:", 1)
    return "\\" + word if word[:1] in _SIGNS else word


def _quote(text: str) -> str:
    return '"' + _escape(text, _QUOTES + "\\") + '"'


def _quote_if_needed(value: str) -> str:
    plain = not any(char.isspace() for char in value) and not set(value) & {*_QUOTES, "\\"}
    return value if plain else _quote(value)


def _suffix(weight: float) -> str:
    return "" if weight == 1.0 else f"^{float(weight)!r}"
