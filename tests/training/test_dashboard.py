"""The dashboard without a kernel: buttons, pauses and files. It can never end training."""

import contextlib
import itertools
import json
import threading
import time
from concurrent.futures import Future

import pytest
import torch

import ununennium.training.dashboard as module
from small import AtStep, Clicks, button, make_batches, make_trainer, wait_for
from ununennium import Callback, Dashboard, TrainerConfig
from ununennium.notebook.kernel import LiveWidgets, has_front_end
from ununennium.training.charts import PLOTLY, WIDGET, CellOutput, Charts, View, record_bundles
from ununennium.training.checkpoint import CheckpointError
from ununennium.training.dashboard import Pace
from ununennium.training.progress import default_display
from ununennium.training.runlog import RunRecorder


def test_a_dashboard_ends_with_the_record(shown):
    import ipywidgets

    make_trainer(make_batches(1), callbacks=[Dashboard()]).fit(1)
    shown.clear()
    before = set(ipywidgets.widgets.widget._instances)
    dashboard = Dashboard()
    trainer = make_trainer(make_batches(4), make_batches(2), callbacks=[dashboard])
    trainer.fit(3)
    assert trainer.dashboard is dashboard
    live, charts, table = shown
    assert WIDGET in live
    names = {trace["name"] for trace in charts[PLOTLY]["data"]}
    assert names >= {"train", "validation", "mean"} and "<img" in charts["text/html"]
    assert "History of 3 epochs" in table["text/html"]
    assert len(json.dumps(shown)) < 300_000
    assert dashboard.cell.view is None
    assert set(ipywidgets.widgets.widget._instances) == before  # all were closed
    dashboard._ipython_display_()
    assert shown[3:] == [charts, table]


def test_a_reloaded_page_keeps_its_widgets(shown):
    dashboard = Dashboard()

    class Load(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            state = dashboard.cell.view.charts.figure.get_state()
            assert {trace["name"] for trace in state["_widget_data"]} >= {"train"}

    trainer = make_trainer(make_batches(4), make_batches(2), callbacks=[dashboard, Load()])
    trainer.fit(1)
    assert "run trainer.dashboard in a cell" in dashboard.cell.view.status.value
    assert dashboard.cell.view.buttons["Stop"].disabled
    trainer.callbacks.pop()
    trainer.fit(1)
    assert dashboard.cell.view is None


def test_a_checkpoint_that_cannot_be_written_is_reported_in_the_note(shown, tmp_path):
    (tmp_path / "file").write_text("")
    dashboard = Dashboard(checkpoint_dir=tmp_path / "file" / "folder")
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Checkpoint=2)])
    trainer.fit(1)
    assert trainer.global_step == 6 and dashboard.recorder.log.note.startswith("not saved: ")


class Writer:
    """A trainer's `save_in_background` whose files are complete when a test says so."""

    def __init__(self, trainer):
        self.paths, self.files = [], []
        trainer.save_in_background = self.save

    def save(self, path, *, before=None, then=lambda path: None):
        self.paths.append(path)
        self.files.append(Future())
        return self.files[-1]

    def complete(self):
        self.files[-1].set_result(self.paths[-1])


class At(Callback):
    """Call functions after certain steps."""

    def __init__(self, **steps):
        self.steps = {int(step[1:]): act for step, act in steps.items()}

    def on_batch_end(self, trainer, batch, logs):
        self.steps.pop(trainer.global_step, lambda: None)()


def test_training_continues_while_a_file_is_written(shown):
    """A click says so at once, the file only when it is in place; the mark is where it began."""
    dashboard, notes = Dashboard(), []
    log = lambda: dashboard.recorder.log
    at = At(
        s3=lambda: (button(dashboard, "Checkpoint").click(), notes.append(log().note)),
        s5=lambda: (notes.append(log().note), writer.complete()),
        s6=lambda: notes.append(log().note),
    )
    # The dashboard comes last, so a safepoint lies between each two of these steps.
    trainer = make_trainer(make_batches(8), callbacks=[at, dashboard])
    writer = Writer(trainer)
    trainer.fit(1)
    assert notes == [
        "saving a checkpoint after this step",
        "saving checkpoints/step=000003.pt …",
        "saved checkpoints/step=000003.pt",
    ]
    assert [(mark.text, mark.count) for mark in log().marks] == [("saved", 3)]


def test_a_click_while_a_file_is_written_is_kept(shown):
    """Three clicks, two of them during the first file: two files, the second of a later step."""
    dashboard = Dashboard()
    click = lambda: button(dashboard, "Checkpoint").click()
    at = At(
        s1=click, s3=click, s4=click, s6=lambda: writer.complete(), s8=lambda: writer.complete()
    )
    trainer = make_trainer(make_batches(8), callbacks=[at, dashboard])
    writer = Writer(trainer)
    trainer.fit(1)
    assert [path.name for path in writer.paths] == ["step=000001.pt", "step=000006.pt"]
    assert dashboard.recorder.log.note == "saved checkpoints/step=000006.pt"
    assert [mark.count for mark in dashboard.recorder.log.marks] == [1, 6]


def test_the_end_of_a_run_waits_for_its_files(shown):
    """The one that is being written, and the one that was asked for in the meantime."""
    dashboard = Dashboard()
    click = lambda: button(dashboard, "Checkpoint").click()
    trainer = make_trainer(make_batches(4), callbacks=[At(s2=click, s4=click), dashboard])
    writer = Writer(trainer)

    def complete_slowly():
        for number in (1, 2):
            while len(writer.files) < number:
                time.sleep(0.01)
            time.sleep(0.1)
            writer.complete()

    thread = threading.Thread(target=complete_slowly)
    thread.start()
    trainer.fit(1)
    thread.join()
    assert [path.name for path in writer.paths] == ["step=000002.pt", "step=000004.pt"]
    assert "saved checkpoints/step=000004.pt" in shown[-1]["text/html"]
    assert [mark.count for mark in dashboard.recorder.log.marks] == [2, 4]


def test_a_file_that_fails_in_the_background_is_reported(shown):
    dashboard, notes = Dashboard(), []
    at = At(
        s2=lambda: button(dashboard, "Checkpoint").click(),
        s4=lambda: writer.files[0].set_exception(CheckpointError("the disk is full")),
        s5=lambda: notes.append(dashboard.recorder.log.note),
    )
    trainer = make_trainer(make_batches(6), callbacks=[at, dashboard])
    writer = Writer(trainer)
    trainer.fit(1)
    assert notes == ["not saved: the disk is full"] and trainer.global_step == 6
    assert not dashboard.recorder.log.marks


def states_of(dashboard, monkeypatch):
    """Return the list to which every state that is shown at once is added."""
    states, show = [], module.Painter.show

    def note(self, state, reason=""):
        states.append(state)
        show(self, state, reason)

    monkeypatch.setattr(module.Painter, "show", note)
    return states


@pytest.mark.parametrize("phase", ["train", "validate"])
def test_the_state_around_a_pause(shown, monkeypatch, phase):
    """Pausing, paused, and what it was before; never paused again after Resume."""
    dashboard = Dashboard()
    states = states_of(dashboard, monkeypatch)

    class Click(Callback):
        def on_safepoint(self, trainer, now):
            if now == phase and trainer.global_step == 6 and not states:
                button(dashboard, "Pause").click()

    def resume():
        wait_for(lambda: dashboard.recorder.log.state == "paused")
        time.sleep(0.12)
        button(dashboard, "Pause").click()

    thread = threading.Thread(target=resume)
    thread.start()
    trainer = make_trainer(make_batches(6), make_batches(4), callbacks=[Click(), dashboard])
    trainer.fit(2)
    thread.join()
    before = "running" if phase == "train" else "validating"
    assert states == ["pausing", "paused", before]
    assert dashboard.recorder.log.state == "done" and trainer.global_step == 12


def test_another_callback_may_pause_the_run(shown, monkeypatch):
    """The dashboard shows that too, and its end; the button then says Resume."""
    dashboard, labels = Dashboard(), []
    states = states_of(dashboard, monkeypatch)

    class Pause(Callback):
        held = 0

        def on_safepoint(self, trainer, phase):
            if phase == "paused":
                self.held += 1
                labels.append(button(dashboard, "Pause").description)
                if self.held == 3:
                    trainer.end_pause()
            elif trainer.global_step == 2:
                trainer.request_pause()

    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Pause()])
    trainer.fit(1)
    assert states == ["paused", "running"] and labels == ["Resume"] * 3
    assert trainer.global_step == 6


def test_a_pause_that_is_called_off_holds_nothing(shown, monkeypatch):
    dashboard = Dashboard()
    states = states_of(dashboard, monkeypatch)
    pause = lambda: button(dashboard, "Pause").click()
    at = At(s2=lambda: (pause(), pause()))
    make_trainer(make_batches(6), callbacks=[at, dashboard]).fit(1)
    assert states == ["pausing", "running"]


def test_a_display_that_fails_in_a_pause_lets_the_run_continue(shown, monkeypatch):
    """Its button is gone, so nothing else could end the pause."""
    dashboard = Dashboard()

    def fail(*_):
        if dashboard.recorder.log.state == "paused":
            raise RuntimeError("broken")

    monkeypatch.setattr(Charts, "show", fail)
    pause = At(s2=lambda: button(dashboard, "Pause").click())
    trainer = make_trainer(make_batches(6), callbacks=[pause, dashboard])
    with pytest.warns(UserWarning, match="switched off.*broken"):
        trainer.fit(1)
    assert trainer.global_step == 6


def test_messages_are_delivered_during_a_pause(shown, monkeypatch):
    """Kernels before ipykernel 7 deliver a click only when polled."""
    polls = []

    class Polled(LiveWidgets):
        def __init__(self):
            super().__init__(wants_polls=True)

        def poll(self):
            polls.append(dashboard.recorder.log.state)
            if polls[-1] == "paused" and polls.count("paused") == 3:
                button(dashboard, "Pause").click()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(module, "live_widgets", Polled)
    dashboard = Dashboard()
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Pause=2)])
    trainer.fit(1)
    assert polls.count("paused") == 3 and trainer.global_step == 6


def test_clicks_of_an_earlier_run_are_forgotten(shown):
    """A pause that was asked for in the last step does not hold the next run."""
    dashboard = Dashboard()
    trainer = make_trainer(make_batches(3), callbacks=[dashboard, Clicks(dashboard, Stop=3)])
    trainer.callbacks.append(Clicks(dashboard, Pause=3))
    trainer.fit(2)
    view = dashboard.cell.view
    assert view is None and trainer.stop_reason == "Stop button"
    del trainer.callbacks[1:]
    trainer.fit(1)
    assert dashboard.recorder.log.state == "done"


def test_an_announcement_is_in_the_note_while_the_run_is_on_the_page(shown, capsys):
    dashboard, seen = Dashboard(), []

    class Announce(Callback):
        def on_batch_end(self, trainer, batch, logs):
            with dashboard.live.painter.lock:  # that of a thread which never lets go
                thread = threading.Thread(target=dashboard.announce, args=["stopping soon"])
                thread.start()
                thread.join(5)
            seen.append("stopping soon" in dashboard.live.view.status.value)

    trainer = make_trainer(make_batches(2), callbacks=[Announce(), dashboard])
    trainer.fit(1)
    assert seen == [True, True] and capsys.readouterr().out == ""
    assert "stopping soon" not in shown[-1]["text/html"]  # the record is about the end
    dashboard.announce("resuming")
    assert capsys.readouterr().out == "resuming\n"


def test_an_announcement_that_cannot_be_shown_is_printed(shown, monkeypatch, capsys):
    dashboard = Dashboard()

    def announce():
        with monkeypatch.context() as patch:
            patch.setattr(View, "show_status", lambda *_: 1 / 0)
            dashboard.announce("stopping soon")

    make_trainer(make_batches(2), callbacks=[At(s1=announce), dashboard]).fit(1)
    assert capsys.readouterr().out == "stopping soon\n"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (View, "__init__"), (View, "show_status"), (Charts, "show"), (CellOutput, "__init__"),
        (CellOutput, "keep_record"), (RunRecorder, "refresh"), (RunRecorder, "collect"),
        (RunRecorder, "on_epoch_end"), (RunRecorder, "on_safepoint"), (Pace, "timed"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)  # fmt: skip
def test_a_display_that_fails_never_ends_training(shown, monkeypatch, owner, name):
    """Broken anywhere: one warning, the same result, and the kernel is put back."""
    taps = []

    class Tap(LiveWidgets):
        def __init__(self):
            super().__init__()
            taps.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            taps.remove(self)

    monkeypatch.setattr(module, "live_widgets", Tap)
    trainer = make_trainer(make_batches(6), make_batches(2))
    trainer.fit(2)
    expected = [p.clone() for p in trainer.model.parameters()]

    def fail(*args, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(owner, name, fail)
    trainer = make_trainer(make_batches(6), make_batches(2), callbacks=[Dashboard()])
    with pytest.warns(UserWarning, match="Dashboard failed and is switched off.*broken") as caught:
        trainer.fit(2)
    assert len(caught) == 1
    assert trainer.epoch == 2 and not taps
    assert all(torch.equal(a, b) for a, b in zip(expected, trainer.model.parameters(), strict=True))


def test_a_pace_spends_its_share():
    """On a made-up clock: drawings of 20 ms, looked for every millisecond, for 100 s."""
    clock = [0.0]
    pace, spent = Pace(0.01, least=0.5, advance=0.1, clock=lambda: clock[0]), 0.0
    pace.start = pace.next = 0.0
    original, module.time.perf_counter = time.perf_counter, lambda: clock[0]
    try:
        for _ in itertools.takewhile(lambda _: clock[0] < 100, itertools.count()):
            clock[0] += 0.001
            if clock[0] >= pace.next:
                with pace.timed():
                    clock[0] += 0.02
                    spent += 0.02
    finally:
        module.time.perf_counter = original
    assert 0.9 < spent < 0.01 * 100 + 0.1 + 0.021


# Which display, where.


def test_a_run_without_a_page_needs_no_widgets(monkeypatch):
    assert not has_front_end()
    assert type(default_display("auto")).__name__ in ("BarProgress", "TextProgress")
    assert default_display("none") is None
    dashboard = Dashboard()
    make_trainer(make_batches(2), callbacks=[dashboard]).fit(2)  # shows nothing, records all
    assert dashboard.cell is None and dashboard.recorder.log.epoch == 2
    assert "History of 2 epochs" in record_bundles(dashboard.recorder.log)[1]["text/html"]


@pytest.mark.parametrize(
    ("height", "error"),
    [
        (-5, ValueError), (200, ValueError), (2001, ValueError),
        ("tall", TypeError), (320.5, TypeError), (None, TypeError),
    ],
)  # fmt: skip
def test_a_bad_height_is_refused(height, error):
    with pytest.raises(error, match=r"height=.* must be a whole number, 240 or more"):
        Dashboard(height=height)


def test_before_the_first_fit_there_is_nothing_to_show(shown):
    dashboard = Dashboard()
    make_trainer(make_batches(1), callbacks=[dashboard])
    dashboard._ipython_display_()
    assert [forms["text/plain"] for forms in shown] == ["ready · fit() has not been called yet"]


def test_the_dashboard_notes_while_it_runs_that_there_is_no_gpu(shown, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    live = lambda: contextlib.nullcontext(LiveWidgets())
    monkeypatch.setattr(module, "live_widgets", live)
    notes, dashboard = [], Dashboard()
    look = AtStep(2, lambda trainer: notes.append(dashboard.recorder.log.note))
    make_trainer(callbacks=[dashboard, look], device=TrainerConfig().device).fit(1)
    assert notes == ["training on the CPU: no GPU here"] and dashboard.recorder.log.note == ""
