"""What is mended, what is rejected, for which reason, and what switches it off."""

from __future__ import annotations

import pytest
from data_samples import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clipkit.errors import InputError
from data_prep.clean import Rules, caption_fault, kind_of_repair, mend, picture_fault, same_caption


@pytest.mark.parametrize(
    ("said", "meant", "kind"),
    [
        ("  A  dog\n on\ta beach ", "A dog on a beach", "white space"),
        ("the &quot;required&quot; bubbles &amp; more", 'the "required" bubbles & more', "HTML"),
        ("<p>A <b>red</b> car</p>", "A red car", "HTML"),
        ("I <3 dogs, 3 < 5 > 2", "I <3 dogs, 3 < 5 > 2", None),  # no tags
        ("cafÃ© in MÃ¼nchen", "café in München", "characters"),  # UTF-8 read as Windows-1252
        ("A\u200bdog\ufeff\x07!", "A dog!", "characters"),
        ("“curly” quotes — and dashes", "“curly” quotes — and dashes", None),
        ("half a pair \ud83d", "half a pair ?", "characters"),
        ("ein Käfer 🐞 und 猫", "ein Käfer 🐞 und 猫", None),
    ],
)
def test_captions_are_mended_and_the_kind_of_repair_is_known(
    said: str, meant: str, kind: str | None
) -> None:
    assert mend(said) == meant
    assert kind is None or kind_of_repair(said, meant) == kind


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty"),
        ("x", "too-short"),
        ("A dog " * 200, "too-long"),
        ("https://example.org/a/dog?x=1", "url"),
        ("www.example.org", "url"),
        ("someone@example.org", "url"),
        ("IMG_1234.JPG", "file-name"),
        ("my holiday dog.jpeg", "file-name"),
        ("DSC00042", "file-name"),
        ("PXL_20230501_123456789", "file-name"),
        ("Screenshot 2023-05-01", "file-name"),
        ("1000268201693b08cb0e", "file-name"),
        ("No description.", "placeholder"),
        ("[untitled]", "placeholder"),
        ("N/A", "placeholder"),
        ("Ohne Titel", "placeholder"),
        ("12-345 / 77", "no-letters"),
        ("*****", "no-letters"),
        ("caf\ufffd", "mojibake"),
        ("A dog", None),
        ("Pig", None),
        ("a photo", None),
        ("see https://example.org for dogs", None),
        ("Boeing 747-400", None),
        ("3D", None),
        ("une photo de Málaga, l'été", None),
        ("собака на пляже", None),
        ("海滩上的狗", None),
        ("कुत्ता", None),
    ],
)
def test_reasons(caption: str, reason: str | None) -> None:
    assert caption_fault(caption.strip(), Rules()) == reason


def test_every_rule_can_be_switched_off() -> None:
    off = Rules(
        min_chars=0,
        max_chars=0,
        allow=frozenset({"url", "file-name", "placeholder", "no-letters", "mojibake"}),
    )
    for caption in ("x", "a" * 5000, "www.a.org", "IMG_1.jpg", "untitled", "***", "caf\ufffd"):
        assert caption_fault(caption, Rules()) is not None
        assert caption_fault(caption, off) is None
    assert caption_fault("", off) == "empty"  # nothing to learn from, whatever the rules


def test_scripts() -> None:
    latin = Rules(scripts=("latin",))
    assert caption_fault("A dog in Málaga", latin) is None
    assert caption_fault("собака", latin) == "script"
    assert caption_fault("собака", Rules(scripts=("LATIN", "CYRILLIC"))) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_side": -1}, "min_side is -1; it must be at least 0"),
        ({"radius": 16}, "radius is 16; it must be 0 to 15"),
        ({"allow": frozenset({"urls"})}, "cannot allow 'urls'; use one of blank, url"),
        ({"near": "both"}, "near is 'both'; it must be group, drop or ignore"),
    ],
)
def test_rules_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Rules(**options)  # type: ignore[arg-type]


def test_pictures() -> None:
    grey = Image.new("RGB", (64, 64), (200, 201, 200))
    assert picture_fault(picture(0), 96, 64, Rules()) is None
    assert picture_fault(picture(0), 31, 640, Rules()) == (
        "too-small",
        "31 x 640 pixels; the minimum side is 32 (--min-side)",
    )
    assert picture_fault(picture(0), 31, 640, Rules(min_side=0)) is None
    assert (picture_fault(grey, 64, 64, Rules()) or ("",))[0] == "blank"
    assert picture_fault(grey, 64, 64, Rules(allow=frozenset({"blank"}))) is None


def test_the_same_caption() -> None:
    assert same_caption("A Dog.") == same_caption("a dog") != same_caption("a dog?")
    assert same_caption("caf\u00e9") == same_caption("cafe\u0301")


@given(st.text(max_size=60))
def test_mending_gives_one_clean_line_of_any_text(text: str) -> None:
    meant = mend(text)
    assert meant == meant.strip() and "\n" not in meant
    meant.encode("utf-8")
    caption_fault(meant, Rules())
