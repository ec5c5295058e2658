"""Early stopping; which checkpoint files are written, kept, and left alone."""

import inspect
import math
import shutil
import warnings

import pytest
import torch

from small import AtStep, make_batches, make_trainer
from ununennium import Callback, CheckpointCallback, CheckpointError, EarlyStopping
from ununennium.training import checkpoint

# Early stopping.


def test_a_first_score_of_nan_is_no_reference():
    stopping = EarlyStopping("val_loss", patience=2)
    trainer = make_trainer(val=make_batches(1))
    stopping.on_train_start(trainer)
    for epoch, score in enumerate([math.nan, 0.5, math.nan, 0.4, 0.4, 0.4]):
        assert not trainer.should_stop
        stopping.on_scores(trainer, epoch, {"val_loss": score})
    assert trainer.should_stop and stopping.best == 0.4


# Where files are kept.


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


class Scores:
    """Runs a CheckpointCallback over given scores, without training."""

    is_main, clock = True, 0.0

    def __init__(self, callback, scores, name="val_IoU"):
        self.epoch = self.global_step = self.batch = 0
        self.val_loader, self.directions = (), {}
        self.callback = callback
        callback.on_train_start(self)
        for epoch, score in enumerate(scores):
            callback.on_scores(self, epoch, {name: score})
            callback.on_epoch_end(self, epoch, {name: score})
        callback.on_train_end(self)

    def any_rank(self, flag):
        return flag

    def save_in_background(self, path, **options):
        state = {"model": {}, "of": self.callback.state_dict()}
        return checkpoint.save_in_background(state, path, **options)


@pytest.mark.parametrize(
    ("top_k", "scores", "expected"),
    [
        (1, [0.2, 0.5, 0.4], ["epoch=002-val_IoU=0.5000.pt"]),
        (1, [0.0, 0.0], ["epoch=001-val_IoU=0.0000.pt"]),
        (1, [math.nan, math.nan], []),
        (2, [0.1, math.nan, 0.3, 0.2], ["epoch=003-val_IoU=0.3000.pt",
                                        "epoch=004-val_IoU=0.2000.pt"]),
        (0, [0.1, 0.2], []),
        (-1, [0.1, math.nan, 0.1], ["epoch=001-val_IoU=0.1000.pt", "epoch=002-val_IoU=nan.pt",
                                    "epoch=003-val_IoU=0.1000.pt"]),
    ],
)  # fmt: skip
def test_the_best_files_are_kept(tmp_path, top_k, scores, expected):
    callback = CheckpointCallback(tmp_path, "val_IoU", "max", save_top_k=top_k)
    Scores(callback, scores)
    assert kept(tmp_path) == sorted([*expected, "last.pt", "previous.pt"])
    if expected and top_k > 0:
        assert callback.best_score == max(score for score in scores if not math.isnan(score))


def test_another_run_in_the_same_folder_deletes_and_overwrites_nothing(tmp_path):
    (tmp_path / "notes.pt").write_bytes(b"mine")
    Scores(CheckpointCallback(tmp_path, "val_IoU", "max"), [0.5])
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.warns(UserWarning, match="was moved to last-old1.pt"):
        Scores(CheckpointCallback(tmp_path, "val_IoU", "max"), [0.5, 0.6])
    now = [path.read_bytes() for path in tmp_path.iterdir()]
    assert all(content in now for content in first.values())
    assert kept(tmp_path) == [
        "epoch=001-val_IoU=0.5000.pt", "epoch=002-val_IoU=0.6000.pt",
        "last-old1.pt", "last.pt", "notes.pt", "previous.pt",
    ]  # fmt: skip


def test_a_failed_write_leaves_earlier_files_alone(tmp_path, monkeypatch):
    """When writing fails, earlier files stay, and training continues with one warning per epoch."""
    callback = CheckpointCallback(tmp_path, "val_IoU", "max")
    trainer = Scores(callback, [0.5])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    callback.on_epoch_end(trainer, 1, {"val_IoU": 0.9})
    with pytest.warns(UserWarning, match="final checkpoint, after epoch 2, .* No space left"):
        callback.on_train_end(trainer)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert callback.best_score == 0.5


def test_a_folder_deleted_in_mid_run(tmp_path):
    class Vandal:
        def on_epoch_end(self, trainer, epoch, logs):
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    callbacks = [CheckpointCallback(tmp_path / "run", "train_loss"), Vandal()]
    trainer = make_trainer(callbacks=callbacks)
    trainer.fit(3)
    assert trainer.epoch == 3


def test_an_unwritable_folder_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = make_trainer(callbacks=[CheckpointCallback(tmp_path / "file" / "run", "train_loss")])
    with warnings.catch_warnings():  # nothing is tried at the end of what did not begin
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="cannot be written .* Nothing was trained"):
            trainer.fit(1)
    assert trainer.global_step == 0
    with pytest.raises(CheckpointError, match="could not be written"):
        trainer.save_checkpoint(tmp_path / "file" / "a.pt")
    trainer.callbacks.clear()
    trainer.fit(1)


def test_the_last_file_is_there_even_if_nothing_is_best(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(callbacks=[CheckpointCallback(tmp_path, "train_loss", save_top_k=0)]).fit(2)
    assert kept(tmp_path) == ["last.pt", "previous.pt"]


def test_nan_is_never_the_best_of_all(tmp_path):
    callback = CheckpointCallback(tmp_path, "val_loss", save_top_k=-1)
    trainer = make_trainer(callbacks=[callback])
    for epoch, score in enumerate([math.nan, 0.5, 0.4]):
        callback.on_scores(trainer, epoch, {"val_loss": score})
        callback.on_epoch_end(trainer, epoch, {"val_loss": score})
    assert callback.best_score == 0.4 and "0.4000" in callback.best_path.name


def test_a_best_file_that_is_gone_is_forgotten(tmp_path):
    callback = CheckpointCallback(tmp_path, "train_loss")
    trainer = make_trainer(callbacks=[callback], optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer.fit(1)
    callback.best_path.unlink()
    trainer.fit(1)
    assert callback.best_path.is_file()


def test_settings_of_a_checkpoint_callback_are_checked(tmp_path):
    bad = [("steps", "5"), ("steps", 2.5), ("steps", True), ("steps", 0), ("min", "5"), ("min", 0)]
    names = {"steps": "every_n_steps", "min": "every_minutes"}
    for name, value in bad:
        error, rule = TypeError if value != 0 else ValueError, "whole number, 1 or more"
        with pytest.raises(
            error,
            match=rf"{names[name]}={value!r} must be a "
            rf"({rule}|number, more than 0)\.\nNone turns it off",
        ):
            CheckpointCallback(tmp_path, **{names[name]: value})


@pytest.mark.parametrize(
    ("top_k", "error"), [(-2, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)]
)
def test_how_many_to_keep_is_checked(tmp_path, top_k, error):
    with pytest.raises(error, match="save_top_k=.* whole number, -1 or more.*\n-1 keeps all"):
        CheckpointCallback(tmp_path, save_top_k=top_k)


@pytest.mark.parametrize(
    ("patience", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_patience_is_checked(patience, error):
    with pytest.raises(error, match="EarlyStopping: patience=.* whole number, 1 or more"):
        EarlyStopping(patience=patience)


def test_the_default_mode_is_min_and_no_choice(tmp_path):
    default = inspect.signature(CheckpointCallback).parameters["mode"].default
    assert default == "min" and repr(default) == "'min'" and isinstance(default, str)
    assert CheckpointCallback(tmp_path).monitor.mode == "min"
    assert CheckpointCallback(tmp_path, "val_quality").monitor.mode == "auto"
    assert CheckpointCallback(tmp_path, "val_quality", "min").monitor.mode == "min"
    for mode in ({}, {"mode": "min"}):
        with pytest.raises(ValueError, match="would keep the worst model") as told:
            CheckpointCallback(tmp_path, "val_IoU", **mode)
        assert ("mode='min'" in str(told.value)) == bool(mode)


def full_disk(content, file):
    raise OSError(28, "No space left on device")


class FullFrom(Callback):
    """Fill the disk at a step."""

    def __init__(self, step, monkeypatch):
        self.step, self.monkeypatch = step, monkeypatch

    def on_batch_end(self, trainer, batch, logs):
        if trainer.global_step >= self.step:
            self.monkeypatch.setattr(torch, "save", full_disk)


def warnings_of(trainer, epochs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(epochs)
    return [str(warning.message) for warning in caught]


def test_a_final_save_that_fails_says_what_to_do(tmp_path, monkeypatch):
    """It once promised that the next save would try again; there is no next one."""
    stop = type("Stop", (), {"on_batch_end": lambda s, t, b, logs: t.request_stop("enough")})()
    keep = CheckpointCallback(tmp_path / "run", "train_loss")
    trainer = make_trainer(callbacks=[stop, FullFrom(1, monkeypatch), keep])
    (message,) = warnings_of(trainer, 1)
    assert message.startswith("The final checkpoint, after step 1, could not be written.")
    assert "trainer.save_checkpoint(path)" in message and "No space left" in message
    assert "continues" not in message
    monkeypatch.undo()
    trainer.save_checkpoint(tmp_path / "elsewhere.pt")
    assert torch.load(tmp_path / "elsewhere.pt")["progress"]["global_step"] == 1


def test_a_final_failure_is_reported_although_an_earlier_one_was(tmp_path, monkeypatch):
    keep = CheckpointCallback(tmp_path, "train_loss")
    trainer = make_trainer(callbacks=[FullFrom(1, monkeypatch), keep])
    first, second, last = warnings_of(trainer, 4)
    assert "This is failure 2 in a row." in second
    assert first.startswith("There is no checkpoint after epoch 1; training continues and tries")
    assert last.startswith("The final checkpoint, after epoch 4, could not be written.")


def test_files_that_fall_out_of_the_ranking_go_after_a_resume_with_fewer(tmp_path):
    first = CheckpointCallback(tmp_path, "val_IoU", "max", save_top_k=3)
    Scores(first, [0.1, 0.2, 0.3])
    second = CheckpointCallback(tmp_path, "val_IoU", "max", save_top_k=1)
    run = Scores(second, [])
    second.load_state_dict(first.state_dict())
    second.on_epoch_end(run, 3, {"val_IoU": 0.25})
    second.on_train_end(run)
    assert kept(tmp_path) == ["epoch=003-val_IoU=0.3000.pt", "last.pt", "previous.pt"]


# When files are written.


def test_a_file_is_written_every_few_minutes(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("ununennium.training.lockstep.time.monotonic", lambda: clock[0])
    written = []
    keep = CheckpointCallback(tmp_path, "train_loss", every_minutes=1)

    class Clock(AtStep):
        def on_safepoint(self, trainer, phase):
            clock[0] += 25
            written.append(keep.files.saved_step)

    make_trainer(make_batches(10), callbacks=[keep, Clock(0, None)]).fit(1)
    assert written == [0, 0, 0, 4, 4, 4, 7, 7, 7, 10]


def test_intervals_read_the_step_count_only_when_they_may_have_passed(tmp_path):
    class Counted:
        reads, epoch, batch, val_loader = 0, 1, 0, None
        is_main, clock, any_rank = True, 0.0, bool

        @property
        def global_step(self):
            self.reads += 1
            return self.reads

    keep = CheckpointCallback(tmp_path, "train_loss", every_n_steps=1000, every_minutes=60)
    trainer = Counted()
    keep.on_train_start(trainer)
    trainer.reads = 0
    for _ in range(900):
        keep.on_safepoint(trainer, "train")
        keep.on_safepoint(trainer, "validate")
    assert trainer.reads == 0
