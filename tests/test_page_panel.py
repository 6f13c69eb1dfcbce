"""Help, completion and filters of the page, in a real Chromium."""

# ruff: noqa: F811
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import Open, ask, browser, context, pytestmark, served, settled, visit  # noqa: F401
from colours import ColourModel, paint
from PIL import Image

from app.web.workspace import Workspace
from clipkit.catalog import Catalog
from clipkit.embed import index_folders
from clipkit.query import KEYS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Red pictures: c.png is landscape, a.png portrait and larger, b.jpg square, of a camera and in a
    folder of its own."""
    photos, model = tmp_path_factory.mktemp("photos"), ColourModel()
    paint(photos / "c.png", "red")  # 90 x 60
    paint(photos / "a.png", "red", size=(300, 700))
    (photos / "summer trip").mkdir()
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "Acme", "Acme One"  # Make, Model
    Image.new("RGB", (50, 50), "red").save(photos / "summer trip" / "b.jpg", exif=exif)
    (photos / "a.txt").write_text("a tower")
    index = tmp_path_factory.mktemp("index")
    with Catalog.open(index, write=True) as catalog:
        index_folders(catalog, [photos], encoder=model)
    with served(Workspace(index, model)) as address:  # type: ignore[arg-type]
        yield address


def names(page: Any) -> list[str]:
    return page.eval_on_selector_all("#results .hit .place b", "all => all.map(e => e.textContent)")


def suggestions(page: Any) -> list[str]:
    return page.eval_on_selector_all("#completions li", "all => all.map(e => e.textContent)")


def test_help_lists_the_language_and_its_examples_can_be_tried(site: str, visit: Open) -> None:
    page = visit(site)
    page.keyboard.press("?")
    page.wait_for_selector("#help[open]")
    rows = page.eval_on_selector_all("#help [data-key]", "all => all.map(row => row.dataset.key)")
    assert rows == list(KEYS)
    # The library's own values stand in for the examples.
    assert page.inner_text("#help [data-key=camera] .try >> nth=0") == 'camera:"Acme One"'
    page.keyboard.press("Escape")
    page.wait_for_selector("#help", state="hidden")
    page.click("#ask [data-do=help]")
    page.click("#help [data-key=format] .try")
    settled(page)
    assert page.input_value("input[name=words]") == "format:PNG"
    assert sorted(names(page)) == ["a.png", "c.png"]
    # In the field, and in a dialog, ? is only a character.
    page.focus("input[name=words]")
    page.keyboard.type("?")
    assert page.locator("#help").is_hidden()
    assert page.input_value("input[name=words]") == "format:PNG?"


def test_keys_and_their_values_are_completed(site: str, visit: Open) -> None:
    page = visit(site)
    field = page.locator("input[name=words]")
    field.focus()
    page.keyboard.type("red fo")
    assert suggestions(page) == ["folder:", "format:"]
    assert field.get_attribute("aria-expanded") == "true"
    page.keyboard.press("ArrowDown")
    chosen = page.locator("#completions [aria-selected=true]")
    assert field.get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    page.keyboard.press("Tab")  # accepts, and offers the folders
    assert field.input_value() == "red folder:"
    assert [text.partition("/")[2] for text in suggestions(page)] == ["", 'summer trip"']
    page.keyboard.type('"')
    page.keyboard.type("summ")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")  # accepts; it searches only once nothing is chosen
    assert field.input_value().endswith('/summer trip" ')
    assert page.evaluate("document.body.dataset.view") == "home"
    page.keyboard.press("Enter")
    settled(page)
    assert names(page) == ["b.jpg"]
    page.fill("input[name=words]", "")
    page.keyboard.type("orientation:")
    assert suggestions(page) == [f"orientation:{x}" for x in ("landscape", "portrait", "square")]
    page.click("#completions li >> text=square")
    assert field.input_value() == "orientation:square "
    assert page.locator("#completions").is_hidden()
    page.fill("input[name=words]", "")
    page.keyboard.type("camera:acm")
    assert suggestions(page) == ['camera:"Acme One"']


def test_completion_is_not_in_the_way(site: str, visit: Open) -> None:
    """Enter searches and Tab goes on while nothing is chosen; Escape closes the list first."""
    page = visit(site)
    page.focus("input[name=words]")
    for text in ("f", 'a "so', "http://fo", "note:fo", "red fox"):
        page.fill("input[name=words]", "")
        page.keyboard.type(text)
        assert suggestions(page) == [], text
    page.fill("input[name=words]", "")
    page.keyboard.type("red so")
    assert suggestions(page) == ["sort:"]
    page.keyboard.press("Escape")
    assert page.locator("#completions").is_hidden()
    assert page.evaluate("document.activeElement.name") == "words"
    page.fill("input[name=words]", "")
    page.keyboard.type("path")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") != "words"
    assert page.input_value("input[name=words]") == "path"
    ask(page, "red path")
    assert page.input_value("input[name=words]") == "red path"


def test_filters_narrow_order_and_survive(site: str, visit: Open) -> None:
    page = visit(site)
    ask(page, "red")
    page.click("#ask [data-do=filters]")
    of = "n => document.querySelector('.summary p')?.textContent.includes(`of ${n} `)"

    def choose(name: str, value: str, total: int) -> None:
        page.select_option(f"#filters [name={name}]", value)
        page.wait_for_function(of, arg=total)
        page.wait_for_function("!document.body.dataset.busy")

    choose("sort", "name", 3)
    page.wait_for_function("document.querySelector('.hit .place b').textContent === 'a.png'")
    assert names(page) == ["a.png", "b.jpg", "c.png"]
    choose("format", "PNG", 2)
    choose("orientation", "portrait", 1)
    assert names(page) == ["a.png"]
    assert page.inner_text("#ask .set") == "3"
    assert page.get_attribute("#ask [data-do=filters]", "aria-label").endswith(", 3 set")
    for part in ("words=red", "sort=name", "format=PNG", "orientation=portrait"):
        assert part in page.url
    page.go_back()
    page.wait_for_function(of, arg=2)
    assert page.input_value("#filters [name=orientation]") == ""
    choose("format", "", 3)
    choose("size", "640", 1)  # 700 pixels are the longer side of a.png
    assert names(page) == ["a.png"]
    choose("size", "", 3)
    choose("camera", "Acme One", 1)
    assert names(page) == ["b.jpg"]
    again = visit(page.url)  # an address brings the filters along, and shows them
    again.wait_for_selector(".summary")
    settled(again)
    assert names(again) == ["b.jpg"] and again.is_visible("#filters")
    assert again.input_value("#filters [name=camera]") == "Acme One"
    again.click("#filters [data-do=clear-filters]")
    again.wait_for_function(of, arg=3)
    assert again.locator("#ask .set").is_hidden()
    assert again.input_value("input[name=words]") == "red"


def test_what_is_typed_goes_before_the_order_of_the_panel(site: str, visit: Open) -> None:
    """And filters of both must hold."""
    page = visit(f"{site}/#words=sort:name&sort=date&orientation=square")
    page.wait_for_selector(".summary")
    settled(page)
    assert names(page) == ["b.jpg"]
    ask(page, "sort:name orientation:portrait")
    page.wait_for_selector(".nothing")
    page.click("#filters [data-do=clear-filters]")
    page.wait_for_selector(".hit")
    assert names(page) == ["a.png"]


def test_folders_are_chosen_checked_and_forgotten_on_the_page(
    tmp_path: Path, visit: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    for number in (1, 2):
        paint(home / "Pictures" / "trips" / f"{number}.png", "red", number=number)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("app.web.folders.MEDIA", ())
    workspace = Workspace(tmp_path / "index", ColourModel())  # type: ignore[arg-type]
    with served(workspace) as address:
        page = visit(address)
        page.click("#results [data-do=browse]")  # from the start page of an empty library
        page.click("#folders .listing li button")
        page.click("#folders .listing li button >> text=Pictures")
        page.click("#folders .listing li button >> text=trips")
        page.wait_for_selector("#folders .listing >> text=2 pictures directly in this folder")
        page.click("#folders [data-do=browse][aria-label='The folder above']")
        page.wait_for_selector("#folders .listing li >> text=trips")
        page.click("#folders [data-do=index-chosen]")
        page.wait_for_selector("#run .run.done")
        assert "2 added" in page.inner_text("#run p")
        page.wait_for_selector(".home .chips")
        # A file more: it is checked again, and both numbers follow.
        paint(home / "Pictures" / "c.png", "green")
        page.click("#tools [data-do=folders]")
        page.wait_for_selector("#folders .roots >> text=2 pictures")
        page.click("#folders [data-do=check-again]")
        page.wait_for_selector("#run .run.done >> text=1 added")
        page.wait_for_selector("#status .pictures >> text=3 pictures")
        assert page.inner_text(".home .pictures") == "3 pictures"
        # Dismissed here, it is gone in every other tab.
        other = visit(address)
        other.wait_for_selector("#run .run.done")
        page.click("#run [data-do=dismiss]")
        page.wait_for_selector("#run .run", state="detached")
        other.wait_for_selector("#run .run", state="detached")
        other.close()
        # Forgetting asks first.
        page.click("#tools [data-do=folders]")
        page.click("#folders [data-do=forget]")
        confirm = page.locator("#folders .confirm")
        assert "3 pictures leave the index; no file is touched" in confirm.inner_text()
        page.click("#folders [data-do=keep]")
        assert confirm.is_hidden()
        page.click("#folders [data-do=forget]")
        page.click("#folders [data-do=forget-now]")
        page.wait_for_selector("#folders .indexed >> text=No folder is indexed yet")
        page.wait_for_selector("#results [data-view=empty]", state="attached")
        page.wait_for_function("document.querySelector('#status .pictures').textContent[0] === '0'")
        page.close()  # before the server: one more tick may be on its way
