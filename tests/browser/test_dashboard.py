"""The dashboard in a real browser: clicks while a cell trains, for every kernel and front end."""

import json
import re
import time

import pytest
from nbconvert import HTMLExporter

import kernels

FRONTS = ("lab", "notebook")
# Comms over the main shell or a subshell, which ipykernel 6 has not; Notebook leaves no choice.
ROUTES = [
    (version, comms, front)
    for version in kernels.VERSIONS
    for comms, front in (
        ("disabled", "lab"),
        ("perCommTarget", "lab"),
        ("perCommTarget", "notebook"),
    )
    if version.startswith("7") or (comms == "disabled") == (front == "lab")
]
SLOW = 0.5  # seconds: a step, or a batch of a validation, in which the user clicks
WIDEST = "all => Math.max(0, ...all.map(e => e.getBoundingClientRect().width))"
GRACE = 2.0  # seconds that a click may take beyond the running step, on a busy machine too


def status(front, i):
    """Return the status line of widgets or record, or nothing where there is none yet."""
    found = front.output(i).get_by_text("●")
    return found.first.locator("xpath=ancestor::div[1]/..").inner_text() if found.count() else ""


def wait_state(front, i, *words, timeout=30):
    front.wait(
        lambda: any(f"● {word}" in status(front, i) for word in words), f"it says {words}", timeout
    )


def click(front, i, text):
    """Click a button of the i-th cell; return when."""
    button = front.output(i).get_by_role("button", name=text, exact=True)
    return button.evaluate("b => { const now = Date.now(); b.click(); return now / 1000 }")


def returned(front, i):
    """Wait for the end of the i-th cell's fit; return when that was, and the rest of the line."""

    found = []

    def find():
        found.append(re.search(r"returned ([\d.]+) (.+)", front.output(i).inner_text()))
        return found[-1]

    # A page shows output in pieces, so the line is waited for whole; and it may draw it once more.
    front.wait(find, f"the fit of cell {i} returned")
    return float(found[-1][1]), found[-1][2]


@pytest.fixture
def notebook(open_notebook):
    """A notebook with what the cells need, and these cells."""

    def notebook(front, *cells, setup=kernels.TRAINING, **settings):
        front = open_notebook(front, [setup, *cells], **settings)
        front.run_cell(0, wait=True)
        front.wait_output(0, "ready")
        return front

    return notebook


@pytest.mark.parametrize(("version", "comms", "front"), ROUTES)
def test_buttons(notebook, latencies, version, comms, front):
    """Every button, in a step and in a validation, with a cell queued behind."""
    own = (
        "import ipywidgets\nclicks = []\nmine = ipywidgets.Button(description='mine')\n"
        "mine.on_click(lambda _: clicks.append(1))\ndisplay(mine)"
    )
    cells = (
        f"train(train={SLOW})",
        "print('queued', len(trainer.history['train_loss']))",
        f"train(validate={SLOW})",
        "train()",
        own,
        "train()",
        "print('clicks', len(clicks))",
    )
    page = notebook(front, *cells, version=version, comms=comms)
    late = {}

    page.queue(1, 2)
    wait_state(page, 1, "running")
    time.sleep(2 * SLOW)
    clicked = click(page, 1, "Stop")
    end, rest = returned(page, 1)
    late["Stop in a step"] = end - clicked
    assert rest.startswith("Stop button steps ")
    wait_state(page, 1, "stopped: Stop button")
    page.wait_output(2, "queued")

    page.queue(3)
    wait_state(page, 3, "validating")
    clicked = click(page, 3, "Stop")
    end, _ = returned(page, 3)
    late["Stop in validation"] = end - clicked

    page.queue(4)
    wait_state(page, 4, "running", "validating")
    folder = page.server.root / "checkpoints"
    clicked = click(page, 4, "Checkpoint")

    def written():
        return [t for file in folder.glob("*.pt") if (t := file.stat().st_mtime) > clicked]

    page.wait(written, "there is a checkpoint", 5)
    late["Checkpoint"] = written()[0] - clicked
    page.wait(lambda: "saved checkpoints/" in status(page, 4), "it says so", 5)

    click(page, 4, "Pause")
    wait_state(page, 4, "paused")
    at = status(page, 4)
    time.sleep(0.5)
    assert status(page, 4) == at  # nothing moves
    click(page, 4, "Resume")
    wait_state(page, 4, "running", "validating")
    clicked = click(page, 4, "Stop")
    end, _ = returned(page, 4)
    late["Stop"] = end - clicked

    page.run_cell(5, wait=True)
    page.queue(6)
    wait_state(page, 6, "running", "validating")
    page.button("mine").evaluate("b => { for (let i = 0; i < 100; i++) b.click() }")
    click(page, 6, "Stop")
    returned(page, 6)
    page.run_cell(7, wait=True)
    page.wait_output(7, "clicks 100")

    route = "subshell" if comms == "perCommTarget" and version.startswith("7") else "main shell"
    latencies[version, route, front] = late
    for what, latency in late.items():
        step = SLOW if " in " in what else 0.02
        assert latency < step + GRACE, what
    assert front == "notebook" or not page.errors  # Notebook always has some of its own


@pytest.mark.parametrize("version", ["6.31.0", "7.4.0"])
@pytest.mark.parametrize("front", FRONTS)
def test_interrupt(notebook, front, version):
    """The kernel's own interrupt: no traceback, the history returns, and training can continue."""
    cells = ("history = trainer.fit()", "print(len(history['train_loss']) > 0)", "train()")
    page = notebook(front, *cells, version=version)
    page.queue(1)
    wait_state(page, 1, "running", "validating")
    page.wait(lambda: "epoch 1 of" not in status(page, 1), "an epoch is done")
    page.interrupt()
    wait_state(page, 1, "stopped: interrupted")
    page.wait_done(1)
    assert "Traceback" not in page.output(1).inner_text()
    page.run_cell(2, wait=True)
    page.wait_output(2, "True")
    page.queue(3)
    wait_state(page, 3, "running", "validating")
    click(page, 3, "Pause")
    wait_state(page, 3, "paused")
    page.interrupt()  # a paused run can be interrupted too
    assert returned(page, 3)[1].startswith("interrupted")


@pytest.mark.parametrize("front", FRONTS)
def test_the_charts_of_every_run_are_drawn(notebook, front):
    """Also those of a second run on the same page, while it runs."""
    page = notebook(front, "trainer.fit(3); print('returned 1 so')", "train()")
    page.queue(1)
    assert returned(page, 1)
    page.queue(2)
    wait_state(page, 2, "running", "validating")
    lines = page.output(2).locator(".js-plotly-plot .scatterlayer path.js-line")
    page.wait(lambda: lines.count() >= 5, "the curves are drawn")
    first = lines.nth(0).get_attribute("d")
    page.wait(lambda: lines.nth(0).get_attribute("d") != first, "they grow")
    click(page, 2, "Stop")
    assert returned(page, 2)


def test_a_tab_that_is_opened_again_in_a_later_run(notebook):
    """Closed after the second run began, and opened again: charts and buttons live."""
    page = notebook("lab", "trainer.fit(3); print('returned 1 so')", "train()")
    page.queue(1)
    assert returned(page, 1)
    page.queue(2)
    wait_state(page, 2, "running", "validating")
    page.save()
    page.page.goto("about:blank")
    page.open(idle=False)
    wait_state(page, 2, "running", "validating")
    lines = page.output(2).locator(".js-plotly-plot .scatterlayer path.js-line")
    page.wait(lambda: lines.count() >= 5, "the curves are drawn")
    first = lines.nth(0).get_attribute("d")
    page.wait(lambda: lines.nth(0).get_attribute("d") != first, "they grow")
    click(page, 2, "Stop")
    wait_state(page, 2, "stopped: Stop button")


@pytest.mark.parametrize("front", FRONTS)
def test_the_charts_are_as_wide_as_the_cell(notebook, front):
    """Live and in the record, in a window that becomes narrower and wider."""
    page = notebook(front, "train()")
    page.queue(1)
    wait_state(page, 1, "running", "validating")

    def fits(width):
        page.page.set_viewport_size({"width": width, "height": 900})
        cell = page.output(1).evaluate("e => e.getBoundingClientRect().width")
        charts = page.output(1).locator(".js-plotly-plot .main-svg, img")
        found = charts.evaluate_all(WIDEST)
        return found <= cell + 1 and found > 0.7 * min(cell, 1400)

    for width in (1280, 700, 1280):
        page.wait(lambda width=width: fits(width), f"live charts fit into {width} pixels")
    click(page, 1, "Stop")
    assert returned(page, 1)
    for width in (1280, 700, 1280):
        page.wait(lambda width=width: fits(width), f"the record fits into {width} pixels")


@pytest.mark.parametrize("version", ["6.31.0", "7.4.0"])
@pytest.mark.parametrize("front", FRONTS)
def test_reload(notebook, front, version, tmp_path):
    """A page that is loaded again during training gets charts and buttons back, and the end."""
    page = notebook(front, "train()", version=version)
    page.queue(1)
    wait_state(page, 1, "running", "validating")
    page.wait(lambda: "epoch 1 of" not in status(page, 1), "an epoch is done")
    page.save()
    page.reload(idle=False)
    wait_state(page, 1, "running", "validating")
    lines = page.output(1).locator(".js-plotly-plot .scatterlayer path.js-line")
    page.wait(lambda: lines.count() >= 5, "the curves are drawn")
    at = status(page, 1)
    page.wait(lambda: status(page, 1) != at, "it is alive")
    click(page, 1, "Stop")
    wait_state(page, 1, "stopped: Stop button")
    page.wait(lambda: lines.count() >= 5, "the curves stay")


@pytest.mark.parametrize("front", FRONTS)
def test_the_record_stays(notebook, front):
    """Without a kernel the notebook shows charts and table, in another cell too, and is small."""
    cells = ("trainer = make_trainer(epochs=5); h = trainer.fit()", "trainer.dashboard")
    page = notebook(front, *cells)
    page.run_cell(1, wait=True)
    wait_state(page, 1, "done")
    page.run_cell(2, wait=True)
    wait_state(page, 2, "done")
    page.save()
    assert page.file.stat().st_size < 300_000
    page.shutdown_kernel()
    page.open(kernel=False)
    for i in (1, 2):
        page.cell(i).scroll_into_view_if_needed()
        page.wait_output(i, "History of 5 epochs")
        # Plotly's renderer shows a picture of the charts until the pointer is over them.
        charts = page.output(i).locator("img, .js-plotly-plot")
        page.wait(lambda c=charts: c.evaluate_all(WIDEST) > 500, "there are charts")
    html, _ = HTMLExporter().from_filename(str(page.file))
    page.page.set_content(html)
    picture = page.page.locator("img[alt='loss and scores by epoch']").first
    page.wait(lambda: picture.evaluate("i => i.complete && i.naturalWidth > 500"), "a picture")
    assert "History of 5 epochs" in html and "Loading widget" not in page.page.inner_text("body")


@pytest.mark.parametrize("front", FRONTS)
def test_an_error_in_the_run(notebook, front):
    """The error is shown as always, and the dashboard says that and why the run failed."""
    bad = "class Bad(Callback):\n    def on_epoch_end(self, *_): raise ValueError('no disk')\n"
    page = notebook(front, f"{bad}make_trainer(Bad()).fit()", "print('alive')")
    page.queue(1)
    wait_state(page, 1, "failed: ValueError: no disk")
    page.wait_output(1, "Traceback")
    page.run_cell(2, wait=True)
    page.wait_output(2, "alive")


def test_a_closed_tab(notebook, server):
    """The page is gone: training ends as if nothing had happened."""
    page = notebook("lab", "make_trainer(epochs=20).fit(); open('ended', 'w').write('yes')")
    page.queue(1)
    wait_state(page, 1, "running", "validating")
    page.page.goto("about:blank")
    ended = page.file.parent / "ended"
    page.wait(ended.exists, "the run ends")


def test_a_notebook_saved_in_mid_run(notebook):
    """Saved in mid-run, the notebook holds the widget's name and says what it is without it."""
    page = notebook("lab", "train()")
    page.queue(1)
    wait_state(page, 1, "running", "validating")
    page.save()
    text = json.dumps(page.read()["cells"][1]["outputs"])
    assert "widget-view+json" in text and "running" in text
    click(page, 1, "Stop")
    returned(page, 1)
