"""Numbers and names as people read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.wording import count, duration, percent, printable


@given(st.text(st.characters(min_codepoint=0, max_codepoint=0x10FFFF), max_size=40))
def test_any_text_becomes_one_line_of_utf_8(value: str) -> None:
    """Lone surrogates included: JSON to a browser must be UTF-8."""
    shown = printable(value)
    assert len(shown) == len(value)
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]", shown)


def test_names_are_shown_as_they_are_where_they_can_be() -> None:
    for name in ("Zürich 東京 🎂.jpg", "👩‍👧.png", "a\u00a0b", "soft\u00adhyphen"):
        assert printable(name) == name
    assert printable("a\nb\udce9\u202egpj.exe") == "a␊b\ufffd\ufffdgpj.exe"
    assert printable("\x1b[31mred\x9b") == "␛[31mred\ufffd"
    assert printable(3) == "3"


def test_counts_have_a_plural() -> None:
    assert [count(0), count(1), count(12_345, "file")] == [
        "0 pictures",
        "1 picture",
        "12,345 files",
    ]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-1, "0 ms"),
        (0, "0 ms"),
        (0.0421, "42 ms"),
        (0.9996, "1.0 s"),
        (3.21, "3.2 s"),
        (9.96, "10 s"),
        (89, "89 s"),
        (89.4, "89 s"),
        (89.6, "2 min"),
        (5_340, "89 min"),
        (5_400, "1 h 30 min"),
        (7_500, "2 h 5 min"),
    ],
)
def test_a_duration_has_two_digits_and_the_unit_that_fits(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, "0.0 %"),
        (0.000_42, "0.042 %"),
        (0.001, "0.1 %"),
        (0.4534, "45.3 %"),
        (0.9996, "99.9 %"),
        (1, "100.0 %"),
        (1.5, "150.0 %"),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_to_all(share: float, expected: str) -> None:
    assert percent(share) == expected


def test_a_small_share_has_two_digits_and_no_exponent() -> None:
    assert [percent(share) for share in (1e-5, 4.2e-6, 1e-9, -0.02)] == [
        "0.0010 %",
        "0.00042 %",
        "0.0 %",
        "−2.0 %",
    ]
