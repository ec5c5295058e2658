"""What ends a run from outside, at any moment; and `resume` after it."""

import os
import random
import signal
import time
import warnings
import zipfile

import pytest
import torch
from torch import nn

from conftest import make_batches, make_trainer, start_process
from ununennium import CheckpointCallback
from ununennium.training.checkpoint import CheckpointError, load_file, newest_first, save_file

KILLS = int(os.environ.get("SURVIVAL_KILLS", 40))


def trainer_of_many(folder, **options):
    """A run that spends most of its time writing."""
    model = nn.Sequential(nn.Conv2d(4, 400, 3), nn.Conv2d(400, 100, 3), nn.Conv2d(100, 3, 1))
    batches = [(image, mask[:, 2:-2, 2:-2]) for image, mask in make_batches(4)]
    keep = CheckpointCallback(folder, "train_loss", save_top_k=1, every_n_steps=1, **options)
    return make_trainer(batches, model=model, callbacks=[keep])


def train_until_killed(folder):
    torch.set_num_threads(1)
    trainer = trainer_of_many(folder)
    trainer.resume(folder)
    (folder.parent / "ready").write_text("")
    trainer.fit(10_000)


def test_killed_at_random_moments(tmp_path):
    """Every time there is a whole file, and the next process goes on from it."""
    folder, ready, draw, steps = tmp_path / "run", tmp_path / "ready", random.Random(0), [0]
    for kill in range(KILLS):
        process = start_process(train_until_killed, folder)
        while not ready.exists():
            time.sleep(0.005)
        ready.unlink()
        time.sleep(draw.uniform(0.0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if files := newest_first(folder) if folder.exists() else []:
            steps.append(load_file(files[0])["progress"]["global_step"])
            for path in files:
                load_file(path)
        assert kill < 5 or steps[-1] > 0
    assert steps == sorted(steps) and steps[-1] > KILLS
    assert {path.suffix for path in folder.iterdir()} <= {".pt", ".tmp"}
    trainer = trainer_of_many(folder)
    trainer.resume(folder)
    trainer.fit(2)  # of the first, all batches may be done
    assert trainer.global_step > steps[-1]


def saved_run(folder, steps=6):
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


def test_a_damaged_newest_file_falls_back_to_the_one_before(tmp_path, capsys):
    saved_run(tmp_path)
    last = tmp_path / "last.pt"
    for damaged in newest_first(tmp_path):
        if damaged.name != "previous.pt":
            damaged.write_bytes(damaged.read_bytes()[:-200])
    os.utime(tmp_path / "previous.pt", (1, 1))
    trainer = make_trainer(make_batches(4), progress="text")
    with pytest.warns(UserWarning, match=r"last.pt is damaged"):
        path = trainer.resume(tmp_path)
    assert path == tmp_path / "previous.pt" and trainer.global_step == 8 and last.exists()
    assert f"Resuming from {path} (batch 4 of epoch 2, step 8)." in capsys.readouterr().out


def test_only_damaged_files_are_an_error_and_none_is_a_beginning(tmp_path, capsys):
    trainer = make_trainer(progress="text")
    assert trainer.resume(tmp_path / "nothing") is None
    assert "No checkpoint in" in capsys.readouterr().out
    (tmp_path / "last.pt").write_bytes(b"rubbish")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="last.pt"),
    ):
        trainer.resume(tmp_path)


def test_resume_of_another_model_is_refused_not_skipped(tmp_path):
    saved_run(tmp_path)
    other = make_trainer(make_batches(4, classes=2), model=nn.Conv2d(4, 2, 1))
    with pytest.raises(CheckpointError, match="holds another model"):
        other.resume(tmp_path)


def test_a_stop_in_the_middle_of_an_epoch_is_saved(tmp_path):
    from test_continuation import At

    keep = CheckpointCallback(tmp_path, "train_loss")
    stop = At(3, lambda trainer: trainer.request_stop("enough"))
    make_trainer(make_batches(6), callbacks=[stop, keep]).fit(2)
    trainer = make_trainer(make_batches(6))
    assert trainer.resume(tmp_path) == tmp_path / "last.pt"
    assert (trainer.epoch, trainer.batch, trainer.global_step) == (0, 3, 3)


@pytest.mark.parametrize("saves", [True, False])
def test_an_exception_is_saved_unless_not_wanted(tmp_path, saves):
    from test_continuation import At

    def fail(trainer):
        raise RuntimeError("broken")

    keep = CheckpointCallback(tmp_path, "train_loss", save_on_exception=saves)
    trainer = make_trainer(make_batches(6), callbacks=[At(3, fail), keep])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(2)
    assert (tmp_path / "last.pt").exists() == saves


def test_every_minutes(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("ununennium.training.callbacks.time.monotonic", lambda: clock[0])
    written = []
    keep = CheckpointCallback(tmp_path, "train_loss", every_minutes=1)

    from test_continuation import At

    class Clock(At):
        def on_safepoint(self, trainer, phase):
            clock[0] += 25
            written.append(keep.files.saved_step)

    make_trainer(make_batches(10), callbacks=[keep, Clock(0, None)]).fit(1)
    assert written == [0, 0, 0, 4, 4, 4, 7, 7, 7, 10]


def test_a_full_disk_is_told_once_and_the_last_good_file_is_intact(tmp_path, monkeypatch):
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
    during, final = [str(w.message) for w in caught if "checkpoint" in str(w.message)]
    assert during.startswith("There is no checkpoint after step") and "continues" in during
    assert final.startswith("The final checkpoint, after epoch 3, could not be written.")
    assert trainer.epoch == 3 and (tmp_path / "last.pt").read_bytes() == good
    assert not list(tmp_path.glob(".*.tmp"))
    monkeypatch.setattr(torch, "save", save)
    trainer.fit(1)
    assert load_file(tmp_path / "last.pt")["progress"]["epoch"] == 4


def test_a_folder_that_is_deleted_in_mid_run_is_made_again(tmp_path):
    import shutil

    from test_continuation import At

    keep = CheckpointCallback(tmp_path / "run", "train_loss")
    wipe = At(6, lambda trainer: shutil.rmtree(tmp_path / "run", ignore_errors=True))
    make_trainer(make_batches(4), callbacks=[wipe, keep]).fit(3)
    assert load_file(keep.best_path) and load_file(tmp_path / "run" / "last.pt")


def test_training_goes_on_while_a_file_is_written(tmp_path, monkeypatch):
    """A slow disk holds up the next file, not the steps."""
    save, steps = torch.save, []
    trainer = make_trainer(
        make_batches(8), callbacks=[CheckpointCallback(tmp_path, "train_loss", every_n_steps=4)]
    )

    def slow(content, file):
        before = trainer.global_step
        time.sleep(0.3)
        steps.append(trainer.global_step - before)
        save(content, file)

    monkeypatch.setattr(torch, "save", slow)
    trainer.fit(1)
    assert steps[0] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_file(tmp_path / "last.pt")["progress"]["epoch"] == 1


def test_a_copy_that_fails_leaves_last_where_it_is(tmp_path, monkeypatch):
    """The disk has room for one file, and not for that of the best model."""

    def full(source, path):
        raise CheckpointError(f"{path} could not be written: No space left on device.")

    monkeypatch.setattr("ununennium.training.callbacks.copy_file", full)
    trainer = make_trainer(callbacks=[CheckpointCallback(tmp_path, "train_loss")])
    with pytest.warns(UserWarning, match="The best models lack the one after epoch 1") as caught:
        trainer.fit(3)
    assert len(caught) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert load_file(tmp_path / "last.pt")["progress"]["epoch"] == 3
    assert trainer.callbacks[0].best_path is None


def test_a_folder_that_was_moved_is_still_the_run_s(tmp_path):
    first = make_trainer(callbacks=[CheckpointCallback(tmp_path / "a", "train_loss")])
    first.fit(2)
    best = first.callbacks[0].best_score
    (tmp_path / "a").rename(tmp_path / "b")
    keep = CheckpointCallback(tmp_path / "b", "train_loss")
    second = make_trainer(callbacks=[keep])
    second.resume(tmp_path / "b")
    assert keep.best_score == best and keep.best_path.exists()
    for group in second.optimizer.param_groups:
        group["lr"] = 50.0
    second.fit(1)
    assert keep.best_score == best
    assert len(list((tmp_path / "b").iterdir())) == 3  # last, previous, the best


def test_resume_takes_a_folder(tmp_path):
    saved_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a file. Pass its folder, or load_checkpoint\("):
        make_trainer().resume(tmp_path / "last.pt")


def test_a_copied_file_is_not_newer_than_what_is_further_on(tmp_path):
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


def hang(folder):
    class Hanging(list):
        def __getitem__(self, index):
            (folder / "ready").write_text("")
            time.sleep(60)

        def __iter__(self):
            yield self[0]

    make_trainer(Hanging([1])).fit(1)


def test_the_second_request_to_terminate_is_obeyed_at_once(tmp_path):
    process = start_process(hang, tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.terminate()
    time.sleep(0.2)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


# A thousand ways to spoil a file.


def spoil(data, draw):
    data, kind = bytearray(data), draw.randrange(4)
    if kind == 0:
        for _ in range(draw.choice([1, 1, 8])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[draw.randrange(len(data)) :]
    elif kind == 2:
        at = draw.randrange(len(data))
        data[at : at + draw.randrange(1, 2000)] = b""
    else:
        at = draw.randrange(len(data))
        data[at : at + 100] = draw.randbytes(100)
    return bytes(data)


def spoil_content(state, draw):
    """Remove a field, or give it another type, shape or value, somewhere in the state."""
    holder, key = state, draw.choice(list(state))
    while draw.random() < 0.7 and isinstance(holder[key], (dict, list)) and holder[key]:
        holder = holder[key]
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    other = draw.choice([None, "text", -1, [], {}, torch.zeros(2, 3), "gone"])
    if other == "gone" if isinstance(other, str) else False:
        del holder[key]
    else:
        holder[key] = other
    return state


def spoil_pickle(source, path, draw):
    """Change the structure that tensors are put together by, as somebody would who means harm."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, spoil(data, draw) if name.endswith("data.pkl") else data)


def whole_state(trainer):
    from test_continuation import outcome

    place = (trainer.epoch, trainer.batch, trainer.stop_reason)
    return {name: part for name, part in outcome(trainer).items() if name != "random"} | {
        "place": place
    }


@pytest.mark.parametrize("part", range(10))
def test_a_spoiled_file_is_loaded_right_or_refused(tmp_path, part):
    """A hundred times: training goes on from it, or a `CheckpointError` and nothing has changed."""
    from test_continuation import assert_same

    def make():
        return make_trainer(
            make_batches(4),
            make_batches(1),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        )

    writer = make()
    writer.fit(1)
    good = writer.save_checkpoint(tmp_path / "good.pt")
    draw, bad, refused = random.Random(part), tmp_path / "bad.pt", 0
    for number in range(100):
        trainer, problem, forged = make(), None, False
        if number % 3 == 0:
            bad.write_bytes(spoil(good.read_bytes(), draw))
        elif number % 3 == 1:
            spoil_pickle(good, bad, draw)
        else:
            content = spoil_content(torch.load(good, weights_only=True), draw)
            forged = number % 2
            if forged:  # its checksum is right
                content.pop("checksum", None)
                save_file(content, bad)
            else:
                torch.save(content, bad)
        before = whole_state(trainer)
        try:
            trainer.load_checkpoint(bad)
        except CheckpointError as error:
            problem = str(error)
        if problem is None:
            if number % 3 < 2:  # a byte that means nothing
                assert_same(whole_state(writer), whole_state(trainer))
            if not forged:
                trainer.fit(1)
        else:
            refused += 1
            assert problem.count(".") >= 2, problem  # sentences
            assert_same(before, whole_state(trainer))
    assert refused > 50
