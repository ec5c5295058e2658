"""Fixtures of all tests; what else they share is in `small.py`."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Begin with what is slow, so that at the end no process works alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def device_decides():
    """Let fused optimizers decide on the device, although that is a CPU, where the host would."""

    def decides(optimizer):
        return all(group.get("fused") for group in optimizer.param_groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ununennium.training.step.decides_on_device", decides)
        yield


class Page:
    """Keeps what is displayed; widgets work without a kernel."""

    def __init__(self):
        self.shown = []

    def display(self, forms, raw):
        self.shown.append(forms)

    update = display


@pytest.fixture
def shown(monkeypatch):
    """Let dashboards believe that a page shows them; return what they show."""
    pytest.importorskip("anywidget")
    pytest.importorskip("plotly")
    from ununennium.training import dashboard, progress

    page = Page()
    for module in (dashboard, progress):
        monkeypatch.setattr(module, "running_kernel", lambda: "a kernel")
        monkeypatch.setattr(module, "has_front_end", lambda: True)
    monkeypatch.setattr("IPython.display.DisplayHandle", lambda: page)
    monkeypatch.setattr("IPython.display.display", page.display)
    return page.shown
