"""The log of a run: curves of bounded size, positions, speed, and the recorder that fills it."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small import make_batches, make_trainer, small_net
from ununennium import Callback, CheckpointCallback
from ununennium.training.runlog import (
    RunLog,
    RunRecorder,
    Series,
    Timeline,
    add_mark,
    events,
    jumps,
)
from ununennium.training.status import seconds_left


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


def test_batches_of_unknown_epochs_move_to_where_they_belong():
    where = Timeline(epoch=2)
    assert 2.0 < where(10) < where(40) < 3.0
    where.start_epoch(40)
    np.testing.assert_allclose(where([10, 20, 40]), [2.25, 2.5, 3.0])
    where.batches = 20
    np.testing.assert_allclose(where([40, 50, 60, 70]), [3.0, 3.5, 4.0, 4.0])
    assert Timeline(epoch=3, batch=5, batches=10)([0, 1]).tolist() == [3.5, 3.6]


def test_only_jumps_of_a_plateau_count():
    assert jumps([1.0] * 4 + [0.1] * 4 + [0.05]) == [4, 8]
    assert jumps([1.0, 0.5, 0.25, 0.125, 0.06]) == []
    assert jumps([0.0, 0.0, 0.0, 0.1]) == [3]


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


def test_the_wait_for_data_is_measured():
    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.02)
                yield batch

    recorder = RunRecorder()
    trainer = make_trainer(Slow(make_batches(10)), make_batches(2), callbacks=[recorder])
    trainer.fit(2)
    assert 0.4 < trainer.data_wait < recorder.log.speed.trained
    assert recorder.log.speed.waited == pytest.approx(trainer.data_wait)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_samples_are_counted_by_the_images(kind, size):
    batches = make_batches(4, size=size)
    if kind == "dict":
        batches = [{"crs": "x", "image": image, "mask": mask} for image, mask in batches]
    batches = [list(batch) if kind == "list" else batch for batch in batches]
    recorder = RunRecorder()
    make_trainer(batches, callbacks=[recorder]).fit(1)
    assert recorder.log.speed.samples == size


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
                seen.append(seconds_left(recorder.log))

    make_trainer(make_batches(2), Slow(make_batches(8)), callbacks=[recorder, Look()]).fit(2)
    assert 0.5 < seen[4] < 5  # two validations of 0.4 s


def test_loading_an_earlier_checkpoint_starts_a_new_log(tmp_path):
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
    assert (
        0 <= log.speed.waiting < 1 and log.speed.samples_per_second > 0 and log.memory > 10_000_000
    )


def test_the_log_continues_after_a_stop_and_starts_again_for_another_trainer():
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
    trainer.run.schedule.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 2)
    trainer.run.schedule.pace = "epoch"
    trainer.fit(3)
    texts = [mark.text for mark in recorder.log.marks]
    assert "lr 0.5 to 0.05" in texts and texts.count("best") == 1
    best = next(m for m in recorder.log.marks if m.text == "best")
    assert recorder.log.where(best.count) in (1, 2, 3)  # when an epoch ended


def test_the_recorder_reads_nothing_from_the_device_in_a_step(monkeypatch):
    """Only a look reads them, with `torch.cat`."""
    reads = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *a, **k: reads.append(1) or cat(*a, **k))
    recorder = RunRecorder()
    recorder.show = lambda trainer: None
    without_buffers = small_net(norm=False)  # which are copied by torch.cat
    make_trainer(make_batches(100), model=without_buffers, callbacks=[recorder]).fit(1)
    assert len(reads) <= 1


@pytest.mark.parametrize("phase", ["train", "validate"])
def test_a_pause_counts_as_no_work(phase):
    """Neither for the speed of training nor for the duration of a validation."""
    recorder, start = RunRecorder(), time.perf_counter()

    class Hold(Callback):
        was_held = False

        def on_safepoint(self, trainer, now):
            if now == phase and trainer.global_step == 3 and not self.was_held:
                self.was_held = True
                time.sleep(0.5)
                recorder.on_safepoint(trainer, "paused")

    make_trainer(make_batches(3), make_batches(3), callbacks=[recorder, Hold()]).fit(1)
    speed = recorder.log.speed
    assert time.perf_counter() - start > 0.5 > 2 * (speed.trained + speed.validated)
    assert speed.batches == 3 and recorder.log.val_batch == 2


def test_a_state_that_a_user_asked_for_outlasts_the_phases():
    log = RunLog("stopping", "after this step")
    for phase in ("validating", "running", "validating"):
        log.enter(phase)
    assert (log.state, log.phase) == ("stopping", "validating")


def test_events_that_are_close_share_a_text():
    log = RunLog(count=100)
    for count, text in ((50, "saved"), (90, "lr 1 to 0.1"), (92, "best"), (98, "saved")):
        add_mark(log, text, count)
    log.where.start_epoch(100)  # a hundred batches are an epoch
    assert events(log) == [(0.5, "saved"), (0.9, "lr 1 to 0.1, best"), (0.98, "saved")]
