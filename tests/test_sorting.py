"""Sorting a library into words: the result, its table and the Sort page."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from colours import ColourModel, paint
from starlette.testclient import TestClient

from app.web import sorting as module
from app.web.api import create_app
from app.web.page import Page
from app.web.saved_reports import SavedReports
from app.web.sorting import Sorter, Sorting, SortRequest, UnknownSortingError
from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from clipkit.errors import InputError, ModelError

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOST = "http://127.0.0.1:7860"
EVIL = "<img src=x onerror=alert(1)>"


class Model(ColourModel):
    """Says what sorting asks of a model beside the vectors. Its texts know a colour per word."""

    precision = "float32"
    logit_scale = 10.0
    asked = 0

    def encode_texts(self, texts: Any) -> np.ndarray:
        self.asked += 1
        return super().encode_texts([text.replace(".", "") for text in texts])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 red pictures, 10 blue ones and a white one, the white one with a name that means harm."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(30):
        paint(folder / "photos" / f"red {number}.png", "red", number=number)
    for number in range(10):
        paint(folder / "photos" / f"blue {number}.png", "blue", number=number)
    paint(folder / "photos" / f"={EVIL}.png", "white")
    model = Model()
    with Catalog.open(folder / "index", write=True) as catalog:
        index_folders(catalog, [folder / "photos"], encoder=model)
    return folder / "index"


@pytest.fixture
def workspace(library: Path) -> Iterator[Workspace]:
    made = Workspace(library, Model())  # type: ignore[arg-type]
    yield made
    made.close()


@pytest.fixture
def sorter(workspace: Workspace) -> Sorter:
    return Sorter(workspace)


@pytest.fixture
def page(workspace: Workspace, sorter: Sorter, tmp_path: Path) -> Page:
    return Page(workspace, sorter, SavedReports(tmp_path / "reports"))


@pytest.fixture
def client(workspace: Workspace, sorter: Sorter) -> TestClient:
    app = create_app(workspace, sorter=sorter)
    return TestClient(app, base_url=HOST, raise_server_exceptions=False)


def request(words: str, choice: str = "alone", floor: str = "0") -> SortRequest:
    return SortRequest.from_page({"words": words, "choice": choice, "floor": floor})


def counts(sorting: Sorting) -> dict[str, int]:
    return {group.word: group.count for group in sorting.groups}


# ---- the request


def test_words_come_on_lines_or_between_commas() -> None:
    parsed = request(" red,  dark   blue\n\nRED, white ,,\r\nGrün")
    assert parsed.words == ("RED", "dark blue", "white", "Grün")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"words": " , \n"}, "0 different words to sort into; write 2 to 200"),
        ({"words": "red, Red"}, "1 different word to sort into"),
        ({"words": "\n".join(map(str, range(201)))}, "201 different words"),
        ({"words": "red, " + "x" * 201}, "has 201 letters; the limit is 200"),
        ({"words": 7}, "must be text"),
        ({"words": "red, blue", "choice": "../x"}, "unknown phrasing '../x'"),
        ({"words": "red, blue", "choice": ["x"]}, "unknown phrasing"),
        ({"words": "red, blue", "floor": "49"}, "unknown floor '49'; choose from 0, 50, 70, 90"),
    ],
)
def test_what_cannot_be_sorted_into_is_a_sentence(data: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SortRequest.from_page(data)


@pytest.mark.parametrize("choice", module.PHRASINGS)
def test_every_choice_of_phrasing_has_templates(choice: str) -> None:
    assert "red" in request("red, blue", choice).templates.prompts("red")[0]


# ---- sorting


def test_pictures_go_to_the_word_that_fits_best(sorter: Sorter) -> None:
    """White (1, 1, 1) / sqrt 3 has cosine -1/3 to red and blue (1 - 1 - 1 = -1) alike: it is a close
    call, probability 1/2 each. A red picture has cosine 1 to red, -1/3 to blue and a logit scale of
    10: probability 1 / (1 + exp(-40/3)) = 0.9999984."""
    sorting = sorter.sort(request("blue, red"))
    red, blue = sorting.groups
    assert (red.word, blue.word) == ("red", "blue")
    assert red.count in (30, 31) and red.count + blue.count == 41
    assert red.share == red.count / 41
    assert red.best[0].probability == pytest.approx(0.9999984, abs=1e-6)
    assert len(red.best) == module.BEST_SHOWN
    assert all("/red " in guess.row.path for guess in red.best)
    assert sorting.close_total == 1
    (close,) = sorting.close
    assert {close.word, close.second} == {"blue", "red"} and "/=" in close.row.path
    assert close.probability == pytest.approx(0.5, abs=1e-3)


def test_a_picture_of_no_word_is_none_of_these(sorter: Sorter, client: TestClient) -> None:
    """A background word, unknown to the model, is (72.5, -127.5, 72.5) / 163.6. Its cosine is 0.45 to
    a red and to a blue picture, 0.06 to the white one. With the logit scale of 10, red has
    e^10 / (e^10 + 4 e^4.5) = 0.984 in a red picture, and e^-3.3 / (2 e^-3.3 + 4 e^0.6) = 0.005 in the
    white one: beyond any floor."""
    assert request("red, blue").floor == 0
    assert SortRequest.from_page({"words": "red, blue"}).floor == 50
    sorting = sorter.sort(request("red, blue", floor="90"))
    assert counts(sorting) == {"red": 30, "blue": 10, module.NONE: 1}
    red, _, none = sorting.groups
    assert red.best[0].probability == pytest.approx(0.984, abs=1e-3)
    (guess,) = none.best
    assert "/=" in guess.row.path and guess.probability == pytest.approx(0.005, abs=1e-3)
    assert sorting.close == ()  # what is none of these is no close call
    assert len(sorter.best(sorting, red.number, 25)) == 25
    assert sorter.best(sorting, none.number, 25) == none.best
    rows = csv.reader(io.StringIO(client.get(f"/sortings/{sorting.key}.csv").text))
    assert [row[0] for row in rows if row[-1] == "no"] == [guess.row.path]


def test_no_picture_is_read_for_it(sorter: Sorter, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was read")

    monkeypatch.setattr("clipkit.images.reading.read_bytes", refuse)
    monkeypatch.setattr(Model, "encode_images", refuse)
    sorting = sorter.sort(request("blue, red, white"))
    assert counts(sorting) == {"red": 30, "blue": 10, "white": 1}


def test_blocks_change_nothing(sorter: Sorter, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sorter.sort(request("blue, red, white"))
    monkeypatch.setattr(module, "BLOCK", 7)
    again = Sorter(sorter._workspace).sort(request("blue, red, white"))
    assert np.array_equal(whole.first, again.first) and np.array_equal(whole.second, again.second)
    assert np.allclose(whole.probability, again.probability, atol=1e-6)


def test_a_word_may_get_nothing(sorter: Sorter) -> None:
    sorting = sorter.sort(request("red, blue, white, green"))
    assert counts(sorting) == {"red": 30, "blue": 10, "white": 1, "green": 0}
    assert sorting.groups[-1].confidence is None


def test_the_same_question_is_answered_from_memory_until_the_library_changes(
    sorter: Sorter, workspace: Workspace, tmp_path: Path, library: Path
) -> None:
    model = workspace.model
    first = sorter.sort(request("red, blue"))
    assert sorter.sort(request("red, blue")) is first
    assert model.asked == 1
    for word in ("green", "white", "yellow", "black"):
        sorter.sort(request(f"red, {word}"))
    with pytest.raises(UnknownSortingError, match="no longer in memory; sort again"):
        sorter.table(first.key)
    latest = sorter.sort(request("red, blue"))
    paint(tmp_path / "more" / "new.png", "blue", size=(20, 20))
    with Catalog.open(library, write=True) as catalog:
        index_folders(catalog, [tmp_path / "more"], encoder=model)
    try:
        assert counts(sorter.sort(request("red, blue")))["blue"] in (11, 12)
        assert sorter.sort(request("red, blue")).key != latest.key
    finally:
        with Catalog.open(library, write=True) as catalog:
            catalog.remove_root(tmp_path / "more")


def test_without_pictures_or_vectors_a_sentence_says_so(tmp_path: Path, library: Path) -> None:
    nothing = Workspace(tmp_path / "none", Model())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="there are no pictures yet"):
        Sorter(nothing).sort(request("red, blue"))
    assert not (tmp_path / "none").exists()
    other = Model()
    other.encoder_id = other.known_id = "0" * 16  # type: ignore[misc]
    other.spec = "another"
    with pytest.raises(InputError, match="the search is with another"):
        Sorter(Workspace(library, other)).sort(request("red, blue"))  # type: ignore[arg-type]


# ---- the table


def test_the_table_holds_every_picture_once(client: TestClient, sorter: Sorter) -> None:
    sorting = sorter.sort(request("red, blue, =white"))
    answer = client.get(f"/sortings/{sorting.key}.csv")
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    rows = list(csv.reader(io.StringIO(answer.content.decode())))
    assert rows[0] == ["path", "word", "probability", "second word", "its probability", "sure"]
    assert len({row[0] for row in rows[1:]}) == len(rows) - 1 == 41
    assert sum(row[1] == "red" for row in rows) == 30
    # a spreadsheet would run a cell that begins with "="
    assert {row[1] for row in rows} | {row[3] for row in rows} >= {"'=white", "red", "blue"}


@pytest.mark.parametrize("key", ["0" * 16, "../x", "%2e%2e", "x" * 16, "0" * 15, ""])
def test_a_table_that_is_not_there_is_not_found(client: TestClient, key: str) -> None:
    answer = client.get(f"/sortings/{key}.csv")
    assert answer.status_code == 404 and answer.json()["error"]


# ---- the page's HTML


def test_names_are_only_names(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "reports" / "r"
    folder.mkdir(parents=True)
    report = {"title": EVIL, "model": EVIL, "created_at": '"><b>'}
    (folder / "report.json").write_text(json.dumps(report))
    for data in (
        {"words": f"{EVIL}, red, </textarea><b>, white", "choice": "alone", "ticket": '"><b>'},
        {"words": f"{EVIL}", "choice": EVIL},
        {"words": "red, white", "choice": "alone"},  # the white picture's file name
    ):
        answer, _ = page.sort(data)
        assert EVIL not in answer and "<b>" not in answer
        assert "&lt;img src=x" in answer


def test_errors_are_sentences_and_faults_are_logged(
    page: Page, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert "1 different word to sort into" in page.sort({"words": "red"})[0]

    def fail(error: Exception) -> str:
        def sort(*_: Any) -> None:
            raise error

        monkeypatch.setattr(Sorter, "sort", sort)
        return page.sort({"words": "red, blue"})[0]

    assert "the hub does not answer" in fail(ModelError("the hub does not answer"))
    assert "see the terminal" in fail(RuntimeError("secret")) and "secret" not in page.sort({})[0]
    assert "sorting failed" in caplog.text


def test_what_was_typed_stays(page: Page) -> None:
    answer, _ = page.sort({"words": "red,\nblue", "choice": "plain"})
    assert ">red,\nblue</textarea>" in answer
    assert '<option value="plain" selected>' in answer
    assert '<option value="50" selected>' in answer
    assert '<option value="70" selected>' in page.sort({"words": "red", "floor": "70"})[0]


# ---- in a browser


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_sorting_in_a_real_browser(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One page start: sort, look, download, go back, open a report; no fault, no request elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    from chromium import ARGUMENTS, Watched, served

    (tmp_path / "reports" / "mine").mkdir(parents=True)
    report = {"title": "My report", "model": "builtin"}
    (tmp_path / "reports" / "mine" / "report.json").write_text(json.dumps(report))
    (tmp_path / "reports" / "mine" / "report.html").write_text(
        "<style>p { color: red }</style><p>shown</p>"
        "<script>document.querySelector('p').textContent = 'run'</script>"
    )
    monkeypatch.setenv("CLIPKIT_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setattr("app.web.render.GROUP_PAGE", 20)
    with (
        playwright.sync_playwright() as driver,
        served(Workspace(library, Model())) as address,  # type: ignore[arg-type]
    ):
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        watched = Watched(browser.new_page(viewport={"width": 390, "height": 780}))
        page = watched.page
        page.set_default_timeout(20_000)
        page.goto(f"{address}/#classify")
        page.fill(".evaluate textarea", "red, blue\nwhite")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.select_option(".evaluate [name=choice]", "alone")
        page.select_option(".evaluate [name=floor]", "90")
        page.click(".sort [type=submit]")
        page.wait_for_selector(".shares")
        assert page.locator("#ask form[data-do=search]").is_hidden()
        cells = page.eval_on_selector_all(".shares tbody tr", "all => all.map(r => r.innerText)")
        assert [" ".join(cell.split()) for cell in cells] == [
            "red 30 73.2 % 98.4 %",
            "blue 10 24.4 % 98.4 %",
            "white 1 2.4 % 99.9 %",
            "None of these 0 0.0 % –",
        ]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        with page.expect_download() as download:
            page.click("a[download]")
        assert Path(download.value.path()).read_text().count("\n") == 42
        page.click(".word .open >> nth=0")
        page.wait_for_selector("#viewer dd")
        page.keyboard.press("Escape")
        # All pictures of a word, in steps, and back to all words.
        page.click("text=Show all 30")
        page.wait_for_selector(".word.all")
        assert page.locator(".hit").count() == 20
        page.click("text=Show 10 more")
        page.wait_for_function("document.querySelectorAll('.hit').length === 30")
        assert "30 of 30 pictures" in page.inner_text(".word h2")
        page.click("text=Back to all words")
        page.wait_for_selector(".word:not(.all)")
        assert page.url.endswith("#classify=red%2C+blue%0Awhite&choice=alone&floor=90")
        page.click("[data-do=home]")
        page.wait_for_selector(".home .chips")
        page.go_back()
        page.wait_for_selector(".shares")
        assert page.input_value(".evaluate textarea") == "red, blue\nwhite"
        assert not watched.faults
        with page.context.expect_page() as opened:
            page.click(".reports a")
        shown = opened.value
        shown.wait_for_load_state()
        assert shown.inner_text("p") == "shown"
        assert shown.evaluate("getComputedStyle(document.querySelector('p')).color") == (
            "rgb(255, 0, 0)"
        )
        assert all(url.startswith((address, "data:", "blob:")) for url in watched.requests)
        browser.close()
