"""Each version of ipykernel starts, runs code and receives a click."""

import time

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

import kernels

BUTTON = """
import ipykernel, ipywidgets
button, clicks = ipywidgets.Button(), []
button.on_click(clicks.append)
print(ipykernel.__version__, button.model_id)
"""


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jupyter")
    kernels.kernelspecs(folder)
    return KernelSpecManager(kernel_dirs=[str(folder / "kernels")])


@pytest.fixture(params=kernels.VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def client(version, specs):
    manager = KernelManager(kernel_name=f"ipykernel-{version}", kernel_spec_manager=specs)
    manager.start_kernel()
    client = manager.client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=60)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def printed(client, code):
    """Run the code and return what it printed."""
    text = []

    def hook(message):
        assert message["msg_type"] != "error", message["content"]
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            text.append(message["content"]["text"])

    client.execute_interactive(code, timeout=30, output_hook=hook)
    return "".join(text).strip()


def test_a_kernel_runs_its_ipykernel_and_hears_a_click(client, version):
    found, model = printed(client, BUTTON).split()
    assert found == version

    data = {"method": "custom", "content": {"event": "click"}}
    click = client.session.msg("comm_msg", {"comm_id": model, "data": data})
    client.shell_channel.send(click)
    end = time.monotonic() + 10
    while (clicks := printed(client, "print(len(clicks))")) != "1" and time.monotonic() < end:
        time.sleep(0.05)
    assert clicks == "1"


def test_an_overlay_that_pip_cannot_make_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "cache", lambda: tmp_path)
    with pytest.raises(RuntimeError, match=r"ipykernel 0\.0\.0\.dev9"):
        kernels.overlay("0.0.0.dev9")
    assert list(tmp_path.iterdir()) == []
