"""The history and the progress of a run: plain data, equally long, copied."""

import math

from IPython.lib.pretty import pretty

from ununennium.training.state import History, Progress


def test_columns_are_equally_long_whatever_an_epoch_lacks():
    progress = Progress()
    progress.record({"train_loss": 1.0})
    progress.record({"val_loss": 2})
    progress.record({"train_loss": 3.0, "val_loss": 4.0})
    assert progress.epoch == 3
    assert str(progress.history) == str(
        {"train_loss": [1.0, math.nan, 3.0], "val_loss": [math.nan, 2.0, 4.0]}
    )
    assert all(type(x) is float for values in progress.history.values() for x in values)


def test_a_copy_of_the_history_may_be_changed():
    progress = Progress()
    progress.record({"train_loss": 1.0})
    progress.copy_history()["train_loss"].append(2.0)
    progress.state_dict()["history"]["train_loss"].append(2.0)
    assert progress.history == {"train_loss": [1.0]}


def test_the_first_reason_is_kept_until_requests_are_cleared():
    progress = Progress()
    assert not progress.should_stop
    progress.request_stop("first")
    progress.request_stop("second")
    progress.pause_requested = True
    assert progress.should_stop and progress.stop_reason == "first"
    progress.clear_requests()
    assert not progress.should_stop and not progress.pause_requested


def test_a_file_holds_the_numbers_and_no_request():
    progress, other = Progress(), Progress(stop_reason="enough", pause_requested=True)
    progress.record({"train_loss": 1.0})
    progress.global_step = 7
    progress.request_stop("a button")
    other.load_state_dict(progress.state_dict())
    assert (other.epoch, other.global_step, other.history) == (1, 7, {"train_loss": [1.0]})
    assert not other.should_stop and not other.pause_requested
    other.history["train_loss"].append(2.0)
    assert progress.history == {"train_loss": [1.0]}


def test_a_history_shows_its_summary():
    history = History({"train_loss": [2.0, math.nan, 0.5], "<b>": [math.nan], "none": []})
    text, page = pretty(history), history._repr_html_()
    assert "History of 3 epochs" in text and "History of 3 epochs" in page
    assert text.splitlines()[1].split() == ["train_loss", "2", "0.5", "0.5", "2"]
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "History of 1 epoch\n" in pretty(History({"a": [1.0]})).replace(" " * 6, "\n")
