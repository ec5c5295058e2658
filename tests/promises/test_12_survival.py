"""12 · Survival: a run that is killed at any moment leaves a file that `resume` finds."""

import os
import random
import re
import signal
import time
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from small import AtStep, make_batches, make_trainer, start_process
from ununennium import Callback, CheckpointCallback, CheckpointError, Trainer, TrainerConfig


def trainer_of_many(folder, **options):
    """A run that spends most of its time writing."""
    model = nn.Sequential(nn.Conv2d(4, 400, 3), nn.Conv2d(400, 100, 3), nn.Conv2d(100, 3, 1))
    batches = [(image, mask[:, 2:-2, 2:-2]) for image, mask in make_batches(4)]
    keep = CheckpointCallback(folder, "train_loss", save_top_k=1, every_n_steps=1, **options)
    return make_trainer(batches, model=model, callbacks=[keep])


KILLS = int(os.environ.get("SURVIVAL_KILLS", 24))


def train_until_killed(folder):
    torch.set_num_threads(1)
    trainer = trainer_of_many(folder)
    trainer.resume(folder)
    (folder.parent / "ready").write_text("")
    trainer.fit(10_000)


@pytest.mark.slow
def test_a_run_survives_kills_at_random_moments(tmp_path):
    """Every time there are only whole files, and the next process continues from the newest."""
    folder, ready, draw, steps = tmp_path / "run", tmp_path / "ready", random.Random(0), [0]
    reader = trainer_of_many(tmp_path / "reader")
    for kill in range(KILLS):
        process = start_process(train_until_killed, folder)
        while not ready.exists():
            time.sleep(0.005)
        ready.unlink()
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if files := list(folder.glob("*.pt")):
            for path in files:
                reader.load_checkpoint(path)
            reader.resume(folder)
            steps.append(reader.global_step)
        assert kill < 20 or steps[-1] > 0
    assert steps == sorted(steps) and steps[-1] > KILLS
    assert {path.suffix for path in folder.iterdir()} <= {".pt", ".tmp"}
    trainer = trainer_of_many(folder)
    trainer.resume(folder)
    trainer.fit(2)  # of the first, all batches may be done
    assert trainer.global_step > steps[-1]


def saved_run(folder):
    keep = CheckpointCallback(folder, "train_loss", every_n_steps=1)
    trainer = make_trainer(make_batches(4), callbacks=[keep])
    trainer.fit(2)
    return trainer


def test_what_a_killed_process_left_is_removed(tmp_path):
    old, new = tmp_path / ".last.pt.1.tmp", tmp_path / ".last.pt.2.tmp"
    old.write_bytes(b"half")
    new.write_bytes(b"being written")
    os.utime(old, (1, 1))
    saved_run(tmp_path)
    assert new.exists() and not old.exists()


def test_a_stop_in_the_middle_of_an_epoch_is_saved(tmp_path):
    keep = CheckpointCallback(tmp_path, "train_loss")
    stop = AtStep(3, lambda trainer: trainer.request_stop("enough"))
    make_trainer(make_batches(6), callbacks=[stop, keep]).fit(2)
    trainer = make_trainer(make_batches(6))
    assert trainer.resume(tmp_path) == tmp_path / "last.pt"
    assert (trainer.epoch, trainer.batch, trainer.global_step) == (0, 3, 3)


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_is_saved_at_an_exception_unless_switched_off(tmp_path, saves):
    def fail(trainer):
        raise RuntimeError("broken")

    keep = CheckpointCallback(tmp_path, "train_loss", save_on_exception=saves)
    trainer = make_trainer(make_batches(6), callbacks=[AtStep(3, fail), keep])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(2)
    assert (tmp_path / "last.pt").exists() == saves


# Which file.


def test_a_damaged_newest_file_falls_back_to_the_one_before(tmp_path, capsys):
    saved_run(tmp_path)
    last = tmp_path / "last.pt"
    for damaged in tmp_path.glob("*.pt"):
        if damaged.name != "previous.pt":
            damaged.write_bytes(damaged.read_bytes()[:-200])
    os.utime(tmp_path / "previous.pt", (1, 1))
    trainer = make_trainer(make_batches(4), progress="text")
    with pytest.warns(UserWarning, match=r"last.pt is damaged"):
        path = trainer.resume(tmp_path)
    assert path == tmp_path / "previous.pt" and trainer.global_step == 8 and last.exists()
    assert f"Resuming from {path} (batch 4 of epoch 2, step 8)." in capsys.readouterr().out


def test_damaged_files_alone_are_an_error_and_no_file_is_a_fresh_start(tmp_path, capsys):
    trainer = make_trainer(progress="text")
    assert trainer.resume(tmp_path / "nothing") is None
    assert "No checkpoint in" in capsys.readouterr().out
    (tmp_path / "last.pt").write_bytes(b"rubbish")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="last.pt"),
    ):
        trainer.resume(tmp_path)


def test_the_most_advanced_file_is_resumed_not_the_latest_copy(tmp_path):
    saved_run(tmp_path)
    early = make_trainer(make_batches(4))
    early.fit(1)
    early.save_checkpoint(tmp_path / "epoch=001.pt")
    trainer = make_trainer(make_batches(4))
    assert trainer.resume(tmp_path) == tmp_path / "last.pt" and trainer.epoch == 2


def test_files_that_were_moved_aside_are_the_last_resort(tmp_path):
    saved_run(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(f"{path.stem}-old1.pt"))
    trainer = make_trainer(make_batches(4))
    assert "old1" in trainer.resume(tmp_path).name and trainer.epoch == 2


def test_a_file_of_another_model_is_refused_not_skipped(tmp_path):
    saved_run(tmp_path)
    other = make_trainer(make_batches(4, classes=2), model=nn.Conv2d(4, 2, 1))
    with pytest.raises(CheckpointError, match="holds another model"):
        other.resume(tmp_path)


def test_resume_takes_a_folder(tmp_path):
    saved_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a file. Pass its folder, or load_checkpoint\("):
        make_trainer().resume(tmp_path / "last.pt")


# Disks.


def epochs_in(path):
    """Load a file, which has to be whole, and return how many epochs are in it."""
    trainer = make_trainer()
    trainer.load_checkpoint(path)
    return trainer.epoch


def test_a_full_disk_is_told_again_and_the_last_good_file_is_intact(tmp_path, monkeypatch):
    keep = CheckpointCallback(tmp_path, "train_loss", every_n_steps=1)
    trainer = make_trainer(make_batches(4), callbacks=[keep])
    trainer.fit(1)
    good = (tmp_path / "last.pt").read_bytes()
    save = torch.save

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="No space left") as caught:
        trainer.fit(2)
    during, *later, final = [str(w.message) for w in caught if "checkpoint" in str(w.message)]
    assert during.startswith("There is no checkpoint after step") and "continues" in during
    counts = [int(re.search(r"failure (\d+) in a row", text).group(1)) for text in later]
    assert counts == [2, 4, 8] and all("No space left" in text for text in later)
    assert final.startswith("The final checkpoint, after epoch 3, could not be written.")
    (problem,) = trainer.problems
    assert problem.startswith(f"Nothing was saved to {tmp_path} since the checkpoint after")
    assert trainer.epoch == 3 and (tmp_path / "last.pt").read_bytes() == good
    assert not list(tmp_path.glob(".*.tmp"))
    monkeypatch.setattr(torch, "save", save)
    trainer.fit(1)
    assert epochs_in(tmp_path / "last.pt") == 4 and not trainer.problems


def test_a_folder_that_is_deleted_in_mid_run_is_created_again(tmp_path):
    import shutil

    keep = CheckpointCallback(tmp_path / "run", "train_loss")
    wipe = AtStep(6, lambda trainer: shutil.rmtree(tmp_path / "run", ignore_errors=True))
    make_trainer(make_batches(4), callbacks=[wipe, keep]).fit(3)
    assert epochs_in(keep.best_path) == epochs_in(tmp_path / "run" / "last.pt") == 3


def test_training_continues_while_a_file_is_written(tmp_path, monkeypatch):
    """A slow disk holds up the next file, not the steps."""
    save, steps = torch.save, []
    trainer = make_trainer(
        make_batches(8), callbacks=[CheckpointCallback(tmp_path, "train_loss", every_n_steps=4)]
    )

    def slow(content, file):
        before, end = content["progress"]["global_step"], time.monotonic() + 10  # of the copy
        while not steps and trainer.global_step == before and time.monotonic() < end:
            time.sleep(0.005)
        steps.append(trainer.global_step - before)
        save(content, file)

    monkeypatch.setattr(torch, "save", slow)
    trainer.fit(1)
    assert steps[0] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert epochs_in(tmp_path / "last.pt") == 1


class Beacon(Callback):
    """Tells how far a run is, and slows it down."""

    def __init__(self, path):
        self.path = path

    def on_safepoint(self, trainer, phase):
        if phase == "train":
            self.path.write_text(str(trainer.global_step))
            time.sleep(0.2)


def train_with_workers(folder, beacon):
    os.setsid()  # its workers are in its process group, and nobody else
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(400, 4), torch.randn(400, 1))
    loader = DataLoader(data, 2, num_workers=2, multiprocessing_context="fork")  # its children
    model = nn.Linear(4, 1)
    keep = CheckpointCallback(folder, "train_loss", save_on_exception=False)
    callbacks = [keep, Beacon(beacon)]
    config = TrainerConfig(device="cpu", progress="none")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), loader, callbacks=callbacks, config=config)
    trainer.fit()


def test_a_signal_to_all_processes_of_a_job_leaves_its_workers_to_the_last_step(tmp_path):
    """Schedulers and torchrun end jobs in this way. Without its workers, a run failed unsaved."""
    folder, beacon = tmp_path / "run", tmp_path / "beacon"
    process = start_process(train_with_workers, folder, beacon)
    while not beacon.exists() or beacon.read_text() != "3":
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == -signal.SIGTERM
    saved = torch.load(folder / "last.pt")
    assert saved["progress"]["global_step"] == int(beacon.read_text()) in (3, 4)
