"""The files of a run: what they are called, whose they are, and what a failed write leaves."""

import math
import warnings

import pytest
import torch

from small import make_trainer
from ununennium import CheckpointCallback, CheckpointError
from ununennium.ranks import RankMissing
from ununennium.training import files
from ununennium.training.checkpoint import load_file
from ununennium.training.files import OwnFiles, PendingSave, add_ranked, free_path
from ununennium.training.monitor import Monitor


def test_the_best_come_first_and_nan_is_kept_only_with_all():
    monitor, kept = Monitor("val_IoU", "max", owner="a test"), []
    for score, name in [(0.3, "a"), (math.nan, "b"), (0.5, "c"), (0.5, "d")]:
        kept = add_ranked(kept, score, name, monitor, 2)
    assert kept == [(0.5, "c"), (0.5, "d")]
    (only,) = add_ranked([], math.nan, "b", monitor, -1)
    assert only[1] == "b"


def test_a_free_path_is_found(tmp_path):
    for name in ("a.pt", "a-v1.pt", "a-v2.pt"):
        assert free_path(tmp_path / "a.pt").name == name
        (tmp_path / name).touch()


def test_each_failure_has_its_own_sentence():
    pending = PendingSave("after epoch 3", OwnFiles([]), OwnFiles([]))
    assert "training continues and tries again" in pending.failure(OSError("full"))
    missing = pending.failure(RankMissing("Resume from the last file."))
    assert missing == "There is no checkpoint after epoch 3. Resume from the last file."


def test_a_final_copy_that_fails_is_not_called_a_lost_checkpoint(tmp_path, monkeypatch):
    def full(source, path):
        raise CheckpointError(f"{path} could not be written: No space left on device.")

    monkeypatch.setattr(files, "copy_file", full)
    trainer = make_trainer(callbacks=[CheckpointCallback(tmp_path, "train_loss")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(1)
    message = str(caught[0].message)
    assert "after epoch 1 belongs among the best" in message and "copy last.pt" in message
    assert (tmp_path / "last.pt").exists()


def test_a_copy_that_fails_leaves_last_where_it_is(tmp_path, monkeypatch):
    """The disk has room for one file, and not for that of the best model."""

    def full(source, path):
        raise CheckpointError(f"{path} could not be written: No space left on device.")

    monkeypatch.setattr(files, "copy_file", full)
    trainer = make_trainer(callbacks=[CheckpointCallback(tmp_path, "train_loss")])
    with pytest.warns(UserWarning, match="The best models lack the one after epoch 1") as caught:
        trainer.fit(3)
    assert len(caught) == 2 and "This is failure 2 in a row." in str(caught[1].message)
    (problem,) = trainer.problems
    assert problem.startswith(f"The best models in {tmp_path} lack the one after epoch 3:")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert load_file(tmp_path / "last.pt")["progress"]["epoch"] == 3
    assert trainer.callbacks[0].best_path is None


def test_a_night_with_a_full_disk_does_not_end_as_if_all_were_well(tmp_path, monkeypatch, capsys):
    """One warning in epoch 1 was the only sign, and the folder was empty in the morning."""

    def full(content, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    keep = CheckpointCallback(tmp_path, "train_loss")
    trainer = make_trainer(callbacks=[keep], progress="text")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(6)
    assert len(caught) == 4  # after 1, 2 and 4 failures, and at the end
    (problem,) = trainer.problems
    assert problem == (
        f"Nothing was saved to {tmp_path}: all 6 saves failed. The checkpoint {tmp_path}/last.pt "
        "could not be written: [Errno 28] No space left on device."
    )
    assert capsys.readouterr().out.splitlines()[-1] == problem == keep.problem


def test_a_problem_is_over_when_a_save_succeeds(tmp_path, monkeypatch):
    def full(content, file):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(callbacks=[CheckpointCallback(tmp_path, "train_loss")])
    trainer.fit(2)
    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="The final checkpoint"):
        trainer.fit(1)
    (problem,) = trainer.problems
    assert problem.startswith(f"Nothing was saved to {tmp_path} since the checkpoint after epoch 2")
    monkeypatch.undo()
    trainer.fit(1)
    assert not trainer.problems


def test_what_was_moved_aside_is_told_with_a_line_of_the_user(tmp_path):
    """The thread that writes renamed the file, and the warning named a line of that thread."""
    make_trainer(callbacks=[CheckpointCallback(tmp_path, "train_loss")]).fit(1)
    trainer = make_trainer(callbacks=[CheckpointCallback(tmp_path, "train_loss")])
    with pytest.warns(UserWarning, match=r"of an earlier run was moved to last-old1\.pt") as caught:
        trainer.fit(1)
    assert caught[0].filename == __file__


def test_a_rank_that_failed_is_no_problem_of_the_files(tmp_path):
    failures = files.Failures(tmp_path)
    pending = PendingSave("after epoch 3", OwnFiles([]), OwnFiles([]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            failures.add(pending, RankMissing("Resume from the last file."))
    assert len(caught) == 1 and failures.problem is None
