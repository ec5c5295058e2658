"""The average follows the run, which does not notice; it is scored, saved and resumed exactly."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from device import on_device
from small import At, make_batches, make_trainer, same_state, small_net, spoiled, stop
from ununennium import EMA, Callback, CheckpointCallback, CheckpointError, load_weights
from ununennium.training.messages import TrainingWarning


class Noisy(Dataset):
    """Tiles that are drawn as they are read, from a generator of the data set."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.randn(4, 8, 8, generator=self.generator)
        return image, image[:3].argmax(0)


def loaders():
    return DataLoader(Noisy(), batch_size=2, shuffle=True), DataLoader(Noisy(), batch_size=4)


def same_tensors(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def averaged_by_hand(epochs=2, decay=0.9, batches=None):
    """Return the average that a callback of a few lines keeps."""
    trainer = make_trainer(batches)
    average = copy.deepcopy(trainer.model)

    class ByHand(Callback):
        step = 0

        def on_safepoint(self, trainer, phase):
            if trainer.global_step == self.step:
                return
            self.step = trainer.global_step
            mine, theirs = average.state_dict(), trainer.model.state_dict()
            for name, value in mine.items():
                if value.is_floating_point():
                    value.lerp_(theirs[name], 1 - decay)
                else:
                    value.copy_(theirs[name])

    trainer.callbacks = [ByHand()]
    trainer.fit(epochs)
    return average


def test_the_average_is_that_of_the_formula():
    ema = EMA(0.9)
    make_trainer(callbacks=[ema]).fit(2)
    assert same_tensors(ema.model, averaged_by_hand())


def test_a_skipped_step_leaves_no_trace_in_the_average():
    ema = EMA(0.9)
    with pytest.warns(TrainingWarning, match="skipped"):
        make_trainer(spoiled(2, 5), callbacks=[ema]).fit(1)
    clean = [batch for number, batch in enumerate(spoiled()) if number not in (2, 5)]
    assert same_tensors(ema.model, averaged_by_hand(1, batches=clean))


def test_the_run_is_the_same_with_and_without_it():
    def run(callbacks):
        train, val = loaders()
        trainer = make_trainer(train, val, callbacks=callbacks, seed=4)
        return trainer, trainer.fit(3), trainer.confusion.table

    (plain, history, table), (with_ema, other, its) = run([]), run([EMA(0.5)])
    assert same_state(plain, with_ema)
    assert {name: other[name] for name in history} == history and torch.equal(table, its)
    assert other["ema_val_loss"] != history["val_loss"]
    assert all(module.training for module in with_ema.model.modules())


def test_its_scores_are_those_of_the_averaged_model():
    ema, val = EMA(0.8), make_batches(3, seed=9)
    trainer = make_trainer(val=val, callbacks=[ema])
    history = trainer.fit(1)
    expected = make_trainer(model=copy.deepcopy(ema.model).requires_grad_()).validate(val)
    for name, value in expected.items():
        assert history[f"ema_{name}"] == [pytest.approx(value, rel=1e-6)]


def test_the_best_average_is_kept_and_loaded(tmp_path):
    ema = EMA(0.8)
    best = CheckpointCallback(tmp_path, monitor="ema_val_IoU", mode="max")
    trainer = make_trainer(val=make_batches(2), callbacks=[ema, best])
    history = trainer.fit(2)
    assert best.best_score == max(history["ema_val_IoU"])
    model = load_weights(small_net(), tmp_path / "last.pt", ema=True)
    assert same_tensors(model, ema.model)
    assert not same_tensors(load_weights(small_net(), tmp_path / "last.pt"), ema.model)
    plain = make_trainer().save_checkpoint(tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="has no averaged weights"):
        load_weights(small_net(), plain, ema=True)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("step", [1, 4, 6, 9])
def test_a_run_that_is_stopped_and_resumed_has_the_same_average(tmp_path, step, order):
    def make(*others):
        ema = EMA(0.9)
        callbacks = [ema, *others][::order]
        return ema, make_trainer(val=make_batches(1), callbacks=callbacks)

    whole, trainer = make()
    trainer.fit(2)
    saved = At("on_safepoint", step, lambda t: t.save_checkpoint(tmp_path / "run.pt"))
    _, first = make(saved, At("on_safepoint", step, stop))
    first.fit(2)
    resumed, second = make()
    second.load_checkpoint(tmp_path / "run.pt")
    second.fit(2 - second.epoch)
    assert same_tensors(resumed.model, whole.model)
    assert second.history["ema_val_loss"] == trainer.history["ema_val_loss"]
    assert same_state(second, trainer)


PROGRAM = """
import os, signal, sys, torch
from small import make_batches, make_trainer
from ununennium import EMA, Callback, CheckpointCallback

folder, kill = sys.argv[1], int(sys.argv[2])

class Kill(Callback):
    def on_safepoint(self, trainer, phase):
        if trainer.global_step == kill:
            os.kill(os.getpid(), signal.SIGKILL)

ema = EMA(0.9)
trainer = make_trainer(
    val=make_batches(1), callbacks=[ema, CheckpointCallback(folder, every_n_steps=2), Kill()]
)
trainer.resume(folder)
trainer.fit(max(0, 2 - trainer.epoch))
torch.save([ema.model.state_dict(), trainer.model.state_dict()], folder + "/end.pt")
"""


def test_a_run_that_is_killed_goes_on_with_the_same_average(tmp_path):
    def run(folder, kill):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / folder), str(kill)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True).returncode

    assert run("whole", -1) == 0 and run("killed", 9) == -9 and run("killed", -1) == 0
    whole, killed = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "killed"))
    for a, b in zip(whole, killed, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_setting_that_makes_no_sense_and_a_use_too_early_are_told():
    for decay in (1, -0.1):
        with pytest.raises(ValueError, match="must be at least 0 and less than 1"):
            EMA(decay)
    with pytest.raises(RuntimeError, match="Call fit first"):
        assert EMA().model


def test_without_scores_or_validation_nothing_is_scored():
    ema = EMA(0.9, scores=False)
    assert "ema_val_loss" not in make_trainer(val=make_batches(1), callbacks=[ema]).fit(1)
    assert "ema_val_loss" not in make_trainer(callbacks=[EMA(0.9)]).fit(1)


def waits_of_an_average():
    from device.pretend import WATCH
    from device.test_faults import make_batches, make_trainer

    class Watched(Callback):
        def on_safepoint(self, trainer, phase):
            if trainer.run.progress.global_step == 2:
                WATCH.start()
            if trainer.run.progress.global_step == 6:
                WATCH.stop()

    make_trainer(make_batches(), callbacks=[Watched(), EMA(0.9)]).fit(1)
    return dict(WATCH.waits)


def test_the_host_does_not_wait_for_the_average():
    assert on_device(waits_of_an_average) == {}
