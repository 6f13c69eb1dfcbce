"""The model is taught in a real Chromium, the whole way and back."""

# ruff: noqa: F811
from __future__ import annotations

from typing import Any

import pytest
from chromium import Open, browser, context, pytestmark, served, visit  # noqa: F401
from test_teaching import ended, open_workspace  # noqa: F401


@pytest.mark.end_to_end
def test_the_model_is_taught_on_the_page(open_workspace: Any, visit: Open) -> None:
    """From the button to the switch and back, with the answer that a person gives where it is asked."""
    workspace = open_workspace(60)
    first = workspace.model.encoder_id
    other = f"document.querySelector('#status [data-encoder]').dataset.encoder !== '{first}'"
    with served(workspace) as address:
        page = visit(address)
        page.click("#status .model")
        page.wait_for_selector("#models .teach[data-stage=idle] >> text=60 pictures with captions")
        page.click("#models [data-what=start]")
        page.wait_for_selector("#models .stages [aria-current=step]")
        page.wait_for_selector("#status .teaching")
        ended(workspace)  # longer than a page waits where the machine is busy
        page.wait_for_selector("#models .teach:is([data-stage=choosing], [data-stage=done])")
        page.wait_for_selector("#models .verdict")
        if page.locator("#models [data-what=use]").count():
            page.click("#models [data-what=use]")
            ended(workspace)
        page.wait_for_selector("#models .teach[data-stage=done]")
        page.wait_for_function(other)
        page.click("#models [data-what=undo]")
        page.wait_for_selector("#models .teach[data-stage=idle]")
        page.wait_for_selector(f"#status [data-encoder='{first}']")
        page.close()
