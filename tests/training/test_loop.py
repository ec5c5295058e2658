"""The loop: what each of its methods may be replaced by, and how a run holds and continues."""

import pytest
import torch

from small import (
    At,
    half,
    make_batches,
    make_trainer,
    same_history,
    same_state,
    small_net,
    stop,
    vector,
)
from ununennium import Callback, Loop, Trainer


def test_a_step_that_raises_is_taken_again():
    trainer = half(make_trainer(), "cpu")
    calls = []

    def once(optimizer, args, kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("boom")

    handle = trainer.optimizer.register_step_pre_hook(once)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(1)
    assert trainer.batch == 3
    assert all(batch.losses == {} for batch in trainer.run.open.window)  # and no graph is kept
    handle.remove()
    trainer.fit(1)
    assert trainer.global_step == 6


# Holding a run.


class Hold(Callback):
    """Pause after a step; end the pause, or stop the run, after some calls."""

    def __init__(self, end, phase="train", step=2):
        self.end, self.phase, self.step, self.calls = end, phase, step, 0
        self.phases = []

    def on_safepoint(self, trainer, phase):
        self.phases.append(phase)
        if phase == "paused":
            self.calls += 1
            if self.calls == 3:
                self.end(trainer)
        elif phase == self.phase and trainer.global_step == self.step and not self.calls:
            trainer.request_pause()


@pytest.mark.parametrize(("phase", "step"), [("train", 2), ("validate", 6)])
def test_a_pause_holds_the_run_and_ends(phase, step):
    plain, hold = make_trainer(val=make_batches(2)), Hold(lambda t: t.end_pause(), phase, step)
    plain.fit(2)
    held = make_trainer(val=make_batches(2), callbacks=[hold])
    held.fit(2)
    start = hold.phases.index("paused")
    assert hold.phases[start - 1 : start + 3] == [phase, "paused", "paused", "paused"]
    assert hold.phases.count("paused") == 3
    assert same_state(plain, held) and same_history(plain.history, held.history)


def test_a_request_to_stop_ends_a_pause():
    hold = Hold(stop)
    trainer = make_trainer(callbacks=[hold])
    trainer.fit(2)
    assert trainer.global_step == 2 and trainer.stop_reason == "enough" and hold.calls == 3


def test_a_stop_before_a_pause_does_not_hold():
    class Both(Callback):
        def on_batch_end(self, trainer, batch, logs):
            trainer.request_pause()
            trainer.request_stop("enough")

    trainer = make_trainer(callbacks=[Both()])
    trainer.fit(1)
    assert trainer.global_step == 1


# Each method may be replaced.


def fit_with(loop, epochs=2, **settings):
    """Train with another loop."""

    class Own(Trainer):
        loop_class = loop

    base = make_trainer(val=make_batches(2), **settings)
    trainer = Own(
        base.model, base.optimizer, base.loss_fn, base.train_loader, base.val_loader,
        callbacks=base.callbacks, config=base.config,
    )  # fmt: skip
    trainer.fit(epochs)
    return trainer


def test_the_loop_as_it_is_trains_like_a_trainer():
    plain = make_trainer(val=make_batches(2))
    plain.fit(2)
    assert same_state(fit_with(Loop), plain)


def test_an_epoch_of_your_own():
    """Two validations per epoch, as where a metric depends on chance."""
    passes = []

    class Twice(Loop):
        def validate(self):
            passes.append(self.run.progress.epoch)
            return super().validate()

        def epoch(self):
            super().epoch()
            self.validate()

    trainer = fit_with(Twice)
    assert passes == [0, 1, 1, 2] and trainer.epoch == 2


def test_epochs_of_a_fixed_number_of_steps():
    class Short(Loop):
        def train(self, epoch):
            for _ in range(4):
                self.step(epoch.next_window(), epoch)
                if self.asked_to_stop("train"):
                    return False
            return True

    trainer = fit_with(Short, 3)
    assert trainer.epoch == 3 and trainer.global_step == 12
    assert len(trainer.history["val_loss"]) == 3


def test_a_step_with_a_turn_of_something_else():
    seen = []

    class Counting(Loop):
        def step(self, window, epoch):
            seen.append([batch.number for batch in window])
            super().step(window, epoch)

    fit_with(Counting, 1, accumulation_steps=4)
    assert seen == [[0, 1, 2, 3], [4, 5]]


def test_another_loss_in_the_backward_pass():
    class Smooth(Loop):
        def backward(self, batch):
            logs = super().backward(batch)
            penalty = sum(p.square().sum() for p in self.run.task.model.parameters())
            self.stepper.backward(0.1 * penalty, batch.share)
            return logs | {"train_penalty": penalty.detach()}

    logged = []

    class Note(Callback):
        def on_batch_end(self, trainer, batch, logs):
            logged.append(float(logs["train_penalty"]))

    sgd = lambda p: torch.optim.SGD(p, lr=0.1)
    smooth, plain = (
        fit_with(loop, optimizer=sgd, callbacks=callbacks)
        for loop, callbacks in ((Smooth, [Note()]), (Loop, []))
    )
    assert len(logged) == 12 and vector(smooth.model).norm() < vector(plain.model).norm()


def test_a_gradient_of_your_own_before_the_step():
    class Frozen(Loop):
        def update(self, window, epoch):
            self.stepper.unscale()
            for parameter in self.run.task.model.parameters():
                parameter.grad.zero_()
            return super().update(window, epoch)

    trainer = fit_with(Frozen, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert torch.equal(vector(trainer.model), vector(small_net())) and trainer.global_step == 12


def test_a_validation_of_your_own():
    class Constant(Loop):
        def validate(self):
            return {"val_quality": 0.5, "val_loss": float(self.run.progress.epoch)}

    trainer = fit_with(Constant, 3)
    assert trainer.history["val_quality"] == [0.5] * 3
    assert trainer.history["val_loss"] == [0.0, 1.0, 2.0] and "val_IoU" not in trainer.history


def test_a_validation_without_scores_leaves_the_epoch_open():
    class Stopped(Loop):
        def validate(self):
            self.run.progress.request_stop("enough")

    trainer = fit_with(Stopped)
    assert (trainer.epoch, trainer.batch) == (0, 6) and trainer.history == {}


def test_a_loop_of_your_own_resumes_exactly(tmp_path):
    class Noisy(Loop):
        def update(self, window, epoch):
            self.stepper.unscale()
            for parameter in self.run.task.model.parameters():
                parameter.grad += 0.01 * torch.randn_like(parameter.grad)
            return super().update(window, epoch)

    class Own(Trainer):
        loop_class = Noisy

    def build(*callbacks):
        base = make_trainer(seed=3, epochs=2)
        parts = (base.model, base.optimizer, base.loss_fn, base.train_loader)
        return Own(*parts, callbacks=callbacks, config=base.config)

    straight, stopped, resumed = build(), build(At("on_batch_end", 4, stop)), build()
    straight.fit()
    stopped.fit()
    torch.rand(9)
    resumed.load_checkpoint(stopped.save_checkpoint(tmp_path / "a.pt"))
    resumed.fit()
    assert same_state(straight, resumed)


def test_a_window_that_stays_open_is_an_error_and_not_an_endless_loop():
    class Forgetful(Loop):
        def update(self, window, epoch):
            return {}

    trainer = make_trainer()
    type(trainer).loop_class, before = Forgetful, Loop
    try:
        with pytest.raises(RuntimeError, match="its window is still open"):
            trainer.fit(1)
    finally:
        type(trainer).loop_class = before


def test_losses_of_a_loop_are_minimised_and_recorded():
    class Two(Loop):
        def losses(self, batch):
            losses = super().losses(batch)
            return losses | {"loss": 2 * losses["loss"], "half": losses["loss"]}

    class Mine(Trainer):
        loop_class = Two

    plain = make_trainer()
    parts = (plain.model, plain.optimizer, plain.loss_fn, plain.train_loader)
    history = Mine(*parts, config=plain.config).fit(1)
    assert history["train_loss"][0] == pytest.approx(2 * history["train_half"][0])
