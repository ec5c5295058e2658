"""Which file of a folder a run continues from, and what is said about it."""

import warnings

import pytest
import torch

from small import At, make_trainer, small_net, stop
from ununennium import CheckpointError, EarlyStopping
from ununennium.training.checkpoint import save_file
from ununennium.training.resuming import load_complete, resume
from ununennium.training.saving import run_state


def make_run(stops=True):
    """A trainer, stopped in the middle of its second epoch."""
    callbacks = [EarlyStopping("train_loss", 9), At("on_batch_end", 8, stop)][: 1 + stops]
    return make_trainer(model=small_net(), epochs=3, callbacks=callbacks)


def test_resume_announces_what_it_found(tmp_path):
    stopped = make_run()
    stopped.fit()
    said, trainer = [], make_run(stops=False)
    assert resume(trainer.run, tmp_path, said.append) is None
    path = save_file(run_state(stopped.run), tmp_path / "a.pt")
    assert resume(trainer.run, tmp_path, said.append) == path
    assert said == [
        f"No checkpoint in {tmp_path}; starting from scratch.",
        f"Resuming from {path} (batch 2 of epoch 2, step 8).",
    ]


def test_the_last_file_wins_if_it_is_further_on(tmp_path):
    """A copy made later has a later date, and less progress."""
    trainer = make_run(stops=False)
    trainer.fit(2)
    last = trainer.save_checkpoint(tmp_path / "last.pt")
    early = make_run(stops=False)
    early.fit(1)
    early.save_checkpoint(tmp_path / "copy.pt")
    assert resume(make_run().run, tmp_path, print) == last


def test_a_file_without_its_shards_is_refused(tmp_path):
    path = save_file({"model": {}, "shards": "step=000003.shards"}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="step=000003.shards is missing or damaged"):
        load_complete(path)


def test_a_changed_learning_rate_is_told_when_a_run_resumes(tmp_path, capsys):
    """The new script had another rate, which is used, and nothing said so."""
    make = lambda rate, **more: make_trainer(
        optimizer=lambda p: torch.optim.AdamW(p, lr=rate, **more), progress="text"
    )
    first = make(0.02)
    first.fit(1)
    first.save_checkpoint(tmp_path / "last.pt")
    for parts, said in (
        ({"rate": 0.02}, ""),
        ({"rate": 0.02, "foreach": True}, ""),
        ({"rate": 0.001}, " AdamW goes on with lr=0.001 instead of 0.02, as it was built here."),
        ({"rate": 0.02, "weight_decay": 0.5}, "weight_decay=0.5 instead of 0.01"),
    ):
        trainer = make(**parts)
        trainer.resume(tmp_path)
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"Resuming from {tmp_path / 'last.pt'} (after epoch 1, step ")
        assert said in line and ("goes on with" in line) == bool(said)
        assert trainer.optimizer.param_groups[0]["lr"] == parts["rate"]


def test_a_damaged_last_file_is_left_out_without_a_word_that_nothing_was_loaded(tmp_path):
    stopped = make_run()
    stopped.fit()
    previous = stopped.save_checkpoint(tmp_path / "previous.pt")
    damaged = stopped.save_checkpoint(tmp_path / "last.pt")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    trainer = make_run(stops=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert resume(trainer.run, tmp_path, print) == previous
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith("last.pt is left out, and the next newest file is tried.")
    assert "loaded" not in text and "another file" not in text and trainer.global_step == 8
