"""Saved reports: listed, and shown without being trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from colours import ColourModel
from starlette.testclient import TestClient

from app.paths import reports_folder
from app.web.api import create_app
from app.web.saved_reports import SavedReports
from app.web.workspace import Workspace


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    workspace = Workspace(tmp_path / "index", ColourModel())  # type: ignore[arg-type]
    app = create_app(workspace, reports=SavedReports(tmp_path / "reports"))
    yield TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False)
    workspace.close()


def put_report(folder: Path, name: str, *, made: str = "", **fields: Any) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    report = {"title": f"About {name}", "model": "builtin", "created_at": made, **fields}
    (place / "report.json").write_text(json.dumps(report))
    (place / "report.html").write_text(f"<script>alert(1)</script>{name}")
    return place


def test_reports_are_listed_newest_first(tmp_path: Path) -> None:
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
    rows = SavedReports(folder).rows()
    assert [row.name for row in rows] == ["new", "compared", "old"]
    assert rows[1].models == ("a", "b")


def test_reports_of_training_runs_are_listed_and_shown_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of runs/ where the server was started; a run and an evaluation may have the same name; no name
    leads from one folder to the other, or out of both."""
    put_report(tmp_path / "reports", "mine", made="2026-01-01T00:00:00+00:00")
    put_report(tmp_path / "start" / "runs", "mine", made="2026-01-02T00:00:00+00:00", title="Run")
    secret = put_report(tmp_path, "secret")
    (tmp_path / "start" / "runs" / "link").symlink_to(secret)
    monkeypatch.chdir(tmp_path / "start")
    reports = SavedReports(tmp_path / "reports")
    monkeypatch.chdir(tmp_path)  # the place is that of the start
    (tmp_path / "start" / "runs" / "mine" / "report.html").write_text("the run")
    assert [(row.name, row.title) for row in reports.rows()] == [
        ("run@mine", "Run"), ("mine", "About mine")
    ]  # fmt: skip
    workspace = Workspace(tmp_path / "index", ColourModel())  # type: ignore[arg-type]
    app = create_app(workspace, reports=reports)
    client = TestClient(app, base_url="http://127.0.0.1:7860", raise_server_exceptions=False)
    answer = client.get("/reports/run@mine")
    assert answer.status_code == 200 and answer.text == "the run"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for name in (
        "run@link",
        "run@..",
        "run@",
        "run@run@mine",
        "mine@run",
        "run@nobody",
        "run@%2e%2e",
    ):
        assert client.get(f"/reports/{name}").status_code == 404, name
    workspace.close()


def test_reports_of_taught_models_are_shown_by_their_own_names(tmp_path: Path) -> None:
    """Of the index's own models; `name_of` names what the route serves, and nothing else."""
    taught = tmp_path / "index" / "models"
    place = put_report(taught, "taught-1")
    (taught / "no-report").mkdir()
    secret = put_report(tmp_path, "secret")
    (taught / "link").symlink_to(secret)
    workspace = Workspace(tmp_path / "index", ColourModel())  # type: ignore[arg-type]
    client = TestClient(create_app(workspace), base_url="http://127.0.0.1")
    reports = SavedReports(tmp_path / "reports", tmp_path / "runs", taught)
    assert [row.name for row in reports.rows()] == ["taught@taught-1"]
    assert reports.name_of(str(place)) == "taught@taught-1"
    assert client.get("/reports/taught@taught-1").text.endswith("taught-1")
    for spec in ("builtin", str(secret), str(taught / "no-report"), str(taught / "link"), ""):
        assert reports.name_of(spec) == "", spec
    for name in ("link", "no-report", "..", "%2e%2e", "taught-1%2freport.json", "run@taught-1", ""):
        assert client.get(f"/reports/taught@{name}").status_code == 404, name
    assert client.get("/reports/run@taught-1").status_code == 404
    assert SavedReports(tmp_path / "reports").name_of(str(place)) == ""
    workspace.close()


def test_there_may_be_no_reports_yet(tmp_path: Path) -> None:
    assert SavedReports(tmp_path / "reports").rows() == []


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


def test_links_out_of_the_folder_are_not_listed(tmp_path: Path) -> None:
    secret = put_report(tmp_path, "secret")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "link").symlink_to(secret)
    assert SavedReports(tmp_path / "reports").rows() == []
