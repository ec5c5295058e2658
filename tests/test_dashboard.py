"""The run log and the dashboard, without a kernel; and that a display can never end training."""

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ununennium.training.dashboard as module
from conftest import make_batches, make_trainer
from ununennium import Callback, CheckpointCallback, Dashboard
from ununennium.notebook.kernel import LiveWidgets
from ununennium.training.dashboard import Charts, Output, Pace, View
from ununennium.training.runlog import (
    RunLog,
    RunRecorder,
    Series,
    Timeline,
    duration,
    headline,
    jumps,
    limits,
    picture,
    picture_html,
    record_html,
    score_curves,
    smooth,
    status_html,
    ticks,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 300), max_size=12), st.sampled_from([2, 4, 10, 64]))
def test_a_series_keeps_the_mean_however_it_is_filled(sizes, capacity):
    values = np.random.default_rng(0).normal(size=sum(sizes))
    series, start = Series(capacity), 0
    for size in sizes:
        series.extend(range(start, start + size), values[start : start + size])
        start += size
    x, y = series.points()
    assert len(x) <= capacity + 1
    assert np.all(np.diff(x) > 0)
    if len(values):
        rest = len(values) - (len(x) - 1) * series.stride
        counts = np.full(len(x), series.stride)
        counts[-1] = rest
        assert 0 < rest <= series.stride
        np.testing.assert_allclose(np.average(y, weights=counts), values.mean(), atol=1e-12)


def test_a_series_leaves_nan_out_of_its_means():
    series = Series(2)
    series.extend(range(8), [1.0, math.nan, math.nan, math.nan, math.nan, math.nan, 7.0, 9.0])
    np.testing.assert_array_equal(series.points()[1], [1.0, 8.0])


def test_smoothing_follows_and_ignores_nan():
    values = np.array([math.nan, 2.0, math.nan, 4.0])
    np.testing.assert_array_equal(smooth(values, share=0.5), [math.nan, 2.0, 2.0, 4.0])
    assert len(smooth(np.empty(0))) == 0


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_inside_and_few(low, span):
    found = ticks(low, low + span)
    assert len(found) <= 7
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= tick <= low + span + slack for tick in found)


def test_limits_of_nothing_and_of_one_value():
    assert limits([]) == (0.0, 1.0)
    assert limits([np.array([math.nan, 2.0])]) == (1.5, 2.5)


def test_batches_of_unknown_epochs_move_to_where_they_belong():
    where = Timeline(epoch=2)
    assert 2.0 < where(10) < where(40) < 3.0
    where.begin_epoch(40)
    np.testing.assert_allclose(where([10, 20, 40]), [2.25, 2.5, 3.0])
    where.batches = 20
    np.testing.assert_allclose(where([40, 50, 60, 70]), [3.0, 3.5, 4.0, 4.0])
    assert Timeline(epoch=3, batch=5, batches=10)([0, 1]).tolist() == [3.5, 3.6]


def test_a_stream_of_unknown_length_has_one_after_an_epoch():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from (sample for batch in make_batches(5) for sample in zip(*batch, strict=True))

    recorder = RunRecorder()
    trainer = make_trainer(torch.utils.data.DataLoader(Stream(), 2), callbacks=[recorder])
    trainer.fit(1)
    log = recorder.log
    assert log.batches == len(log.losses.points()[0]) > 3
    trainer.fit(2)
    count = len(log.losses.points()[0])
    np.testing.assert_allclose(log.where(range(1, count + 1)), np.arange(1, count + 1) * 3 / count)


def test_where_a_run_is_in_words():
    log = RunLog("running", epoch=1, goal=12, batch=3, batches=8)
    assert headline(log) == "epoch 2 of 12 · batch 3 of 8"
    log.state = "stopped"
    assert headline(log) == "epoch 2 of 12 · batch 3 of 8"
    log.batch = 0
    assert headline(log) == "epoch 1 of 12"
    log.epoch, log.state = 12, "done"
    assert headline(log) == "epoch 12 of 12"
    assert headline(RunLog()) == "fit() has not been called yet"


def test_the_wait_for_data_is_measured():
    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.02)
                yield batch

    recorder = RunRecorder()
    trainer = make_trainer(Slow(make_batches(10)), make_batches(2), callbacks=[recorder])
    trainer.fit(2)
    assert 0.4 < trainer.data_wait < recorder.speed.trained
    assert recorder.speed.waited == pytest.approx(trainer.data_wait)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_samples_are_counted_by_the_images(kind, size):
    batches = make_batches(4, size=size)
    if kind == "dict":
        batches = [{"crs": "x", "image": image, "mask": mask} for image, mask in batches]
    batches = [list(batch) if kind == "list" else batch for batch in batches]
    recorder = RunRecorder()
    make_trainer(batches, callbacks=[recorder]).fit(1)
    assert recorder.speed.samples == size


def test_the_first_validation_counts_for_the_remaining_time():
    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.05)
                yield batch

    recorder, seen = RunRecorder(), []

    class Look(Callback):
        def on_safepoint(self, trainer, phase):
            if phase == "validate":
                recorder.refresh(trainer)
                seen.append(recorder.log.remaining)

    make_trainer(make_batches(2), Slow(make_batches(8)), callbacks=[recorder, Look()]).fit(2)
    assert 0.5 < seen[4] < 5  # two validations of 0.4 s


def test_the_log_begins_anew_where_an_earlier_state_was_loaded(tmp_path):
    recorder = RunRecorder()
    trainer = make_trainer(make_batches(5), callbacks=[recorder])
    trainer.fit(2)
    trainer.save_checkpoint(tmp_path / "two.pt")
    trainer.fit(2)
    trainer.load_checkpoint(tmp_path / "two.pt")
    trainer.fit(1)
    counts, _ = recorder.log.losses.points()
    np.testing.assert_allclose(recorder.log.where(counts), 2 + np.arange(1, 6) / 5)


def test_an_abandoned_window_is_not_counted_twice():
    calls = []

    class Fail(Callback):
        def on_batch_end(self, trainer, batch, logs):
            calls.append(batch)
            if len(calls) == 5:  # the second of the second window
                raise RuntimeError("once")

    recorder = RunRecorder()
    trainer = make_trainer(make_batches(6), callbacks=[recorder, Fail()], accumulation_steps=3)
    with pytest.raises(RuntimeError, match="once"):
        trainer.fit(1)
    trainer.fit(1)
    assert recorder.log.count == 6 and len(calls) == 8


def test_more_classes_than_curves_are_said():
    log = long_log(3, 60)
    title, curves = score_curves(log)
    assert title == "IoU, 12 of 60" and len(curves) == 13
    assert len({(curve.colour, curve.style) for curve in curves}) == 13


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 59.6, 61, 3600, 90061)] == [
        "0 s", "1 min 00 s", "1 min 01 s", "1 h 00 min", "25 h 01 min",
    ]  # fmt: skip


def test_jumps_of_plateaus_only():
    assert jumps([1.0] * 4 + [0.1] * 4 + [0.05]) == [4, 8]
    assert jumps([1.0, 0.5, 0.25, 0.125, 0.06]) == []
    assert jumps([0.0, 0.0, 0.0, 0.1]) == [3]


def test_the_recorder_keeps_every_loss():
    losses = []

    class Note(Callback):
        def on_batch_end(self, trainer, batch, logs):
            losses.append(float(logs["train_loss"]))

    recorder = RunRecorder()
    trainer = make_trainer(make_batches(5), make_batches(2), callbacks=[Note(), recorder])
    trainer.fit(3)
    log = recorder.log
    counts, y = log.losses.points()
    np.testing.assert_allclose(y, losses, rtol=1e-6)
    np.testing.assert_allclose(log.where(counts), np.arange(1, 16) / 5)
    assert log.state == "done" and log.epoch == log.goal == 3
    assert log.history == trainer.history
    assert 0 <= log.waiting < 1 and log.samples_per_second > 0 and log.memory > 10_000_000


def test_the_recorder_goes_on_after_a_stop_and_begins_anew_for_another_trainer():
    recorder = RunRecorder()

    class StopAt(Callback):
        def on_batch_end(self, trainer, batch, logs):
            if trainer.global_step == 7:
                trainer.request_stop("enough")

    trainer = make_trainer(make_batches(5), callbacks=[recorder, StopAt()])
    trainer.fit(3)
    assert (recorder.log.state, recorder.log.reason) == ("stopped", "enough")
    trainer.callbacks.pop(1)
    trainer.fit(2)
    counts, _ = recorder.log.losses.points()
    np.testing.assert_allclose(recorder.log.where(counts), np.arange(1, 16) / 5)
    make_trainer(make_batches(2), callbacks=[recorder]).fit(1)
    assert len(recorder.log.losses.points()[0]) == 2


def test_marks_of_the_learning_rate_and_of_the_best_model(tmp_path):
    recorder = RunRecorder()
    trainer = make_trainer(
        make_batches(4), make_batches(1), callbacks=[recorder, CheckpointCallback(tmp_path)]
    )
    trainer.optimizer.param_groups[0]["lr"] = 0.5
    trainer.schedule.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 2)
    trainer.schedule.pace = "epoch"
    trainer.fit(3)
    texts = [mark.text for mark in recorder.log.marks]
    assert "lr 0.5 to 0.05" in texts and texts.count("best") == 1
    best = next(m for m in recorder.log.marks if m.text == "best")
    assert recorder.log.where(best.count) in (1, 2, 3)  # when an epoch ended


def test_the_recorder_reads_nothing_from_the_device_in_a_step(monkeypatch):
    """Until somebody looks. `torch.cat` is where losses are read."""
    reads = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *a, **k: reads.append(1) or cat(*a, **k))
    recorder = RunRecorder()
    recorder.look = lambda trainer: None
    make_trainer(make_batches(100), callbacks=[recorder]).fit(1)
    assert len(reads) <= 1


def long_log(epochs=100, classes=6, steps=50_000):
    log = RunLog(state="done", epoch=epochs, goal=epochs)
    random = np.random.default_rng(0)
    log.where = Timeline(batches=max(1, steps // max(1, epochs)))
    log.losses.extend(range(1, steps + 1), random.random(steps))
    log.rates.extend(range(1, steps + 1), np.full(steps, 1e-3))
    names = ["train_loss", "val_loss", "val_IoU", *(f"val_IoU/class {c}" for c in range(classes))]
    log.history = {name: list(random.random(epochs)) for name in names}
    for number in range(20):
        log.mark(f"mark {number}", number * steps / 20)
    return log


@pytest.mark.parametrize(("epochs", "classes"), [(0, 0), (1, 0), (1, 3), (100, 6), (3000, 60)])
def test_the_record_is_small_and_well_formed(epochs, classes):
    import xml.etree.ElementTree

    log = long_log(epochs, classes, steps=epochs * 100)
    assert len(record_html(log) + picture_html(log)) < 200_000
    xml.etree.ElementTree.fromstring(picture(log))


def test_nothing_from_the_outside_is_taken_for_html():
    log = long_log(2, 0)
    log.state, log.reason, log.note = "failed", "ValueError: <b>&", "<i>"
    log.history["val_IoU"] = log.history["val_IoU/<script>"] = [0.5, 0.5]
    for text in (record_html(log), status_html(log)):
        assert "<script>" not in text and "<b>&" not in text and "<i>" not in text
    assert "<script>" not in picture(log)


def test_a_run_of_only_nan_can_be_drawn():
    log = long_log(3)
    log.losses = Series()
    log.losses.extend([1, 2, 3], [math.nan] * 3)
    log.history = {"train_loss": [math.nan] * 3, "val_IoU": [math.nan] * 3}
    record_html(log)
    picture_html(log)
    status_html(log)


# A kernel that is not there: widgets work without one, and what is displayed is kept here.


class Display:
    def __init__(self):
        self.shown = []

    def display(self, forms, raw):
        self.shown.append(forms)

    update = display


@pytest.fixture
def shown(monkeypatch):
    """Let dashboards believe that somebody looks; return what they show."""
    pytest.importorskip("anywidget")
    pytest.importorskip("plotly")
    display = Display()
    monkeypatch.setattr(module, "running_kernel", lambda: "a kernel")
    monkeypatch.setattr(module, "has_front_end", lambda: True)
    monkeypatch.setattr("IPython.display.DisplayHandle", lambda: display)
    monkeypatch.setattr("IPython.display.display", display.display)
    return display.shown


class Clicks(Callback):
    """Click buttons after these steps."""

    def __init__(self, dashboard, **steps):
        self.dashboard, self.steps = dashboard, steps

    def on_batch_end(self, trainer, batch, logs):
        for name, step in self.steps.items():
            if trainer.global_step == step:
                self.dashboard.view.buttons[name].click()


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
    assert module.WIDGET in live
    names = {trace["name"] for trace in charts[module.PLOTLY]["data"]}
    assert names >= {"train", "validation", "mean"} and "<img" in charts["text/html"]
    assert "History of 3 epochs" in table["text/html"]
    assert len(json.dumps(shown)) < 300_000
    assert dashboard.view is None
    assert set(ipywidgets.widgets.widget._instances) == before  # all were closed
    dashboard._ipython_display_()
    assert shown[3:] == [charts, table]


def test_a_page_that_was_loaded_anew_keeps_its_widgets(shown):
    dashboard = Dashboard()

    class Load(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            state = dashboard.view.charts.figure.get_state()
            assert {trace["name"] for trace in state["_widget_data"]} >= {"train"}

    trainer = make_trainer(make_batches(4), make_batches(2), callbacks=[dashboard, Load()])
    trainer.fit(1)
    assert "run trainer.dashboard in a cell" in dashboard.view.status.value
    assert dashboard.view.buttons["Stop"].disabled
    trainer.callbacks.pop()
    trainer.fit(1)
    assert dashboard.view is None


def test_stop_button(shown):
    dashboard = Dashboard()
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Stop=4)])
    trainer.fit(3)
    assert trainer.stop_reason == "Stop button" and trainer.global_step == 4
    assert dashboard.log.state == "stopped"
    trainer.callbacks.pop()
    trainer.fit(1)
    assert trainer.global_step == 6 and dashboard.log.state == "done"


def test_checkpoint_button(shown, tmp_path):
    dashboard = Dashboard()
    callbacks = [dashboard, Clicks(dashboard, Checkpoint=2)]
    callbacks.append(CheckpointCallback(tmp_path / "run"))
    trainer = make_trainer(make_batches(6), make_batches(1), callbacks=callbacks)
    trainer.fit(1)
    other = make_trainer(make_batches(6), make_batches(1))
    other.load_checkpoint(tmp_path / "run" / "step=000002.pt")
    assert other.global_step == other.batch == 2
    assert ("saved", 2 / 6) in [
        (m.text, pytest.approx(dashboard.log.where(m.count))) for m in dashboard.log.marks
    ]


def test_a_checkpoint_that_cannot_be_written_is_said_and_no_more(shown, tmp_path):
    (tmp_path / "file").write_text("")
    dashboard = Dashboard(checkpoint_dir=tmp_path / "file" / "folder")
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Checkpoint=2)])
    trainer.fit(1)
    assert trainer.global_step == 6 and dashboard.log.note.startswith("not saved: ")


def test_stop_and_checkpoint_in_one_step_do_both(shown, tmp_path):
    dashboard = Dashboard(checkpoint_dir=tmp_path)
    clicks = Clicks(dashboard, Checkpoint=3, Stop=3)
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, clicks])
    trainer.fit(1)
    assert trainer.global_step == 3 and (tmp_path / "step=000003.pt").exists()


def test_pause_holds_until_resume(shown):
    """Clicks come from a thread, as with recent kernels."""
    import threading

    dashboard = Dashboard()
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Pause=2)])
    seen = []

    def click_later():
        while dashboard.log.state != "paused":
            time.sleep(0.01)
        steps = trainer.global_step
        time.sleep(0.3)
        seen.append((steps, trainer.global_step, dashboard.view.buttons["Pause"].description))
        dashboard.view.buttons["Pause"].click()

    thread = threading.Thread(target=click_later)
    thread.start()
    trainer.fit(2)
    thread.join()
    assert seen == [(2, 2, "Resume")]
    assert trainer.global_step == 12 and dashboard.log.state == "done"
    assert dashboard.speed.trained < 0.3  # the pause is no work


def test_a_paused_run_can_be_stopped(shown):
    import threading

    dashboard = Dashboard()
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Pause=2)])
    threading.Timer(0.5, lambda: trainer.request_stop("enough")).start()
    trainer.fit(2)
    assert trainer.global_step == 2 and dashboard.log.reason == "enough"


def test_pictures_have_the_same_parameters_as_none(shown):
    runs = []
    for callbacks in ([], [Dashboard()]):
        trainer = make_trainer(make_batches(6), make_batches(2), callbacks=callbacks)
        trainer.fit(3)
        runs.append((list(trainer.model.parameters()), trainer.history))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(a, b)
    assert repr(runs[0][1]) == repr(runs[1][1])


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (View, "__init__"), (View, "show_status"), (Charts, "show"), (Output, "__init__"),
        (Output, "keep_record"), (RunRecorder, "refresh"), (RunRecorder, "collect"),
        (RunRecorder, "on_epoch_end"), (RunRecorder, "on_safepoint"), (Pace, "timed"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)  # fmt: skip
def test_a_display_that_fails_never_ends_training(shown, monkeypatch, place, name):
    """Broken anywhere: one warning, the same result, and the kernel's messages are let go."""
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

    monkeypatch.setattr(place, name, fail)
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


# Where nobody looks.


def test_headless_runs_need_no_widgets():
    dashboard = Dashboard()
    make_trainer(make_batches(2), callbacks=[dashboard]).fit(2)  # shows nothing, records all
    assert dashboard.view is None and dashboard.log.epoch == 2
    assert "History of 2 epochs" in module.record_forms(dashboard.log)[1]["text/html"]


@pytest.mark.parametrize("height", [-5, 200, "tall", 320.5, None])
def test_a_height_that_is_none_is_refused_at_once(height):
    with pytest.raises(ValueError, match="height in pixels"):
        Dashboard(height=height)


def test_before_the_first_fit_there_is_nothing_to_show(shown):
    dashboard = Dashboard()
    make_trainer(make_batches(1), callbacks=[dashboard])
    dashboard._ipython_display_()
    assert [forms["text/plain"] for forms in shown] == ["ready · fit() has not been called yet"]


def test_all_figures_share_one_library(shown):
    first, second = (Charts(320).figure for _ in range(2))
    assert first._library == second._library
    assert max(len(str(value)) for value in second.get_state().values()) < 10_000
    import ipywidgets

    library = ipywidgets.widgets.widget._instances[first._library]
    assert len(library.code) > 1_000_000
    library.close()
    assert Charts(320).figure._library != first._library


def test_names_of_classes_are_no_html_and_no_formulas():
    scores = {"val_IoU": [0.2, 0.3], "val_IoU/<b>Öl & Gas</b>": [0.2, 0.3]}
    log = RunLog(history=scores | {'val_IoU/"$x^2$"': [0.2, 0.3]})
    charts = Charts(320)
    charts.show(log)
    charts.show(log)
    names = [trace.name for trace in charts.figure.data if trace.yaxis == "y3"]
    assert names == ["mean", "&lt;b&gt;Öl &amp; Gas&lt;/b&gt;", '"&#36;x^2&#36;"']
    assert charts.figure.layout.annotations[2].text == "<b>IoU</b>"


def test_without_scores_their_panel_has_no_heading():
    log = RunLog(history={"train_loss": [0.2, 0.3]})
    charts = Charts(320)
    charts.show(log)
    assert "IoU" not in charts.figure.to_json()
