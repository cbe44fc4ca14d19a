"""Chromium, started once and only where it is installed; where ENTROPY_PROBE_REQUIRE_BROWSER is set, it must be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = "ENTROPY_PROBE_REQUIRE_BROWSER"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.browser)
    if CHROMIUM is None and ours and not os.environ.get(REQUIRED):
        # one of them stands for all, so that one line says so
        reason = f"{len(ours)} browser tests are left out: no Chromium on this machine (apt-get install chromium)"
        ours[0].add_marker(pytest.mark.skip(reason=reason))
        items[:] = [item for item in items if item not in ours[1:]]
        config.hook.pytest_deselected(items=ours[1:])


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.fail(f"{REQUIRED} is set, but there is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a file in a fresh context; any console message, page error or network request fails the test."""
    complaints: list[str] = []
    with ExitStack() as stack:

        def opened(path: Path, *, width: int = 1100, height: int = 800, **context: Any) -> Any:
            made = chromium.new_context(viewport={"width": width, "height": height}, **context)
            stack.callback(made.close)
            page = made.new_page()
            page.set_default_timeout(10_000)
            page.on("console", lambda message: complaints.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
            page.on("dialog", lambda dialog: (complaints.append("dialog"), dialog.dismiss()))
            page.on("request", lambda request: _request(request.url, path, complaints))
            page.goto(path.as_uri())
            return page

        yield opened
    assert complaints == []


def _request(url: str, path: Path, complaints: list[str]) -> None:
    if not url.startswith((path.as_uri(), "data:")):
        complaints.append(f"request: {url}")
