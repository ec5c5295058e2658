"""The status of a run in words and in HTML."""

import math

import pytest

from ununennium.training.progress import duration
from ununennium.training.runlog import RunLog
from ununennium.training.status import (
    headline,
    record_html,
    record_text,
    share_done,
    status_facts,
    status_html,
)


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


def test_a_pause_in_a_validation_shows_where_it_is():
    log = RunLog("paused", phase="validating", goal=2, batch=6, batches=6)
    log.val_batch, log.val_batches = 3, 8
    assert headline(log) == "epoch 1 of 2 · validation batch 3 of 8"


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 59.6, 61, 3600, 90061)] == [
        "0 s", "1 min 00 s", "1 min 01 s", "1 h 00 min", "25 h 01 min",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "reason", "text"),
    [
        ("stopped", "Stop button", "stopped: Stop button"),
        ("failed", "ValueError: no", "failed: ValueError: no"),
        ("paused", "click Resume to continue", "paused – click Resume to continue"),
        ("stopping", "after this step", "stopping – after this step"),
        ("done", "", "done"),
    ],
)
def test_a_reason_follows_a_colon_and_a_hint_a_dash(state, reason, text):
    assert record_text(RunLog(state, reason)) == text


def test_the_share_that_is_done():
    assert share_done(RunLog()) == 0.0
    assert share_done(RunLog(epoch=1, goal=4)) == 0.25
    assert share_done(RunLog(epoch=5, goal=4)) == 1.0


def test_nothing_from_the_outside_is_taken_for_html():
    log = RunLog("failed", "ValueError: <b>&", "<i>", epoch=2, goal=2)
    log.history["val_IoU"] = log.history["val_IoU/<script>"] = [0.5, 0.5]
    for text in (record_html(log), status_html(log)):
        assert "<script>" not in text and "<b>&" not in text and "<i>" not in text


def test_a_run_of_only_nan_has_a_status():
    log = RunLog("done", epoch=3, goal=3)
    log.history = {"train_loss": [math.nan] * 3, "val_IoU": [math.nan] * 3}
    assert "mean IoU nan" in status_html(log) and "nan" in record_html(log)


def test_a_huge_loss_on_the_dashboard_has_a_power_of_ten():
    log = RunLog(history={"train_loss": [3.1e20], "val_loss": [2e-5], "val_IoU": [0.5]})
    assert status_facts(log) == "train loss 3.10e+20 · val loss 2.00e-05 · mean IoU 0.500"
