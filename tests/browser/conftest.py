"""A browser on a Jupyter server. Without a browser the tests skip, or fail if it is required."""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def chromium() -> str | None:
    """Return the path of the browser."""
    names = (os.environ.get("CHROMIUM", ""), "/usr/bin/chromium", "chromium", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def missing() -> str:
    """Return the tools that these tests need and that are missing; empty if none is."""
    lacks = [n for n in ("playwright", "notebook", "jupyterlab") if not importlib.util.find_spec(n)]
    if not chromium():
        lacks.append("Chromium (looked for $CHROMIUM, chromium and google-chrome)")
    return ", ".join(lacks)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("browser")


FAILED = pytest.StashKey[bool]()
LATENCIES = pytest.StashKey[dict]()


@pytest.fixture
def latencies(request) -> dict[tuple[str, ...], dict[str, float]]:
    """Seconds from each click to its effect, by kernel, route and front end; printed at the end."""
    return request.config.stash.setdefault(LATENCIES, {})


def pytest_terminal_summary(terminalreporter):
    rows = terminalreporter.config.stash.get(LATENCIES, {})
    if not rows:
        return
    what = list(next(iter(rows.values())))
    lines = [["ipykernel", "route", "front end", *what], ["---"] * (3 + len(what))]
    lines += [[*key, *(f"{row[name] * 1000:.0f}" for name in what)] for key, row in rows.items()]
    terminalreporter.write_line("\nMilliseconds from a click to its effect:")
    for line in lines:
        terminalreporter.write_line(f"| {' | '.join(line)} |")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


# The scope is the package: Playwright's event loop must not run on during other tests.
@pytest.fixture(scope="package")
def server(tmp_path_factory) -> Iterator[Any]:
    """One Jupyter server for all tests here."""
    if lacks := missing():
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip)(
            f"not installed: {lacks}"
        )
    from browser.server import Server

    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="package")
def browser(server) -> Iterator[Any]:
    """One Chromium for all tests here."""
    from playwright.sync_api import sync_playwright

    flags = (
        "no-sandbox headless=new disable-gpu disable-background-networking disable-quic "
        "no-first-run disable-component-update disable-sync"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=[f"--{flag}" for flag in flags.split()]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_notebook(server, browser, request, tmp_path) -> Iterator[Callable[..., Any]]:
    """Open a notebook: `open_notebook("lab", cells, version=..., comms=..., theme=...)`.

    Each is in a fresh browser context and closed after the test; a failed test leaves pictures.
    """
    from browser.pages import FrontEnd

    fronts = []

    def open_notebook(front, cells, *, viewport=(1400, 1000), **settings):
        size = {"width": viewport[0], "height": viewport[1]}
        page = browser.new_context(viewport=size).new_page()
        name = re.sub(r"\W+", "-", f"{request.node.nodeid}-{len(fronts)}")
        fronts.append(FrontEnd(server, page, front, name, cells, **settings))
        fronts[-1].open()
        return fronts[-1]

    yield open_notebook
    for i, front in enumerate(fronts):
        try:
            if request.node.stash.get(FAILED, False):
                picture = tmp_path / f"{i}.png"
                front.screenshot(picture)
                print(f"picture: {picture}\nerrors on the page: {front.errors}")
        finally:
            front.close()
