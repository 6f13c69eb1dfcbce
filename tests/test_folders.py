"""The folders panel: what of this machine's folders a page may see, and what it does with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from colours import ColourModel, paint
from starlette.testclient import TestClient

from app.web import folders, indexing
from app.web.api import create_app
from app.web.folders import browsable, key_of, listing
from app.web.workspace import Workspace
from clipkit.catalog import Catalog, Filters
from clipkit.errors import CatalogBusy, InputError

HOST = "http://127.0.0.1:7860"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, with nothing else to browse."""
    home = tmp_path / "home"
    paint(home / "Pictures" / "trips" / "a.png", "red")
    paint(home / "Pictures" / "b.png", "blue")
    (home / ".ssh" / "keys").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(folders, "MEDIA", ())
    return home


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    made = Workspace(tmp_path / "index", ColourModel())  # type: ignore[arg-type]
    yield made
    made.close()


def indexed(workspace: Workspace, *paths: Path) -> None:
    workspace.index([str(path) for path in paths])
    workspace._indexer._thread.join()
    assert workspace.run is not None and workspace.run.state == "done", workspace.run


# ---- listing


def test_only_folders_are_listed_by_name_without_hidden_ones(home: Path) -> None:
    tops = browsable([])
    start = listing("", tops)
    assert start.folders == ((key_of(str(home)), str(home)),) and start.path is None
    inside = listing(key_of(str(home)), tops)
    assert inside.folders == ((key_of(str(home / "Pictures")), "Pictures"),)
    assert inside.parent == ""
    pictures = listing(inside.folders[0][0], tops)
    assert [name for _, name in pictures.folders] == ["trips"]
    assert pictures.pictures == 1 and pictures.parent == key_of(str(home))


def test_nothing_outside_or_hidden_is_listed(home: Path, tmp_path: Path) -> None:
    tops = browsable([])
    for path in (tmp_path, Path("/"), Path("/etc"), home / "Pictures" / ".." / ".."):
        with pytest.raises(InputError, match=r"is not below .*; type its full path instead"):
            listing(key_of(str(path)), tops)
    for path in (home / ".ssh", home / ".ssh" / "keys"):
        with pytest.raises(InputError, match="type its full path"):
            listing(key_of(str(path)), tops)
    for key in ("zz", "2", key_of("Pictures"), key_of("/a\0b"), "é"):
        with pytest.raises(InputError, match="names no folder"):
            listing(key, tops)
    with pytest.raises(InputError, match=r"cannot list the folder .*: No such file or directory"):
        listing(key_of(str(home / "gone")), tops)
    with pytest.raises(InputError, match=r"cannot list the folder .*: Not a directory"):
        listing(key_of(str(home / "Pictures" / "b.png")), tops)


def test_a_link_leads_out_of_no_top(home: Path, tmp_path: Path) -> None:
    """One that stays inside is shown as what it leads to."""
    (tmp_path / "secret").mkdir()
    (home / "out").symlink_to(tmp_path / "secret")
    (home / "hidden").symlink_to(home / ".ssh")
    (home / "loop").symlink_to(home / "loop")
    (home / "short").symlink_to(home / "Pictures" / "trips")
    tops = browsable([])
    assert listing(key_of(str(home)), tops).folders == (
        (key_of(str(home / "Pictures")), "Pictures"),
        (key_of(str(home / "Pictures" / "trips")), "short"),
    )
    for name in ("out", "hidden", "loop"):
        with pytest.raises(InputError):
            listing(key_of(str(home / name)), tops)


def test_what_lies_beside_an_indexed_folder_may_be_listed_but_never_everything(
    home: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk" / "photos").mkdir(parents=True)
    assert browsable([str(tmp_path / "disk" / "photos")]) == [tmp_path / "disk", home]
    # /tmp lies in /: it is a top itself. What is not there is none.
    assert browsable(["/tmp", "/"]) == sorted({home, Path("/tmp").resolve()})
    assert browsable(["/no/such/photos"]) == [home]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any folder")
def test_a_folder_that_may_not_be_read_is_a_sentence(home: Path) -> None:
    (home / "locked").mkdir(mode=0)
    with pytest.raises(InputError, match=r"cannot list the folder .*locked: Permission denied"):
        listing(key_of(str(home / "locked")), browsable([]))


def test_a_name_that_is_not_utf8_can_be_chosen(home: Path, workspace: Workspace) -> None:
    odd = os.fsdecode(os.fsencode(home / "Pictures") + b"/caf\xe9")
    try:
        paint(Path(odd) / "c.png", "green")
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    keys = [key for key, _ in listing(key_of(str(home / "Pictures")), browsable([])).folders]
    assert key_of(odd) in keys
    assert workspace.browse(key_of(odd)).pictures == 1


def test_a_long_list_ends(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "LISTED", 2)
    for number in range(5):
        (home / f"z{number}").mkdir()
    one = listing(key_of(str(home)), browsable([]))
    assert [name for _, name in one.folders] == ["Pictures", "z0"] and one.left_out == 4


# ---- over HTTP


def test_folders_are_listed_and_forgotten_for_this_machines_own_page_only(
    home: Path, workspace: Workspace, tmp_path: Path
) -> None:
    indexed(workspace, home / "Pictures")
    client = TestClient(create_app(workspace), base_url=HOST)
    assert str(home / "Pictures") in client.get("/folders").text
    key = key_of(str(home / "Pictures"))
    assert "trips" in client.post("/folders/browse", content=key).text
    for path in ("/folders/browse", "/folders/forget"):
        elsewhere = {"origin": "https://evil.example"}
        assert client.post(path, content=key, headers=elsewhere).status_code == 403
        assert client.get(path).status_code == 405
        refused = client.post(path, content=key_of(str(tmp_path)))
        assert refused.status_code == 400 and len(refused.json()["error"]) > 20
        assert client.post(path, content="0" * 30_000).status_code == 413
    assert workspace.contents().pictures == 2
    workspace.may_index = False  # other machines can reach the page
    for path in ("/folders/browse", "/folders/forget"):
        refused = client.post(path, content=key)
        assert refused.status_code == 403
        assert "this page may not index folders" in refused.json()["error"]
    assert "<button" not in client.get("/folders").text


def test_forgetting_is_what_the_command_does(home: Path, workspace: Workspace) -> None:
    """Both places of the folder leave, with all that is kept of its pictures; the files stay; the
    message of the run that added it goes."""
    indexed(workspace, home / "Pictures")
    (root,) = workspace.roots()
    assert (root.pictures, root.skipped, root.missing) == (2, 0, False)
    with Catalog.open(workspace.folder) as catalog:
        ids = [row.image_id for row in catalog.rows(catalog.matching(Filters()).nums).values()]
        assert all(catalog.thumbnail(image_id) for image_id in ids) and len(ids) == 2
    with Catalog.open(workspace.folder, write=True), pytest.raises(CatalogBusy):
        workspace.forget(root.key)
    assert workspace.forget(root.key) == 2
    assert workspace.roots() == [] and workspace.contents().pictures == 0
    with Catalog.open(workspace.folder) as catalog:
        assert not any(catalog.thumbnail(image_id) for image_id in ids)
    assert (home / "Pictures" / "b.png").exists()
    assert workspace.run is None
    with pytest.raises(InputError, match="not an indexed folder"):
        workspace.forget(root.key)


# ---- the message of a run that is over


def test_the_message_of_a_run_goes_by_itself(
    home: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to read after a minute, else after ten."""
    now = 0.0
    monkeypatch.setattr(indexing.time, "monotonic", lambda: now)
    indexed(workspace, home / "Pictures")
    now += indexing.SEEN_SECONDS + 1
    assert workspace.run is None
    (home / "Pictures" / "bad.png").write_bytes(b"no picture")
    indexed(workspace, home / "Pictures")
    now += indexing.SEEN_SECONDS + 1
    assert workspace.run is not None and workspace.run.to_read
    now += indexing.READ_SECONDS
    assert workspace.run is None


def test_a_run_is_dismissed_once_it_is_over(home: Path, workspace: Workspace) -> None:
    indexed(workspace, home / "Pictures")
    workspace.dismiss()
    assert workspace.run is None
