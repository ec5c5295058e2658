"""15 · The dashboard: a click takes effect after the current step, and the run stays the same."""

import threading
import time

import pytest
import torch

from small import Clicks, button, make_batches, make_trainer, wait_for
from ununennium import CheckpointCallback, Dashboard


def test_a_dashboard_changes_no_parameter(shown):
    runs = []
    for callbacks in ([], [Dashboard()]):
        trainer = make_trainer(make_batches(6), make_batches(2), callbacks=callbacks)
        trainer.fit(3)
        runs.append((list(trainer.model.parameters()), trainer.history))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(a, b)
    assert repr(runs[0][1]) == repr(runs[1][1])


def test_the_stop_button_ends_the_run_after_the_step(shown):
    dashboard = Dashboard()
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Stop=4)])
    trainer.fit(3)
    assert trainer.stop_reason == "Stop button" and trainer.global_step == 4
    assert dashboard.recorder.log.state == "stopped"
    trainer.callbacks.pop()
    trainer.fit(1)
    assert trainer.global_step == 6 and dashboard.recorder.log.state == "done"


def test_the_checkpoint_button_saves_the_step(shown, tmp_path):
    dashboard = Dashboard()
    callbacks = [dashboard, Clicks(dashboard, Checkpoint=2)]
    callbacks.append(CheckpointCallback(tmp_path / "run"))
    trainer = make_trainer(make_batches(6), make_batches(1), callbacks=callbacks)
    trainer.fit(1)
    other = make_trainer(make_batches(6), make_batches(1))
    other.load_checkpoint(tmp_path / "run" / "step=000002.pt")
    assert other.global_step == other.batch == 2
    assert ("saved", 2 / 6) in [
        (m.text, pytest.approx(dashboard.recorder.log.where(m.count)))
        for m in dashboard.recorder.log.marks
    ]


def test_stop_and_checkpoint_in_one_step_do_both(shown, tmp_path):
    dashboard = Dashboard(checkpoint_dir=tmp_path)
    clicks = Clicks(dashboard, Checkpoint=3, Stop=3)
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, clicks])
    trainer.fit(1)
    assert trainer.global_step == 3 and (tmp_path / "step=000003.pt").exists()


def test_the_pause_button_holds_until_resume(shown):
    """Clicks come from a thread, as with recent kernels."""
    dashboard = Dashboard()
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Pause=2)])
    seen = []

    def click_later():
        while dashboard.recorder.log.state != "paused":
            time.sleep(0.01)
        steps = trainer.global_step
        time.sleep(0.3)
        seen.append((steps, trainer.global_step, button(dashboard, "Pause").description))
        button(dashboard, "Pause").click()

    thread = threading.Thread(target=click_later)
    thread.start()
    trainer.fit(2)
    thread.join()
    assert seen == [(2, 2, "Resume")]
    assert trainer.global_step == 12 and dashboard.recorder.log.state == "done"
    assert dashboard.recorder.log.speed.trained < 0.3  # the pause is no work


def test_a_checkpoint_is_written_in_a_pause(shown, tmp_path):
    """It is written and reported while the run is held, and loads."""
    dashboard = Dashboard(checkpoint_dir=tmp_path)
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Pause=2)])

    def save_and_resume():
        wait_for(lambda: dashboard.recorder.log.state == "paused")
        button(dashboard, "Checkpoint").click()
        wait_for(lambda: dashboard.recorder.log.note.startswith("saved"))
        states.append((dashboard.recorder.log.state, trainer.global_step))
        button(dashboard, "Pause").click()

    states = []
    thread = threading.Thread(target=save_and_resume)
    thread.start()
    trainer.fit(1)
    thread.join()
    assert states == [("paused", 2)] and trainer.global_step == 6
    other = make_trainer(make_batches(6))
    other.load_checkpoint(tmp_path / "step=000002.pt")
    assert other.global_step == 2


def test_a_paused_run_can_be_stopped(shown):
    dashboard = Dashboard()
    trainer = make_trainer(make_batches(6), callbacks=[dashboard, Clicks(dashboard, Pause=2)])
    threading.Timer(0.5, lambda: trainer.request_stop("enough")).start()
    trainer.fit(2)
    assert trainer.global_step == 2 and dashboard.recorder.log.reason == "enough"
