"""A Jupyter server for the tests, which serves both JupyterLab and Notebook."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import kernels

WAIT = 30.0  # seconds; a busy machine needs several to load the page and start a kernel


def wait_until(
    true: Callable[[], object],
    what: str,
    timeout: float = WAIT,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Call `true` until it returns something true, or fail."""
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, f"not within {timeout:g} s: {what}"
        sleep(0.1)


class Server:
    """One Jupyter server for both front ends, with nothing read from the user's own settings."""

    def __init__(self, folder: Path):
        self.root, self.settings, self.log = (folder / n for n in ("root", "settings", "log.txt"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        kernels.kernelspecs(folder / "data")
        config = {
            "ServerApp": {
                "ip": "127.0.0.1",
                "port": port,
                "port_retries": 0,
                "open_browser": False,
                "root_dir": str(self.root),
                "allow_root": True,
                "disable_check_xsrf": True,  # for `rest`
                "jpserver_extensions": {"jupyterlab": True, "notebook": True},
            },
            "IdentityProvider": {"token": ""},
            "LabApp": {"expose_app_in_browser": True, "news_url": None},
            "JupyterNotebookApp": {"expose_app_in_browser": True},
        }
        environment = os.environ | {
            "JUPYTERLAB_SETTINGS_DIR": str(self.settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "JUPYTER_PATH": str(folder / "data"),
        }
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
            environment[name] = str(folder / name.lower())
        for made in (self.root, folder / "jupyter_config_dir"):
            made.mkdir()
        file = folder / "jupyter_config_dir" / "jupyter_server_config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        self.set("notification", fetchNews="false", checkForUpdates=False)
        # Should the tests be killed, Linux ends the server too.
        prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab"],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C is for the tests, which then end the server
                preexec_fn=prctl and (lambda: prctl(1, signal.SIGTERM)),
            )

    def set(self, plugin: str, **values: object) -> None:
        """Write settings of JupyterLab; pages loaded from now on have them."""
        file = (
            self.settings / "@jupyterlab" / "apputils-extension" / f"{plugin}.jupyterlab-settings"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")

    def rest(self, path: str, method: str = "GET") -> list | dict | None:
        """Ask the server's REST API."""
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method)
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            return json.loads(answer.read() or b"null")

    def wait(self) -> None:
        """Wait until the server answers."""

        def answers() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            try:
                self.rest("status")
            except OSError:
                return False
            return True

        wait_until(answers, "the server answers", 60)

    def stop(self) -> None:
        """Stop the server and its kernels, which also stop by themselves if they lose it."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
