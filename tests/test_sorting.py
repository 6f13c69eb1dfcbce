"""The evaluation page: sorting a library into words, and reports that are shown but never trusted."""

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
from app.web.sort_page import EvaluationPage
from app.web.sorting import Evaluation, Question, Sorting, UnknownReportError, reports_folder
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
def evaluation(workspace: Workspace, tmp_path: Path) -> Evaluation:
    return Evaluation(workspace, reports=tmp_path / "reports")


@pytest.fixture
def client(workspace: Workspace, evaluation: Evaluation) -> TestClient:
    app = create_app(workspace, evaluation=evaluation)
    return TestClient(app, base_url=HOST, raise_server_exceptions=False)


def question(words: str, choice: str = "alone") -> Question:
    return Question.from_page({"words": words, "choice": choice})


def counts(sorting: Sorting) -> dict[str, int]:
    return {group.word: group.count for group in sorting.groups}


# ---- the question


def test_words_come_on_lines_or_between_commas() -> None:
    asked = question(" red,  dark   blue\n\nRED, white ,,\r\nGrün")
    assert asked.words == ("RED", "dark blue", "white", "Grün")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"words": " , \n"}, "0 different words to sort into; write 2 to 200"),
        ({"words": "red, Red"}, "1 different word to sort into"),
        ({"words": "\n".join(map(str, range(201)))}, "201 different words"),
        ({"words": "red, " + "x" * 201}, "has 201 letters; the limit is 200"),
        ({"words": 7}, "must be text"),
        ({"words": "red, blue", "choice": "../x"}, "no phrasing '../x'"),
        ({"words": "red, blue", "choice": ["x"]}, "no phrasing"),
    ],
)
def test_what_cannot_be_sorted_into_is_a_sentence(data: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Question.from_page(data)


@pytest.mark.parametrize("choice", module.CHOICES)
def test_every_choice_of_phrasing_has_templates(choice: str) -> None:
    assert "red" in question("red, blue", choice).templates.prompts("red")[0]


# ---- sorting


def test_pictures_go_to_the_word_that_fits_best(evaluation: Evaluation) -> None:
    """White (1, 1, 1) / sqrt 3 has cosine -1/3 to red and blue (1 - 1 - 1 = -1) alike: it is a close
    call, probability 1/2 each. A red picture has cosine 1 to red, -1/3 to blue and a logit scale of
    10: probability 1 / (1 + exp(-40/3)) = 0.9999984."""
    sorting = evaluation.sort(question("blue, red"))
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


def test_no_picture_is_read_for_it(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was read")

    monkeypatch.setattr("clipkit.images.reading.read_bytes", refuse)
    monkeypatch.setattr(Model, "encode_images", refuse)
    sorting = evaluation.sort(question("blue, red, white"))
    assert counts(sorting) == {"red": 30, "blue": 10, "white": 1}


def test_blocks_change_nothing(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluation.sort(question("blue, red, white"))
    monkeypatch.setattr(module, "BLOCK", 7)
    again = Evaluation(evaluation._workspace).sort(question("blue, red, white"))
    assert np.array_equal(whole.first, again.first) and np.array_equal(whole.second, again.second)
    assert np.allclose(whole.probability, again.probability, atol=1e-6)


def test_a_word_may_get_nothing(evaluation: Evaluation) -> None:
    sorting = evaluation.sort(question("red, blue, white, green"))
    assert counts(sorting) == {"red": 30, "blue": 10, "white": 1, "green": 0}
    assert sorting.groups[-1].confidence is None


def test_the_same_question_is_answered_from_memory_until_the_library_changes(
    evaluation: Evaluation, workspace: Workspace, tmp_path: Path, library: Path
) -> None:
    model = workspace.model
    first = evaluation.sort(question("red, blue"))
    assert evaluation.sort(question("red, blue")) is first
    assert model.asked == 1
    for word in ("green", "white", "yellow", "black"):
        evaluation.sort(question(f"red, {word}"))
    with pytest.raises(UnknownReportError, match="no longer remembered; sort again"):
        evaluation.table(first.key)
    latest = evaluation.sort(question("red, blue"))
    paint(tmp_path / "more" / "new.png", "blue", size=(20, 20))
    with Catalog.open(library, write=True) as catalog:
        index_folders(catalog, [tmp_path / "more"], encoder=model)
    try:
        assert counts(evaluation.sort(question("red, blue")))["blue"] in (11, 12)
        assert evaluation.sort(question("red, blue")).key != latest.key
    finally:
        with Catalog.open(library, write=True) as catalog:
            catalog.remove_root(tmp_path / "more")


def test_without_pictures_or_vectors_a_sentence_says_so(tmp_path: Path, library: Path) -> None:
    nothing = Workspace(tmp_path / "none", Model())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no pictures to sort yet"):
        Evaluation(nothing).sort(question("red, blue"))
    assert not (tmp_path / "none").exists()
    other = Model()
    other.encoder_id = other.known_id = "0" * 16  # type: ignore[misc]
    other.spec = "another"
    with pytest.raises(InputError, match="has a vector of model another"):
        Evaluation(Workspace(library, other)).sort(question("red, blue"))  # type: ignore[arg-type]


# ---- the table


def test_the_table_holds_every_picture_once(client: TestClient, evaluation: Evaluation) -> None:
    sorting = evaluation.sort(question("red, blue, =white"))
    answer = client.get(f"/sortings/{sorting.key}.csv")
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    rows = list(csv.reader(io.StringIO(answer.content.decode())))
    assert rows[0] == ["path", "word", "probability", "second word", "its probability"]
    assert len({row[0] for row in rows[1:]}) == len(rows) - 1 == 41
    assert sum(row[1] == "red" for row in rows) == 30
    # a spreadsheet would run a cell that begins with "="
    assert {row[1] for row in rows} | {row[3] for row in rows} >= {"'=white", "red", "blue"}


@pytest.mark.parametrize("key", ["0" * 16, "../x", "%2e%2e", "x" * 16, "0" * 15, ""])
def test_a_table_that_is_not_there_is_not_found(client: TestClient, key: str) -> None:
    answer = client.get(f"/sortings/{key}.csv")
    assert answer.status_code == 404 and answer.json()["error"]


# ---- reports


def put_report(folder: Path, name: str, *, made: str = "", **told: Any) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    told = {"title": f"About {name}", "model": "builtin", "created_at": made, **told}
    (place / "report.json").write_text(json.dumps(told))
    (place / "report.html").write_text(f"<script>alert(1)</script>{name}")
    return place


def test_reports_are_listed_newest_first(evaluation: Evaluation, tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    put_report(folder, "old", made="2025-01-01T00:00:00+00:00")
    put_report(folder, "new", made="2026-01-01T00:00:00+00:00")
    comparison = {"names": ["a", "b"], "model": None}
    put_report(folder, "compared", made="2025-06-01T00:00:00+00:00", **comparison)
    (folder / "file.txt").write_text("")
    (folder / "empty").mkdir()
    put_report(folder, "broken")
    (folder / "broken" / "report.json").write_text("{")
    put_report(folder, "list")
    (folder / "list" / "report.json").write_text("[]")
    put_report(folder, ".hidden")
    assert [row.name for row in evaluation.reports()] == ["new", "compared", "old"]
    assert evaluation.reports()[1].models == ("a", "b")


def test_there_may_be_no_reports_yet(evaluation: Evaluation) -> None:
    assert evaluation.reports() == []
    assert "None yet" in EvaluationPage(evaluation).answer({})


def test_the_folder_of_reports_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPKIT_REPORTS", "/some/where")
    assert reports_folder() == Path("/some/where")
    monkeypatch.delenv("CLIPKIT_REPORTS")
    assert reports_folder().parts[-2:] == ("clipkit", "reports")


def test_a_report_is_shown_but_may_do_nothing(client: TestClient, tmp_path: Path) -> None:
    """Its folder may come from anywhere: no script, no request, no form, and an origin of its own."""
    put_report(tmp_path / "reports", "mine")
    answer = client.get("/reports/mine")
    assert answer.status_code == 200 and answer.text.endswith("mine")
    assert answer.headers["content-type"].startswith("text/html")
    directives = dict(
        part.strip().partition(" ")[::2]
        for part in answer.headers["content-security-policy"].split(";")
    )
    assert directives == {
        "default-src": "'none'",
        "frame-ancestors": "'none'",
        "sandbox": "",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name",
    ["..", "../reports", "%2e%2e", "..%2fsecret", "mine/report.json", "mine%2freport.html", ".hidden",
     "mine%00", "nobody", "mine..", "/etc", "link", "linked-page", "", "a" * 121],
)  # fmt: skip
def test_nothing_but_a_report_of_the_folder_is_served(
    client: TestClient, tmp_path: Path, name: str
) -> None:
    """Traversal, hidden folders, and links that lead out of the folder."""
    put_report(tmp_path / "reports", "mine")
    put_report(tmp_path / "reports", ".hidden")
    secret = put_report(tmp_path, "secret")
    (tmp_path / "reports" / "link").symlink_to(secret)
    linked = put_report(tmp_path / "reports", "linked-page") / "report.html"
    linked.unlink()
    linked.symlink_to(secret / "report.html")
    answer = client.get(f"/reports/{name}")
    assert answer.status_code == 404 and answer.json()["error"]
    assert "secret" not in answer.text


def test_links_out_of_the_folder_are_not_listed(evaluation: Evaluation, tmp_path: Path) -> None:
    secret = put_report(tmp_path, "secret")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "link").symlink_to(secret)
    assert evaluation.reports() == []


# ---- the page's HTML


def test_names_are_only_names(evaluation: Evaluation, tmp_path: Path) -> None:
    put_report(tmp_path / "reports", "r", title=EVIL, model=EVIL, created_at='"><b>')
    page = EvaluationPage(evaluation)
    for data in (
        {"words": f"{EVIL}, red, </textarea><b>, white", "choice": "alone", "ticket": '"><b>'},
        {"words": f"{EVIL}", "choice": EVIL},
        {"words": "red, white", "choice": "alone"},  # the white picture's file name
    ):
        answer = page.answer(data)
        assert EVIL not in answer and "<b>" not in answer
        assert "&lt;img src=x" in answer


def test_errors_are_sentences_and_faults_are_logged(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page = EvaluationPage(evaluation)
    assert "1 different word to sort into" in page.answer({"words": "red"})

    def fail(error: Exception) -> str:
        def sort(*_: Any) -> None:
            raise error

        monkeypatch.setattr(Evaluation, "sort", sort)
        return page.answer({"words": "red, blue"})

    assert "the hub does not answer" in fail(ModelError("the hub does not answer"))
    assert "no longer" not in fail(RuntimeError("secret")) and "secret" not in page.answer({})
    assert "sorting failed" in caplog.text


def test_what_was_typed_stays(evaluation: Evaluation) -> None:
    answer = EvaluationPage(evaluation).answer({"words": "red,\nblue", "choice": "plain"})
    assert ">red,\nblue</textarea>" in answer
    assert '<option value="plain" selected>' in answer


# ---- in a browser


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_sorting_in_a_real_browser(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One page start: sort, look, download, go back, open a report; no fault, no request elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    from chromium import ARGUMENTS, Watched, served

    put_report(tmp_path / "reports", "mine", title="My report")
    (tmp_path / "reports" / "mine" / "report.html").write_text(
        "<style>p { color: red }</style><p>shown</p>"
        "<script>document.querySelector('p').textContent = 'run'</script>"
    )
    monkeypatch.setenv("CLIPKIT_REPORTS", str(tmp_path / "reports"))
    with (
        playwright.sync_playwright() as driver,
        served(Workspace(library, Model())) as address,  # type: ignore[arg-type]
    ):
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        watched = Watched(browser.new_page(viewport={"width": 390, "height": 780}))
        page = watched.page
        page.set_default_timeout(20_000)
        page.goto(f"{address}/#evaluate")
        page.fill(".evaluate textarea", "red, blue\nwhite")
        page.select_option(".evaluate select", "alone")
        page.click(".sort [type=submit]")
        page.wait_for_selector(".shares")
        assert page.locator("#ask form[data-do=search]").is_hidden()
        cells = page.eval_on_selector_all(".shares tbody tr", "all => all.map(r => r.innerText)")
        assert [" ".join(cell.split()) for cell in cells] == [
            "red 30 73.2 % 99.9 %",
            "blue 10 24.4 % 99.9 %",
            "white 1 2.4 % 99.9 %",
        ]
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        with page.expect_download() as download:
            page.click("a[download]")
        assert Path(download.value.path()).read_text().count("\n") == 42
        page.click(".word .open >> nth=0")
        page.wait_for_selector("#viewer dd")
        page.keyboard.press("Escape")
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
