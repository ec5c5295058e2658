"""Rules 12-15, 19 and, at the end of an epoch, 18: monitors, checkpoints, going on."""

import contextlib
import pickle

import pytest
import torch
from torch.optim import lr_scheduler

from conftest import Hostile, make_batches, make_trainer, same_history, same_state, small_net
from ununennium import CheckpointCallback, CheckpointError, EarlyStopping
from ununennium.training import checkpoint
from ununennium.training.checkpoint import save_file

SCHEDULERS = {
    "none": None,
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=36),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
}


def run(scheduler, own_generator, callbacks=()):
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = torch.utils.data.DataLoader(
        make_batches(6), batch_size=None, shuffle=True, generator=generator
    )
    return make_trainer(
        loader, make_batches(2, seed=1), scheduler=scheduler, callbacks=callbacks,
        model=torch.nn.Sequential(torch.nn.Dropout(0.2), small_net()), seed=5,
    )  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_new_trainer_goes_on_bitwise(tmp_path, name, own_generator):
    straight = run(SCHEDULERS[name], own_generator)
    straight.fit(6)
    first = run(SCHEDULERS[name], own_generator)
    first.fit(2)
    path = first.save_checkpoint(tmp_path / "two.pt")
    torch.manual_seed(99)
    second = run(SCHEDULERS[name], own_generator)
    second.load_checkpoint(path)
    torch.rand(17)  # somebody draws a figure in between
    second.fit(4)
    assert same_state(straight, second) and same_history(straight.history, second.history)


def test_callbacks_remember(tmp_path):
    def callbacks():
        return [
            EarlyStopping("val_loss", patience=3),
            CheckpointCallback(tmp_path / "run", save_top_k=2),
        ]

    first = run(None, False, callbacks())
    first.fit(3)
    second = run(None, False, callbacks())
    second.load_checkpoint(tmp_path / "run" / "last.pt")
    assert second.callbacks[0].state_dict() == first.callbacks[0].state_dict()
    assert second.callbacks[1].kept == first.callbacks[1].kept and len(first.callbacks[1].kept) == 2
    second.fit(3)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert len(files) == 4 and files[2:] == ["last.pt", "previous.pt"]


def test_settings_come_from_the_caller(tmp_path):
    first = make_trainer(scheduler=SCHEDULERS["step"], callbacks=[EarlyStopping("train_loss", 9)])
    first.fit(2)  # the rate is now 0.3 of 0.02
    path = first.save_checkpoint(tmp_path / "a.pt")
    second = make_trainer(
        scheduler=lambda o: lr_scheduler.StepLR(o, 7, gamma=0.3),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
        callbacks=[EarlyStopping("train_loss", 4)],
    )
    second.load_checkpoint(path)
    group = second.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.003) and group["weight_decay"] == 0.5
    assert (
        second.run.schedule.scheduler.step_size == 7
        and second.run.schedule.scheduler.last_epoch == 2
    )
    assert second.callbacks[0].patience == 4 and second.callbacks[0].best is not None


def damaged(path, how):
    content = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        place = content.index(state["model"]["0.weight"].numpy().tobytes())
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
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


# Where files are kept.


class Scores:
    """Runs a CheckpointCallback over given scores, without training."""

    def __init__(self, callback, scores, name="val_IoU"):
        self.epoch = self.global_step = self.batch = 0
        self.val_loader, self.directions = (), {}
        self.callback = callback
        callback.on_train_start(self)
        for epoch, score in enumerate(scores):
            callback.on_scores(self, epoch, {name: score})
            callback.on_epoch_end(self, epoch, {name: score})
        callback.on_train_end(self)

    def save_in_background(self, path, **options):
        state = {"model": {}, "of": self.callback.state_dict()}
        return checkpoint.save_in_background(state, path, **options)


def kept(folder):
    return sorted(path.name for path in folder.iterdir())


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
    save_file(state, tmp_path / "a.pt")
    trainer = make_trainer(loader)
    with contextlib.suppress(Exception):
        trainer.load_checkpoint(tmp_path / "a.pt")
        trainer.save_checkpoint(tmp_path / "b.pt")
        trainer.fit(1)
    assert not (tmp_path / "owned").exists()


def test_settings_that_lack_something_are_refused_and_leave_no_trace(tmp_path):
    trainer = make_trainer()
    trainer.fit(1)
    state = torch.load(trainer.save_checkpoint(tmp_path / "a.pt"))
    del state["checksum"], state["optimizer"]["param_groups"][0]["lr"]
    save_file(state, tmp_path / "a.pt")
    fresh, same = make_trainer(), make_trainer()
    with pytest.raises(CheckpointError, match="does not fit"):
        fresh.load_checkpoint(tmp_path / "a.pt")
    assert fresh.optimizer.param_groups[0]["lr"] == 0.02
    assert same_history(fresh.fit(1), same.fit(1)) and same_state(fresh, same)
