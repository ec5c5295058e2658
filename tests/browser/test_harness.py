"""The harness itself, with plain widgets: what it reports about a page is true."""

import os

import pytest

# Both with ALL_FRONTS=1. The tests of the dashboard run in both anyway, by the same harness.
FRONTS = ["lab", "notebook"] if os.environ.get("ALL_FRONTS") else ["notebook"]
PRINT_VERSION = "import ipykernel; print('version', ipykernel.__version__)"
BUTTON = """
import ipywidgets
clicks = []
def clicked(button):
    clicks.append(1)
    button.description = "clicked"
button = ipywidgets.Button(description="Stop", icon="stop")
button.on_click(clicked)
display(button)
"""
LISTEN = """
import threading, time, ipywidgets
heard = []
button = ipywidgets.Button(description="Ask")
button.on_click(lambda _: heard.append(threading.current_thread().name))
display(button)
end = time.monotonic() + SECONDS
while not heard and time.monotonic() < end:
    time.sleep(0.05)
print("during", heard)
"""


@pytest.mark.parametrize("front", FRONTS)
def test_a_click_reaches_the_kernel_and_its_effect_the_page(open_notebook, front):
    notebook = open_notebook(front, [BUTTON, "print(len(clicks), 'click')"])
    notebook.run_cell(0, wait=True)
    notebook.click("Stop")
    notebook.button("clicked").wait_for()
    notebook.run_cell(1)
    notebook.wait_output(1, "1 click")


@pytest.mark.parametrize("front", FRONTS)
def test_queued_cells_wait_for_the_first(open_notebook, front):
    go = f"go-{front}"
    first = f"import os, time\nwhile not os.path.exists({go!r}): time.sleep(0.05)"
    notebook = open_notebook(front, [first, "print('se' + 'cond')"])
    notebook.queue(0, 1)
    assert (notebook.prompt(0), notebook.prompt(1)) == ("[*]:", "[*]:")
    notebook.file.with_name(go).touch()
    notebook.wait_output(1, "second")
    assert (notebook.prompt(0), notebook.prompt(1)) == ("[1]:", "[2]:")


@pytest.mark.parametrize("front", FRONTS)
def test_an_interrupt_ends_the_running_cell(open_notebook, front):
    notebook = open_notebook(front, ["import time\nprint('sleeps')\ntime.sleep(60)"])
    notebook.run_cell(0)
    notebook.wait_output(0, "sleeps")
    notebook.interrupt()
    notebook.wait_output(0, "KeyboardInterrupt", timeout=10)
    notebook.wait_idle()


@pytest.mark.parametrize("front", FRONTS)
def test_saved_outputs_are_there_again_with_the_kernel_and_without(open_notebook, front):
    notebook = open_notebook(front, ["print(6 * 7)"], theme="dark")
    notebook.run_cell(0, wait=True)
    notebook.save()
    assert notebook.read()["cells"][0]["outputs"][0]["text"] == ["42\n"]
    notebook.reload()
    notebook.wait_output(0, "42")

    notebook.shutdown_kernel()
    notebook.open(kernel=False)
    notebook.wait_output(0, "42")
    assert notebook.kernel("k === undefined || k === null")
    assert notebook.page.locator("body").get_attribute("data-jp-theme-light") == "false"


@pytest.mark.parametrize("front", FRONTS)
def test_a_page_loaded_again_while_a_cell_runs_finds_its_kernel(open_notebook, front):
    go = f"go-again-{front}"
    first = f"import os, time\nwhile not os.path.exists({go!r}): time.sleep(0.05)\nlate = 'ly'"
    notebook = open_notebook(front, [first, "print('late' + late)"])
    notebook.run_cell(0)
    notebook.reload(idle=False)
    assert notebook.kernel() != "idle"
    notebook.file.with_name(go).touch()
    notebook.wait_idle()
    notebook.run_cell(1)
    notebook.wait_output(1, "lately")


@pytest.mark.parametrize("front", FRONTS)
def test_a_file_that_changed_on_disk_is_overwritten(open_notebook, front):
    notebook = open_notebook(front, ["print('ours')"])
    notebook.run_cell(0, wait=True)
    notebook.write(["print('theirs')"])
    notebook.save()
    assert notebook.read()["cells"][0]["source"] == ["print('ours')"]


@pytest.mark.parametrize("version", ["6.31.0", "7.4.0"])
@pytest.mark.parametrize("front", FRONTS)
def test_the_kernel_is_of_the_version_asked_for(open_notebook, front, version):
    notebook = open_notebook(front, [PRINT_VERSION], version=version)
    notebook.run_cell(0)
    notebook.wait_output(0, f"version {version}")


@pytest.mark.parametrize("front", FRONTS)
def test_another_client_connects_for_a_moment(open_notebook, front):
    notebook = open_notebook(front, ["print(6 * 7)"])

    def clients():
        path = notebook.kernel("`kernels/${k.id}`")
        return notebook.server.rest(path)["connections"]

    assert clients() == 1
    notebook.connect_another()
    notebook.wait(lambda: clients() == 2, "there are two")
    notebook.wait(lambda: clients() == 1, "there is one")
    notebook.run_cell(0, wait=True)
    notebook.wait_output(0, "42")


@pytest.mark.parametrize("front", FRONTS)
def test_a_subshell_hears_a_click_while_a_cell_runs(open_notebook, front):
    notebook = open_notebook(front, ["SECONDS = 30", LISTEN], version="7.3.0")
    notebook.queue(0, 1)
    notebook.click("Ask")
    notebook.wait_output(1, "during ['subshell-")


@pytest.mark.parametrize(("version", "comms"), [("7.3.0", "disabled"), ("6.31.0", "perCommTarget")])
def test_without_subshells_a_click_waits_for_the_cell(open_notebook, version, comms):
    cells = ["SECONDS = 3", LISTEN, "print('after', heard)"]
    notebook = open_notebook("lab", cells, version=version, comms=comms)
    notebook.queue(0, 1)
    notebook.click("Ask")
    assert notebook.prompt(1) == "[*]:"
    notebook.run_cell(2)
    notebook.wait_output(1, "during []")
    notebook.wait_output(2, "after ['MainThread']")


def test_notebook_takes_no_notice_of_the_comms_setting(open_notebook):
    with pytest.raises(AssertionError, match="took the comms setting disabled"):
        open_notebook("notebook", [], comms="disabled")
