"""Rules 7, 16, 17: schedulers, the meaning of fit, stopping, and who is told what."""

import contextlib
import gc
import math
import multiprocessing
import signal
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from conftest import make_batches, make_trainer, same_history, same_state
from ununennium import Callback
from ununennium.training.hooks import HOOKS


class Stop(Callback):
    """Ask to stop, or raise, in one hook at one moment."""

    def __init__(self, hook, when=1, error=None):
        self.hook, self.when, self.error, self.calls = hook, when, error, 0
        setattr(self, hook, self.act)

    def act(self, trainer, *details):
        self.calls += 1
        if self.calls == self.when:
            if self.error is not None:
                raise self.error
            trainer.request_stop("enough")


def finished(callbacks=(), epochs=3, **settings):
    """A run to the end, called again until all epochs are done."""
    trainer = make_trainer(
        val=make_batches(2, seed=1), callbacks=callbacks, epochs=epochs, **settings
    )
    for _ in range(60):
        with contextlib.suppress(RuntimeError):
            trainer.fit()
        if trainer.epoch == epochs:
            return trainer
    raise AssertionError("never finished")


# What a fit is.


def test_fit_counts_epochs():
    trainer = make_trainer(epochs=4)
    assert trainer.fit(0) == {} and trainer.epoch == 0
    trainer.fit(1)
    assert trainer.epoch == 1
    history = trainer.fit()
    assert trainer.epoch == 4 and {len(values) for values in history.values()} == {4}
    with pytest.warns(UserWarning, match="All 4 epochs .* nothing was trained"):
        assert trainer.fit() == history
    assert len(trainer.fit(2)["train_loss"]) == 6


def test_history_is_a_copy_of_plain_floats():
    trainer = make_trainer(val=make_batches(2))
    history = trainer.fit(1)
    history["train_loss"].clear()
    assert len(trainer.history["train_loss"]) == 1
    assert all(type(value) is float for values in trainer.history.values() for value in values)


def test_two_fits_are_one_fit():
    once, twice = make_trainer(), make_trainer()
    once.fit(4)
    twice.fit(1)
    twice.fit(3)
    assert same_state(once, twice) and once.history == twice.history


@pytest.mark.parametrize("epochs", [-1, 1.5, True])
def test_fit_refuses_other_numbers(epochs):
    error = ValueError if epochs == -1 else TypeError
    with pytest.raises(error, match="must be a whole number"):
        make_trainer().fit(epochs)


def test_seed_makes_a_run_repeatable():
    def run():
        loader = torch.utils.data.DataLoader(make_batches(8), batch_size=None, shuffle=True)
        trainer = make_trainer(loader, seed=7)
        torch.rand(torch.randint(9, ()).item())
        trainer.fit(2)
        return trainer

    torch.manual_seed(1)
    one = run()
    torch.manual_seed(2)
    assert same_state(one, run())


# Stopping.


@settings(deadline=None, max_examples=40)
@given(
    hook=st.sampled_from([h for h in HOOKS if h not in ("on_exception", "on_train_end")]),
    when=st.integers(1, 9),
    accumulation=st.integers(1, 3),
    how=st.sampled_from(["request", "interrupt", "error"]),
)
def test_a_stop_anywhere_is_a_pause(hook, when, accumulation, how):
    """Stopped in any hook, in any way, and continued: the run of one that never stopped."""
    error = {"request": None, "interrupt": KeyboardInterrupt(), "error": RuntimeError("oops")}[how]
    straight = finished(accumulation_steps=accumulation)
    stop = Stop(hook, when, error)
    paused = finished([stop], accumulation_steps=accumulation)
    assert same_state(straight, paused)
    assert same_history(straight.history, paused.history)
    assert straight.global_step == paused.global_step


def test_a_request_ends_the_running_step_and_keeps_the_first_reason():
    stop = Stop("on_batch_start", 3)
    trainer = make_trainer(callbacks=[stop], accumulation_steps=2)
    trainer.fit(2)
    assert trainer.stop_reason == "enough" and trainer.should_stop
    assert (trainer.epoch, trainer.batch, trainer.global_step) == (0, 4, 2)
    trainer.request_stop("later")
    assert trainer.stop_reason == "enough"


def test_should_stop_can_be_set():
    class Old(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            trainer.should_stop = True

    trainer = make_trainer(callbacks=[Old()])
    trainer.fit(5)
    assert trainer.epoch == 1
    trainer.should_stop = False
    assert trainer.stop_reason is None


def test_interrupt_signal_returns_the_history():
    trainer = make_trainer()
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    history = trainer.fit(100_000)
    assert trainer.stop_reason == "interrupted" and len(history["train_loss"]) == trainer.epoch
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer.fit(1)


def test_interrupt_during_validation_loses_nothing():
    class Interrupt:
        def __init__(self, batches):
            self.batches, self.armed = batches, True

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            for batch in self.batches:
                yield batch
                if self.armed:
                    self.armed = False
                    signal.raise_signal(signal.SIGINT)

    straight, paused = finished(), make_trainer(val=Interrupt(make_batches(2, seed=1)), epochs=3)
    paused.fit()
    assert (paused.epoch, paused.batch) == (0, 6)
    paused.fit()
    assert same_state(straight, paused) and straight.history == paused.history


def test_fit_in_another_thread():
    trainer = make_trainer()
    thread = threading.Thread(target=trainer.fit, args=(2,))
    thread.start()
    thread.join()
    assert trainer.epoch == 2


def test_ctrl_c_in_a_script_with_workers():
    """The workers of a loader get the signal too, and the paused epoch still goes on."""
    script = textwrap.dedent("""
        import os, signal, sys, threading
        sys.path.insert(0, "tests")
        import torch
        from conftest import make_batches, make_trainer
        data = make_batches(40)
        loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
        trainer = make_trainer(loader)
        class Interrupt:
            def on_batch_end(self, trainer, batch, logs):
                if trainer.epoch == 1 and trainer.batch == 10:
                    os.killpg(0, signal.SIGINT)
        trainer.callbacks.append(Interrupt())
        trainer.fit(3)
        assert trainer.stop_reason == "interrupted" and trainer.epoch == 1, trainer.stop_reason
        trainer.callbacks.clear()
        trainer.fit(2)
        assert trainer.epoch == 3 and trainer.global_step == 120
        print("fine")
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        start_new_session=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "fine", done.stderr


# Who is told.


class Diary(Callback):
    def __init__(self):
        self.entries = []
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, *details, hook=hook: self.entries.append(hook))


def test_an_error_in_a_callback_is_the_users_to_see_and_the_epoch_counts():
    trainer = make_trainer(callbacks=[Stop("on_scores", 1, RuntimeError("oops"))])
    with pytest.raises(RuntimeError, match="oops"):
        trainer.fit(2)
    assert trainer.epoch == 1 and len(trainer.history["train_loss"]) == 1


def test_logs_have_the_keys_of_the_history():
    seen = {}

    class Keys(Callback):
        def on_scores(self, trainer, epoch, logs):
            seen["scores"] = set(logs)

        def on_epoch_end(self, trainer, epoch, logs):
            seen["epoch"] = set(logs)

    history = make_trainer(val=make_batches(1), callbacks=[Keys()]).fit(1)
    assert seen["scores"] == seen["epoch"] == set(history)


# Early stopping.


# Schedulers.


def rates_of(scheduler, epochs=3, optimizer=None, **settings):
    rates = []

    class Watch(Callback):
        def on_batch_start(self, trainer, batch):
            rates.append(trainer.optimizer.param_groups[0]["lr"])

    trainer = make_trainer(
        make_batches(4), make_batches(1), scheduler=scheduler, callbacks=[Watch()],
        optimizer=optimizer or (lambda p: torch.optim.SGD(p, lr=1.0)), **settings,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = trainer.fit(epochs)
    return rates, history, trainer


def test_epoch_scheduler():
    rates, history, _ = rates_of(lambda o: lr_scheduler.StepLR(o, 1, gamma=0.5))
    assert rates == [1.0] * 4 + [0.5] * 4 + [0.25] * 4
    assert history["lr"] == [1.0, 0.5, 0.25]


def test_step_scheduler_by_kind_and_by_config():
    by_kind, _, _ = rates_of(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=12))
    assert len(set(by_kind)) == 12
    by_config, _, _ = rates_of(
        lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
        scheduler_interval="step",
        accumulation_steps=2,
    )
    assert by_config == [1.0] * 4 + [0.5] * 4 + [0.25] * 4


def test_one_cycle_of_exactly_the_right_length_and_too_short():
    rates_of(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=12))
    with pytest.raises(ValueError, match=r"built for 11 steps .* up to 12 .* total_steps=12"):
        rates_of(lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=11))


def test_plateau_gets_the_validation_loss():
    seen = []

    class Plateau(lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(metrics)
            super().step(metrics)

    _, history, _ = rates_of(lambda o: Plateau(o))
    assert seen == history["val_loss"]
    seen.clear()
    trainer = make_trainer(scheduler=lambda o: Plateau(o))
    assert trainer.fit(2)["train_loss"] == seen
    seen.clear()
    _, history, _ = rates_of(lambda o: Plateau(o, mode="max"), scheduler_monitor="val_IoU")
    assert seen == history["val_IoU"]


def test_scores_that_come_later_have_nan_before():
    trainer = make_trainer()
    trainer.fit(2)
    trainer.val_loader = make_batches(1)
    history = trainer.fit(1)
    assert [math.isnan(value) for value in history["val_loss"]] == [True, True, False]
    trainer.val_loader = None
    assert [math.isnan(value) for value in trainer.fit(1)["val_IoU"]] == [True, True, False, True]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_workers_end_at_once_when_a_trainer_is_dropped(monkeypatch, stops, persistent):
    """A worker that misses the message is killed after PyTorch has waited for it."""

    class Look(Callback):
        def on_batch_end(self, trainer, batch, logs):
            workers[:] = multiprocessing.active_children()
            if stops:
                trainer.request_stop("enough")

    workers, killed = [], []
    terminate = multiprocessing.process.BaseProcess.terminate
    samples = [
        (image, mask) for batch in make_batches(4) for image, mask in zip(*batch, strict=True)
    ]
    loader = DataLoader(samples, 2, num_workers=2, persistent_workers=persistent)
    trainer = make_trainer(loader, loader, callbacks=[Look()])
    trainer.fit(1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 2.0)
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess,
        "terminate",
        lambda worker: [killed.append(worker), terminate(worker)],
    )
    del trainer, loader
    gc.collect()
    assert len(workers) >= 2 and not killed


def test_a_fit_within_a_fit_is_refused():
    class Again(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            trainer.fit(1)

    trainer = make_trainer(callbacks=[Again()])
    with pytest.raises(RuntimeError, match="while a fit of this trainer runs"):
        trainer.fit(1)
    trainer.callbacks.clear()
    trainer.fit(1)
