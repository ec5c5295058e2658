"""Comm messages while a cell runs, tested at the protocol level for every kind of kernel."""

import contextlib
import os
import queue
import time

import kernels
import pytest
from jupyter_client.manager import KernelManager

SUBSHELLS = [v for v in kernels.VERSIONS if v.startswith("7")]
ROUTES = [(v, "main") for v in kernels.VERSIONS] + [(v, "subshell") for v in SUBSHELLS]

BUTTON = """
import time, threading, ipywidgets
from ununennium.notebook import live_widgets
seen = []
button = ipywidgets.Button()
slider = ipywidgets.IntSlider()
button.on_click(lambda b: seen.append(time.time()))
def work(seconds, step=0.01, until=None):
    with live_widgets() as live:
        assert live.problem is None, live.problem
        end = time.time() + seconds
        while time.time() < end and not (until and until()):
            time.sleep(step)
            live.poll()
print(button.comm.comm_id, slider.comm.comm_id)
"""


class Kernel:
    """A kernel and a front end that speaks the protocol to it."""

    def __init__(self, version, route="main", environment=None):
        path = os.pathsep.join([str(kernels.overlay(version)), os.environ.get("PYTHONPATH", "")])
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=os.environ | {"PYTHONPATH": path} | (environment or {}))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.subshell = None
        self.iopub, self.buttons = [], {}
        assert self.run("import ipykernel; print(ipykernel.__version__)").strip() == version
        if route == "subshell":
            request = self.client.session.msg("create_subshell_request", {})
            self.client.control_channel.send(request)
            reply = self.client.get_control_msg(timeout=10)
            self.subshell = reply["content"]["subshell_id"]

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def send(self, kind, content, subshell=None, metadata=None):
        """Send a message on the shell channel; return its id."""
        message = self.client.session.msg(kind, content, metadata=metadata)
        if subshell:
            message["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def start(self, code):
        """Send a cell without waiting for it."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
        return self.send("execute_request", content | {"allow_stdin": False, "stop_on_error": True})

    def comm(self, comm_id, data):
        return self.send("comm_msg", {"comm_id": comm_id, "data": data}, self.subshell)

    def click(self, comm_id):
        return self.comm(comm_id, {"method": "custom", "content": {"event": "click"}})

    def move(self, comm_id, value):
        data = {"method": "update", "state": {"value": value}, "buffer_paths": []}
        return self.comm(comm_id, data)

    def wait(self, matches, timeout=30, since=0):
        """Return the first message on IOPub, old (since a certain one) or new, that matches."""
        for message in self.iopub[since:]:
            if matches(message):
                return message
        end = time.time() + timeout
        while time.time() < end:
            with contextlib.suppress(queue.Empty):
                message = self.client.get_iopub_msg(timeout=0.2)
                self.iopub.append(message)
                if message["msg_type"] == "comm_open":
                    state = message["content"]["data"].get("state", {})
                    self.buttons[state.get("description")] = message["content"]["comm_id"]
                if matches(message):
                    return message
        raise TimeoutError([m["msg_type"] for m in self.iopub[-20:]])

    def is_idle(self, msg_id):
        return lambda m: (
            m["parent_header"].get("msg_id") == msg_id
            and m["msg_type"] == "status"
            and m["content"]["execution_state"] == "idle"
        )

    def output(self, msg_id, timeout=60, errors=()):
        """Wait for the end of a cell; return what it printed. Other errors are raised.

        The reply is waited for, too: what arrives at ipykernel 7.0 to 7.3 while they send a reply
        may lie there unread (https://github.com/ipython/ipykernel/issues/1554).
        """
        self.wait(self.is_idle(msg_id), timeout)
        self.reply(msg_id)
        own = [m for m in self.iopub if m["parent_header"].get("msg_id") == msg_id]
        assert [m["content"]["ename"] for m in own if m["msg_type"] == "error"] == list(errors)
        return "".join(m["content"]["text"] for m in own if m["msg_type"] == "stream")

    def run(self, code, timeout=60):
        return self.output(self.start(code), timeout)

    def reply(self, msg_id, timeout=5):
        """Return the reply to a message on the shell channel; earlier ones are dropped."""
        end = time.time() + timeout
        while (reply := self.client.get_shell_msg(timeout=timeout))["parent_header"][
            "msg_id"
        ] != msg_id:
            assert time.time() < end
        return reply


@pytest.fixture(scope="module", params=ROUTES, ids=lambda p: "-".join(p))
def kernel(request):
    kernel = Kernel(*request.param)
    kernel.button, kernel.slider = kernel.run(BUTTON).split()
    yield kernel
    kernel.close()


def test_without_a_tap_the_click_waits(kernel):
    """The reason for the tap: without it a click is lost, unless a subshell delivers it."""
    if kernel.subshell and not kernel.run("print(ipykernel.__version__)").startswith("7.4"):
        pytest.skip("this kernel's subshells deliver clicks themselves")
    cell = kernel.start("seen.clear(); time.sleep(1); print(len(seen))")
    time.sleep(0.3)
    kernel.click(kernel.button)
    assert kernel.output(cell).strip() == "0"
    assert kernel.run("print(len(seen))").strip() == "1"


def test_a_click_is_handled_at_once(kernel):
    cell = kernel.start("seen.clear(); work(5, until=lambda: seen); print(seen[0])")
    time.sleep(0.5)
    clicked = time.time()
    click = kernel.click(kernel.button)
    assert float(kernel.output(cell)) - clicked < 0.25
    kernel.wait(kernel.is_idle(click))


def test_a_hundred_clicks_in_a_row(kernel):
    cell = kernel.start("seen.clear(); work(20, until=lambda: len(seen) >= 100); print(len(seen))")
    time.sleep(0.3)
    clicks = [kernel.click(kernel.button) for _ in range(100)]
    assert kernel.output(cell).strip() == "100"
    for click in clicks:
        kernel.wait(kernel.is_idle(click))
    assert kernel.run("print(len(seen))").strip() == "100"


def test_queued_cells_run_afterwards_and_in_order(kernel):
    kernel.start("order = ['first']; seen.clear(); work(5, until=lambda: len(seen) > 2)")
    for code in ("order.append('second')", "order.append('third')", "print(*order, len(seen))"):
        time.sleep(0.2)
        last = kernel.start(code)
        kernel.click(kernel.button)
    assert kernel.output(last).strip() == "first second third 3"


def test_the_last_position_of_a_slider_wins(kernel):
    """Slider moves before the cell, before the tap opens, and under the tap arrive in order."""
    kernel.run(
        "slider.value = 0; moved = []; slider.observe(lambda c: moved.append(c.new), 'value')"
    )
    cell = kernel.start("time.sleep(0.6); work(1.5, until=lambda: 3 in moved)")
    time.sleep(0.3)
    kernel.move(kernel.slider, 1)
    kernel.move(kernel.slider, 2)
    time.sleep(0.8)
    kernel.move(kernel.slider, 3)
    kernel.output(cell)
    assert kernel.run("slider.unobserve_all(); print(moved, slider.value)").strip() == "[1, 2, 3] 3"


def test_the_front_end_keeps_seeing_a_busy_kernel(kernel):
    cell = kernel.start("seen.clear(); work(5, until=lambda: seen); time.sleep(0.2)")
    time.sleep(0.3)
    click = kernel.click(kernel.button)
    kernel.output(cell)
    states = [
        (m["parent_header"]["msg_id"], m["content"]["execution_state"])
        for m in kernel.iopub
        if m["msg_type"] == "status" and m["parent_header"].get("msg_id") in (cell, click)
    ]
    assert states == [
        (cell, "busy"), (click, "busy"), (click, "idle"), (cell, "busy"), (cell, "idle"),
    ]  # fmt: skip


def test_what_a_handler_prints_appears_in_the_cell(kernel):
    kernel.run("talk = ipywidgets.Button(); talk.on_click(lambda b: print('clicked'))")
    comm_id = kernel.run("print(talk.comm.comm_id)").strip()
    cell = kernel.start("work(1)")
    time.sleep(0.4)
    kernel.click(comm_id)
    assert kernel.output(cell).strip() == "clicked"


def test_a_handler_that_fails_shows_its_error_and_disturbs_nobody(kernel):
    kernel.run("bad = ipywidgets.Button(); bad.on_click(lambda b: 1 / 0)")
    comm_id = kernel.run("print(bad.comm.comm_id)").strip()
    cell = kernel.start("seen.clear(); work(5, until=lambda: seen); print(len(seen))")
    time.sleep(0.3)
    kernel.click(comm_id)
    kernel.click(kernel.button)
    assert kernel.output(cell, errors=["ZeroDivisionError"]).strip() == "1"


def test_a_page_that_is_loaded_anew_gets_its_widgets(kernel):
    """Widget managers ask for the state of all widgets, or for a list of them."""
    cell = kernel.start("seen.clear(); work(8, until=lambda: seen); print(len(seen))")
    time.sleep(0.3)
    target = {"comm_id": "control", "target_name": "jupyter.widget.control", "data": {}}
    kernel.send("comm_open", target, kernel.subshell, {"version": "1.0.0"})
    kernel.comm("control", {"method": "request_states"})
    states = kernel.wait(
        lambda m: m["msg_type"] == "comm_msg" and m["content"]["comm_id"] == "control", 5
    )
    assert kernel.button in states["content"]["data"]["states"]
    request = kernel.send("comm_info_request", {"target_name": "jupyter.widget"}, kernel.subshell)
    assert kernel.button in kernel.reply(request)["content"]["comms"]
    request = kernel.send("kernel_info_request", {}, kernel.subshell)
    assert kernel.reply(request)["content"]["implementation"] == "ipython"
    kernel.click(kernel.button)
    assert kernel.output(cell).strip() == "1"


def test_everything_is_put_back(kernel):
    """After a block, after an error in it, nested, and side by side in threads."""
    code = """
import ununennium.notebook.kernel as module
stream = get_ipython().kernel.shell_stream
before = stream._recv_callback
with live_widgets() as one, live_widgets() as two:
    assert one is two and stream._recv_callback is not before
    tap = stream._recv_callback
assert stream._recv_callback == before
try:
    with live_widgets():
        1 / 0
except ZeroDivisionError:
    pass
assert stream._recv_callback == before and not module._open
def block():
    with live_widgets():
        time.sleep(0.3)
threads = [threading.Thread(target=block) for _ in range(3)]
with live_widgets():
    [t.start() for t in threads]
assert module._open
[t.join() for t in threads]
assert stream._recv_callback == before and not module._open
print("fine")
"""
    assert kernel.run(code).strip() == "fine"
    assert kernel.run("print('and alive')").strip() == "and alive"


def test_an_interrupt_is_not_swallowed(kernel):
    code = """
try:
    work(20)
except KeyboardInterrupt:
    print("interrupted")
print(get_ipython().kernel.shell_stream._recv_callback is before or "put back")
"""
    kernel.run("before = get_ipython().kernel.shell_stream._recv_callback")
    cell = kernel.start(code)
    time.sleep(0.5)
    kernel.manager.interrupt_kernel()
    assert kernel.output(cell, 10).split("\n")[0] == "interrupted"
    cell = kernel.start("seen.clear(); work(5, until=lambda: seen); print(len(seen))")
    time.sleep(0.3)
    kernel.click(kernel.button)
    assert kernel.output(cell).strip() == "1"


def test_interrupts_and_clicks_lose_nothing(kernel):
    """Many of both at once: every click counts once, and cells still run."""
    kernel.run("seen.clear()")
    for _ in range(5):
        cell = kernel.start(
            "try:\n    work(20, step=0.001)\n"
            "except KeyboardInterrupt:\n    print('stopped')\n    time.sleep(0.2)"
        )
        time.sleep(0.2)
        for number in range(20):
            kernel.click(kernel.button)
            if number == 10:
                kernel.manager.interrupt_kernel()
        assert kernel.output(cell, 10).strip() == "stopped"
    # After the cell, a subshell handles its clicks in a thread of its own.
    wait = "while len(seen) < 100 and time.time() < end: time.sleep(0.1)"
    assert kernel.run(f"end = time.time() + 3\n{wait}\nprint(len(seen))").strip() == "100"


def test_the_buttons_of_the_dashboard(kernel):
    """As in a browser: in a step, in a validation, with a cell queued; save, pause and go on."""
    kernel.run("import os, tempfile; os.chdir(tempfile.mkdtemp())")
    kernel.run(kernels.TRAINING.replace('"device"', '"progress": "dashboard", "device"'))
    kernel.run(
        "Times.phase = None\n"
        "def say(self, trainer, phase):\n"
        "    if phase != self.phase: print(phase)\n"
        "    self.phase = phase\n"
        "Times.on_safepoint = say"
    )
    slow = 0.4

    def begin(code, phase):
        """Start a cell, and wait until its dashboard appears and this phase begins."""
        cell = kernel.start(code)
        kernel.wait(
            lambda m: m["msg_type"] == "display_data" and m["parent_header"]["msg_id"] == cell
        )
        new = len(kernel.iopub)
        kernel.wait(lambda m: m["msg_type"] == "stream" and phase in m["content"]["text"], 20, new)
        return cell

    def status(word):
        """Wait until the dashboard says this, from now on."""
        says = f"● {word}<"
        new = len(kernel.iopub)
        kernel.wait(lambda m: m["msg_type"] == "comm_msg" and says in str(m["content"]), 20, new)

    for phase in ("train", "validate"):
        cell = begin(f"train({phase}={slow})", phase)
        queued = kernel.start("print('queued')")
        clicked = time.time()
        kernel.click(kernel.buttons["Stop"])
        _, end, rest = kernel.output(cell).splitlines()[-1].split(maxsplit=2)
        assert float(end) - clicked < slow + 2 and rest.startswith("Stop button")
        assert kernel.output(queued).strip() == "queued"

    cell = begin("train()", "train")
    kernel.click(kernel.buttons["Checkpoint"])
    kernel.click(kernel.buttons["Pause"])
    status("paused")
    kernel.click(kernel.buttons["Pause"])
    status("running")
    kernel.click(kernel.buttons["Stop"])
    assert "Stop button" in kernel.output(cell)
    saved = "import glob; print(len(glob.glob('checkpoints/step=*.pt')))"
    assert kernel.run(saved).strip() == "1"
