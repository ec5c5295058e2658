"""Drive a notebook in JupyterLab or Notebook as a person would."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import kernels
from playwright.sync_api import Locator, Page, Response, Route, expect

from browser.server import WAIT, Server, wait_until

PATIENCE = 7.0  # seconds without an answer until a person would do something


class FrontEnd:
    """A notebook file with these cells and, once open, its page."""

    def __init__(
        self,
        server: Server,
        page: Page,
        front: str,
        name: str,
        cells: list[str],
        *,
        version: str = kernels.VERSIONS[-1],
        comms: str = "perCommTarget",
        theme: str = "light",
    ):
        self.server, self.page, self.front, self.name = server, page, front, name
        self.version, self.comms = version, comms
        self.file = server.root / f"{name}.ipynb"
        server.set("kernels-settings", commsOverSubshells=comms)
        server.set("themes", theme=f"JupyterLab {theme.capitalize()}")
        self.write(cells)
        self.errors: list[str] = []  # exceptions that no script on the page caught
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.saves = 0
        page.on("response", self._count_saves)
        page.on("dialog", lambda dialog: dialog.accept())  # "leave the page?"

    def write(self, cells: list[str]) -> None:
        """Write the notebook."""
        code = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
        spec = {"name": f"ipykernel-{self.version}", "display_name": "", "language": "python"}
        notebook = {
            "cells": [code | {"id": f"c{i}", "source": cell} for i, cell in enumerate(cells)],
            "metadata": {"kernelspec": spec},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        self.file.write_text(json.dumps(notebook), encoding="utf-8")

    def read(self) -> dict:
        """Return the notebook as it is on disk."""
        return json.loads(self.file.read_text(encoding="utf-8"))

    def open(self, *, kernel: bool = True, idle: bool = True) -> None:
        """Open the notebook, or open it without a kernel, as if its kernel were not installed.

        The kernel, if there is one, is `idle` unless a cell still runs.
        """
        self.page.unroute_all()
        if not kernel:
            self.page.route("**/api/kernelspecs*", self._hide_kernel)
        # Its own workspace: the default one reopens the notebooks of earlier tests.
        part = f"lab/workspaces/{self.name}/tree" if self.front == "lab" else "notebooks"
        self.page.goto(f"{self.server.url}/{part}/{quote(self.file.name)}")
        self._wait_open(kernel, idle)

    def reload(self, *, idle: bool = True) -> None:
        """Load the page again; the kernel goes on, and is `idle` unless a cell still runs."""
        self.page.reload()
        self._wait_open(True, idle)

    def _wait_open(self, kernel: bool, idle: bool = True) -> None:
        cells = len(self.read()["cells"])
        expect(self.page.locator(".jp-Notebook .jp-Cell")).to_have_count(cells, timeout=WAIT * 1000)
        if kernel:
            self.wait_idle() if idle else self.wait(self._connected, "the kernel is connected")
            taken = f"{self.front} took the comms setting {self.comms} (Notebook takes none)"
            self.wait(lambda: self.kernel("k.commsOverSubshells") == self.comms, taken, 5)
        else:  # asked which kernel to take instead
            self.page.locator(".jp-Dialog").get_by_role("button", name="No Kernel").click()

    def _hide_kernel(self, route: Route) -> None:
        answer = route.fetch()
        specs = answer.json()
        del specs["kernelspecs"][f"ipykernel-{self.version}"]
        route.fulfill(response=answer, json=specs)

    def _count_saves(self, answer: Response) -> None:
        # The file's time says too little: the server empties the file and then writes it.
        if answer.request.method == "PUT" and "/api/contents/" in answer.url and answer.ok:
            self.saves += 1

    def wait(self, true: Callable[[], object], what: str, timeout: float = WAIT) -> None:
        """Wait until `true` is, while the page's events are heard.

        Kernels 7.0 to 7.3 can overlook a message that arrives while they send a reply, until
        another client connects; one more message on the same connection does not help (ipykernel
        issue 1554). A person would load the page again, so after a while another client connects.
        """
        next_try = time.monotonic() + PATIENCE

        def is_true() -> object:
            nonlocal next_try
            if self.version in kernels.FORGETFUL and time.monotonic() > next_try:
                print(f"still waiting: {what}; so another client connects to the kernel")
                self.connect_another()
                next_try += PATIENCE
            return true()

        wait_until(is_true, what, timeout, lambda time: self.page.wait_for_timeout(time * 1000))

    def connect_another(self) -> None:
        """Connect to the kernel a second time for three seconds, as another tab would."""
        self.kernel("k && (other => setTimeout(() => other.dispose(), 3000))(k.clone())")

    def kernel(self, expression: str = "k.status") -> object:
        """Evaluate JavaScript on the page's connection to its kernel, `k`."""
        session = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session"
        return self.page.evaluate(
            f"(() => {{ const k = {session}?.kernel; return {expression} }})()"
        )

    def _connected(self) -> bool:
        return self.kernel("k?.connectionStatus === 'connected'")

    def wait_idle(self, timeout: float = WAIT) -> None:
        """Wait until the kernel is connected and has nothing to do."""
        idle = "k?.status === 'idle'"
        self.wait(lambda: self._connected() and self.kernel(idle), "the kernel is idle", timeout)

    def cell(self, i: int) -> Locator:
        """Locate the i-th code cell."""
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(i)

    def prompt(self, i: int) -> str:
        """Return `[ ]:`, `[*]:` while queued or running, or `[7]:` once run."""
        return self.cell(i).locator(".jp-InputPrompt").inner_text().strip()

    def run_cell(self, i: int, *, wait: bool = False) -> None:
        """Run the i-th code cell, after those that run or wait already."""
        before = self.prompt(i)
        self.cell(i).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Shift+Enter")
        self.wait(lambda: self.prompt(i) != before, f"cell {i} is sent")
        if wait:
            self.wait_done(i)

    def queue(self, *cells: int) -> None:
        """Run the cells one after the other, without waiting for any to end."""
        for i in cells:
            self.run_cell(i)

    def wait_done(self, i: int, timeout: float = WAIT) -> None:
        """Wait until the i-th code cell has run."""
        done = re.compile(r"\[\d+\]:")
        self.wait(lambda: done.fullmatch(self.prompt(i)), f"cell {i} is done", timeout)

    def output(self, i: int) -> Locator:
        """Locate the outputs of the i-th code cell, without its source."""
        return self.cell(i).locator(".jp-Cell-outputArea")

    def wait_output(self, i: int, text: str | re.Pattern, timeout: float = WAIT) -> None:
        """Wait until the outputs of the i-th code cell contain the text."""
        expect(self.output(i)).to_contain_text(text, timeout=timeout * 1000)

    def button(self, text: str) -> Locator:
        """Locate the button with exactly this text, in the outputs of any cell."""
        exact = re.compile(rf"^\s*{re.escape(text)}\s*$")
        return self.page.locator(".jp-Cell-outputArea button").filter(has_text=exact)

    def click(self, text: str, timeout: float = WAIT) -> None:
        """Click that button, which must be the only one, as late as a person would.

        Until the kernel has made the subshell for a new widget, which takes a tenth of a second,
        a click goes to the main shell and waits there for the running cell.
        """
        self.button(text).wait_for(timeout=timeout * 1000)
        if self.comms != "disabled":
            made = "!k.supportsSubshells || [...k._comms.values()].every(c => c.subshellId)"
            self.wait(lambda: self.kernel(made), "every widget has a subshell", timeout)
        self.button(text).click(timeout=timeout * 1000)

    def interrupt(self) -> None:
        """Press the toolbar's stop button."""
        self.page.locator('.jp-NotebookPanel-toolbar [data-jp-item-name="interrupt"]').click()

    def save(self) -> None:
        """Press Ctrl+S and wait until the file is written."""
        before = self.saves
        overwrite = self.page.locator(".jp-Dialog").get_by_role("button", name="Overwrite")
        self.cell(0).locator(".jp-InputPrompt").click()
        self.page.keyboard.press("Control+s")

        def saved() -> bool:
            if overwrite.is_visible():  # asked because the file changed on disk
                overwrite.click()
            return self.saves > before

        self.wait(saved, "the notebook is saved")

    def shutdown_kernel(self) -> None:
        """End the kernel behind the front end's back."""
        for session in self.server.rest("sessions"):
            if session["path"] == self.file.name:
                self.server.rest(f"sessions/{session['id']}", "DELETE")

    def screenshot(self, path: Path) -> None:
        """Save what the page shows now."""
        self.page.screenshot(path=path)

    def close(self) -> None:
        """Close the page and end the kernel."""
        self.page.context.close()
        self.shutdown_kernel()
