"""Tables as people have them: any separator, quoting, encoding, and names for columns."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from data_samples import rows_of, save_all, told
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import DatasetError
from clipkit.sources import Broken, Options, Row, open_source
from clipkit.sources.tables import Table

PAIRS = [("a.jpg", ("A dog, running",), None), ("b.jpg", ("A cat; it sleeps",), None)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_all(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    return tmp_path


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_any_separator_and_encoding(folder: Path, separator: str, encoding: str) -> None:
    lines = [["Filename", "Bildbeschreibung"], ["a.jpg", "Ein Käfer, grün"], ["b.jpg", "Öl; x"]]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(lines)
    (folder / "t.csv").write_bytes(text.getvalue().encode(encoding))
    assert told(rows_of(folder / "t.csv")) == [
        ("a.jpg", ("Ein Käfer, grün",), None),
        ("b.jpg", ("Öl; x",), None),
    ]


@pytest.mark.parametrize(
    ("header", "image", "captions"),
    [
        ("Filename,Bildbeschreibung,Jahr", "Filename", ("Bildbeschreibung",)),
        ("img_path,alt text,n", "img_path", ("alt text",)),
        ("Bilddatei,Anmerkung,n", "Bilddatei", ("Anmerkung",)),  # the only wordy column
        ("no,text,IMAGE", "no", ("text",)),  # by content: IMAGE holds no file names
        ("Caption 1,x,Caption 2", "x", ("Caption 1", "Caption 2")),
        ("image,caption_1,caption_2", "image", ("caption_1", "caption_2")),
        ("image,title,description", "image", ("description",)),
        ("image,Título,n", "image", ("Título",)),
    ],
)
def test_columns_are_guessed(
    folder: Path, header: str, image: str, captions: tuple[str, ...]
) -> None:
    names = header.split(",")
    values = dict.fromkeys(names, "7") | dict.fromkeys(captions, "A big dog") | {image: "a.jpg"}
    (folder / "t.csv").write_text(f"{header}\n{','.join(values[n] for n in names)}\n")
    (row,) = rows_of(folder / "t.csv")
    assert isinstance(row, Row)
    assert (row.name, row.captions) == ("a.jpg", ("A big dog",) * len(captions))


def test_columns_that_cannot_be_told_are_named(folder: Path) -> None:
    (folder / "t.csv").write_text("file,left,right\na.jpg,a dog,a cat\nb.jpg,a cow,a pig\n")
    with pytest.raises(DatasetError, match=r"it has 'file', 'left', 'right'; .*--caption-column"):
        open_source(folder / "t.csv")
    with pytest.raises(DatasetError, match=r"no column 'rihgt'.*did you mean 'right'\?"):
        open_source(folder / "t.csv", options=Options(caption_columns=("rihgt",)))
    chosen = Options("FILE", ("right", "left"))
    assert told(rows_of(folder / "t.csv", options=chosen))[0] == ("a.jpg", ("a cat", "a dog"), None)
    (folder / "u.csv").write_text("x,text\n1,a dog\n")
    with pytest.raises(DatasetError, match=r"it has 'x', 'text'; .*--image-column"):
        open_source(folder / "u.csv")


def test_several_rows_tags_splits_and_other_columns(folder: Path) -> None:
    (folder / "t.tsv").write_text(
        "image\tcaption\tkeywords\tsplit\tyear\n"
        "a.jpg\tA dog\tpet, wet\tdev\t2001\n"
        "a.jpg\tA wet dog\t\tdev\t\n"
        "b.jpg\t\t\ttest\t\n"
    )
    rows = rows_of(folder / "t.tsv")
    assert told(rows) == [
        ("a.jpg", ("A dog",), "validation"),
        ("a.jpg", ("A wet dog",), "validation"),
        ("b.jpg", ("",), "test"),  # one empty caption, to be counted as such
    ]
    assert isinstance(rows[0], Row)
    assert rows[0].meta == {"keywords": ["pet", "wet"], "year": "2001"}


def test_a_table_without_a_header(folder: Path) -> None:
    (folder / "t.csv").write_text("a.jpg;A small dog\nb.jpg;A small cat\n")
    assert told(rows_of(folder / "t.csv")) == [
        ("a.jpg", ("A small dog",), None),
        ("b.jpg", ("A small cat",), None),
    ]


def test_flickr30ks_bars_and_spaces(folder: Path) -> None:
    """results.csv of the Kaggle copy: `image_name| comment_number| comment`."""
    (folder / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        "a.jpg| 0| Two young guys .\na.jpg| 1| Two men .\nb.jpg| 4   A row that lacks a bar .\n"
    )
    assert told(rows_of(folder / "results.csv")) == [
        ("a.jpg", ("Two young guys .",), None),
        ("a.jpg", ("Two men .",), None),
        ("line 4", "wrong-field-count"),
    ]


def test_broken_rows_cost_themselves_only(folder: Path) -> None:
    """A quote never closed would swallow what follows; a quoted line break must still be one row."""
    (folder / "t.csv").write_text(
        "image,caption\n"
        'a.jpg,"A dog, running"\n'
        "a.jpg,too,many\n"
        'c.jpg,"never closed\n'
        'b.jpg,"A cat; it sleeps"\n'
        "\n"
        'c.jpg,"two\nlines"\n'
        'c.jpg,"the last one, open\n'
    )
    assert told(rows_of(folder / "t.csv")) == [
        PAIRS[0],
        ("line 3", "wrong-field-count"),
        ("line 4", "unclosed-quote"),
        PAIRS[1],
        ("c.jpg", ("two\nlines",), None),
        ("line 9", "unclosed-quote"),
    ]


def test_quotes_inside_text_are_text(folder: Path) -> None:
    (folder / "t.tsv").write_text('image\tcaption\na.jpg\tA 5" nail\nb.jpg\t"So" he said\n')
    assert told(rows_of(folder / "t.tsv")) == [
        ("a.jpg", ('A 5" nail',), None),
        ("b.jpg", ('"So" he said',), None),
    ]


cells = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12
).map(str.strip)


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(cells.filter(bool), cells), min_size=1, max_size=8),
    separator=st.sampled_from([",", ";", "\t", "|"]),
)
def test_whatever_the_csv_module_writes_is_read_back(
    rows: list[tuple[str, str]], separator: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any text, quoted as need be, in a table of a known separator and width."""
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL)
        writer.writerows([("image", "caption"), *rows])
    table = Table(path, "utf-8", separator, ("image", "caption"), True, 0)
    read = [tuple(r[1].values()) for r in table.records() if not isinstance(r, Broken)]
    assert read == rows
