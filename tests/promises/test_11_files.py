"""11 · Files: whole or not at all, checked, read without running code; a misfit changes nothing."""

import contextlib
import pickle
import random
import warnings
import zipfile

import pytest
import torch
from torch.optim import lr_scheduler

from small import (
    SCHEDULERS,
    At,
    Hostile,
    assert_same,
    forge,
    make_batches,
    make_trainer,
    outcome,
    same_history,
    same_state,
    small_net,
    stop,
)
from ununennium import Callback, CheckpointCallback, CheckpointError, EarlyStopping

# State from the file, settings from the user.


def test_settings_come_from_the_caller(tmp_path):
    first = make_trainer(scheduler=SCHEDULERS["step"], callbacks=[EarlyStopping("train_loss", 9)])
    first.fit(2)  # the rate is now 0.3 of 0.02
    path = first.save_checkpoint(tmp_path / "a.pt")
    schedulers = []
    second = make_trainer(
        scheduler=lambda o: (
            schedulers.append(lr_scheduler.StepLR(o, 7, gamma=0.3)) or schedulers[0]
        ),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
        callbacks=[EarlyStopping("train_loss", 4)],
    )
    second.load_checkpoint(path)
    group = second.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.003) and group["weight_decay"] == 0.5
    assert schedulers[0].step_size == 7 and schedulers[0].last_epoch == 2
    assert second.callbacks[0].patience == 4 and second.callbacks[0].best is not None


def test_a_load_replaces_an_open_epoch(tmp_path):
    trainer = make_trainer()
    trainer.fit(1)
    path = trainer.save_checkpoint(tmp_path / "a.pt")
    trainer.callbacks.append(
        type("S", (), {"on_batch_end": lambda s, t, b, logs: t.request_stop("x")})()
    )
    trainer.fit(1)
    assert trainer.batch == 1
    half = trainer.save_checkpoint(tmp_path / "half.pt")
    trainer.load_checkpoint(half)
    assert trainer.batch == 1 and trainer.epoch == 1
    trainer.load_checkpoint(path)
    assert trainer.batch == 0 and trainer.epoch == 1


# Refused, and nothing has changed.


def damaged(path, how):
    content = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        start = content.index(state["model"]["0.weight"].numpy().tobytes())
        path.write_bytes(content[:start] + bytes([content[start] ^ 1]) + content[start + 1 :])
    elif how == "foreign":
        torch.save({"state_dict": state["model"]}, path)
    elif how == "other model":
        torch.save(state | {"model": small_net(classes=5).state_dict()}, path)
    elif how == "other optimizer":
        state["optimizer"]["param_groups"].append(state["optimizer"]["param_groups"][0])
        torch.save(state, path)
    elif how == "other shapes":
        for entry in state["optimizer"]["state"].values():
            entry["exp_avg"] = torch.zeros(3)
        torch.save(state, path)
    elif how == "missing field":
        del state["progress"]
        torch.save(state, path)
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize(
    "how",
    ["truncated", "empty", "flipped", "foreign", "other model", "other optimizer", "other shapes",
     "missing field", "missing"],
)  # fmt: skip
def test_a_bad_file_is_refused_and_changes_nothing(tmp_path, how):
    other = make_trainer(model=small_net(seed=8), scheduler=SCHEDULERS["step"])
    other.fit(3)
    path = other.save_checkpoint(tmp_path / "a.pt")
    damaged(path, how)
    trainer, twin = (make_trainer(scheduler=SCHEDULERS["step"]) for _ in range(2))
    trainer.fit(1)
    twin.fit(1)
    with pytest.raises(CheckpointError, match=r"a\.pt") as caught:
        trainer.load_checkpoint(path)
    assert len(str(caught.value)) < 700
    assert same_state(trainer, twin) and trainer.history == twin.history
    trainer.fit(2)
    twin.fit(2)
    assert same_state(trainer, twin)


def test_incomplete_settings_are_refused_and_leave_no_trace(tmp_path):
    trainer = make_trainer()
    trainer.fit(1)
    state = torch.load(trainer.save_checkpoint(tmp_path / "a.pt"))
    del state["checksum"], state["optimizer"]["param_groups"][0]["lr"]
    forge(state, tmp_path / "a.pt")
    fresh, same = make_trainer(), make_trainer()
    with pytest.raises(CheckpointError, match="does not fit .* lack lr"):
        fresh.load_checkpoint(tmp_path / "a.pt")
    assert fresh.optimizer.param_groups[0]["lr"] == 0.02
    assert same_history(fresh.fit(1), same.fit(1)) and same_state(fresh, same)


def test_a_refused_file_leaves_a_pause_as_it_was(tmp_path):
    other = make_trainer(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    other.fit(1)
    path = other.save_checkpoint(tmp_path / "a.pt")
    trainer, straight = (
        make_trainer(callbacks=[At("on_batch_end", 3, stop)], epochs=2),
        make_trainer(),
    )
    trainer.fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="its optimizer is SGD, and this one's is AdamW"):
            trainer.load_checkpoint(path)
    assert (trainer.epoch, trainer.batch, trainer.stop_reason) == (0, 3, "enough")
    trainer.fit()
    straight.fit(2)
    assert same_state(trainer, straight)


def test_another_scheduler_is_refused(tmp_path):
    first = make_trainer(scheduler=lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12))
    first.fit(1)
    path = first.save_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="its scheduler is OneCycleLR"):
        make_trainer(scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, 6)).load_checkpoint(path)


def test_a_file_of_another_program_or_version_is_refused(tmp_path):
    trainer = make_trainer()
    path = trainer.save_checkpoint(tmp_path / "a.pt")
    state = torch.load(path)
    for change, message in (
        ({"format": 99}, "has format 99"),
        ({"model": 5}, "is not a checkpoint of this package"),
    ):
        content = {name: part for name, part in state.items() if name != "checksum"}
        forge(content | change, path)
        with pytest.raises(CheckpointError, match=message):
            trainer.load_checkpoint(path)
    torch.save({"model": state["model"]}, path)
    with pytest.raises(CheckpointError, match="another program or version: it lacks callbacks"):
        trainer.load_checkpoint(path)
    path.write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(CheckpointError) as caught:
        trainer.load_checkpoint(path)
    assert "\x1b" not in str(caught.value)


def test_state_that_no_file_can_hold_is_refused_by_name(tmp_path):
    class Bad(Callback):
        def state_dict(self):
            return {"function": lambda: 0}

        def load_state_dict(self, state):
            pass

    trainer = make_trainer(callbacks=[Bad()])
    with pytest.raises(
        CheckpointError, match=r"\['callbacks'\]\[0\]\[1\]\['function'\] is a function"
    ):
        trainer.save_checkpoint(tmp_path / "a.pt")
    trainer.callbacks.append(CheckpointCallback(tmp_path / "run", "train_loss"))
    with pytest.warns(UserWarning, match="There is no checkpoint after epoch 1"):
        trainer.fit(1)


def test_loading_while_a_fit_runs_is_refused(tmp_path):
    path = make_trainer().save_checkpoint(tmp_path / "a.pt")

    class Load(Callback):
        def on_batch_end(self, trainer, batch, logs):
            trainer.load_checkpoint(path)

    with pytest.raises(RuntimeError, match=r"cannot be loaded while fit\(\) runs"):
        make_trainer(callbacks=[Load()]).fit(1)


# A thousand ways to spoil a file.


def whole_state(trainer):
    position = (trainer.epoch, trainer.batch, trainer.stop_reason)
    return {name: part for name, part in outcome(trainer).items() if name != "random"} | {
        "position": position
    }


def spoil_bytes(data, draw):
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


def spoil_pickle(source, path, draw):
    """Change the structure that tensors are put together by, as an attacker would."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, spoil_bytes(data, draw) if name.endswith("data.pkl") else data)


def spoil_content(state, draw):
    """Remove a field, or give it another type, shape or value, somewhere in the state."""
    holder, key = state, draw.choice(list(state))
    while draw.random() < 0.7 and isinstance(holder[key], (dict, list)) and holder[key]:
        holder = holder[key]
        key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    other = draw.choice([None, "text", -1, [], {}, torch.zeros(2, 3), "gone"])
    if isinstance(other, str) and other == "gone":
        del holder[key]
    else:
        holder[key] = other
    return state


@pytest.mark.parametrize("part", range(10))
def test_a_spoiled_file_is_loaded_right_or_refused(tmp_path, part):
    """A hundred times: training continues, or a `CheckpointError` and nothing has changed."""

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
            bad.write_bytes(spoil_bytes(good.read_bytes(), draw))
        elif number % 3 == 1:
            spoil_pickle(good, bad, draw)
        else:
            content = spoil_content(torch.load(good, weights_only=True), draw)
            forged = number % 2
            if forged:  # its checksum is right
                content.pop("checksum", None)
                forge(content, bad)
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


# No code is run.


def test_a_hostile_file_is_refused_without_running_it(tmp_path):
    trainer, twin = make_trainer(), make_trainer()
    torch.save({"model": Hostile(tmp_path / "owned")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        trainer.load_checkpoint(tmp_path / "a.pt")
    assert not (tmp_path / "owned").exists() and same_state(trainer, twin)


def test_bytes_in_a_file_are_not_unpickled(tmp_path):
    """Workers send their random states pickled; a file that says it has some is not believed."""
    data = torch.utils.data.TensorDataset(*map(torch.cat, zip(*make_batches(4), strict=True)))
    loader = torch.utils.data.DataLoader(data, 2, num_workers=1, persistent_workers=True)
    trainer = make_trainer(loader)
    trainer.fit(1)
    hostile = pickle.dumps(Hostile(tmp_path / "owned"))
    state = torch.load(trainer.save_checkpoint(tmp_path / "a.pt"))
    del state["checksum"]
    state["workers"]["train"]["workers"] = {0: {"torch": hostile}}
    forge(state, tmp_path / "a.pt")
    trainer = make_trainer(loader)
    with contextlib.suppress(Exception):
        trainer.load_checkpoint(tmp_path / "a.pt")
        trainer.save_checkpoint(tmp_path / "b.pt")
        trainer.fit(1)
    assert not (tmp_path / "owned").exists()


# Whose files.


def test_a_callback_in_another_folder_owns_nothing_there(tmp_path):
    def run(folder):
        return make_trainer(callbacks=[CheckpointCallback(tmp_path / folder, "train_loss")])

    run("a").fit(1)
    run("b").fit(1)
    before = (tmp_path / "b" / "last.pt").read_bytes()
    third = run("b")
    third.load_checkpoint(tmp_path / "a" / "last.pt")
    third.fit(1)
    assert (tmp_path / "b" / "last-old1.pt").read_bytes() == before


def test_a_run_finds_its_files_after_the_folder_was_moved(tmp_path):
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
