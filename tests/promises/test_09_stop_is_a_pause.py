"""9 · A stop is a pause: the step ends, and the next `fit` continues with the next batch."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from small import (
    HOOKS,
    ROOT,
    At,
    make_batches,
    make_trainer,
    raising,
    same_history,
    same_state,
    shuffled,
    start_process,
    stop,
)
from ununennium import Callback

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


def test_two_fits_are_one_fit():
    once, twice = make_trainer(), make_trainer()
    once.fit(4)
    twice.fit(1)
    twice.fit(3)
    assert same_state(once, twice) and once.history == twice.history


def test_a_fit_runs_in_another_thread():
    trainer = make_trainer()
    thread = threading.Thread(target=trainer.fit, args=(2,))
    thread.start()
    thread.join()
    assert trainer.epoch == 2


# Stopping.


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


@settings(deadline=None, max_examples=40)
@given(
    hook=st.sampled_from([h for h in HOOKS if h not in ("on_exception", "on_train_end")]),
    when=st.integers(1, 9),
    accumulation=st.integers(1, 3),
    how=st.sampled_from(["request", "interrupt", "error"]),
)
def test_a_stop_anywhere_is_a_pause(hook, when, accumulation, how):
    """Stopped in any hook, in any way, and continued: the run of one that never stopped."""
    act = {
        "request": stop,
        "interrupt": raising(KeyboardInterrupt()),
        "error": raising(RuntimeError("oops")),
    }[how]
    straight = finished(accumulation_steps=accumulation)
    paused = finished([At(hook, when, act)], accumulation_steps=accumulation)
    assert same_state(straight, paused)
    assert same_history(straight.history, paused.history)
    assert straight.global_step == paused.global_step


def test_a_request_ends_the_running_step_and_keeps_the_first_reason():
    trainer = make_trainer(callbacks=[At("on_batch_start", 3, stop)], accumulation_steps=2)
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


@pytest.mark.parametrize("own_generator", [False, True])
def test_reading_the_loader_in_a_pause_changes_nothing(own_generator):
    straight = shuffled(own_generator=own_generator)
    straight.fit()
    paused = shuffled([At("on_batch_end", 11, stop)], own_generator)
    paused.fit()
    next(iter(paused.train_loader))
    torch.rand(9)
    paused.validate()
    paused.fit()
    assert same_state(straight, paused) and same_history(straight.history, paused.history)


# Signals.


def test_an_interrupt_returns_the_history():
    trainer = make_trainer()
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    history = trainer.fit(100_000)
    assert trainer.stop_reason == "interrupted" and len(history["train_loss"]) == trainer.epoch
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer.fit(1)


def test_an_interrupt_during_validation_loses_nothing():
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


def test_an_interrupt_of_a_script_reaches_its_workers_too():
    """The workers of a loader get the signal too, and the paused epoch still continues."""
    script = textwrap.dedent("""
        import os, signal, sys, threading
        sys.path.insert(0, "tests")
        import torch
        from small import make_batches, make_trainer
        torch.set_num_threads(1)  # more would wait for each other on a busy machine
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


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_survive_two_interrupts(method, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {[str(ROOT / "tests")]!r}
        import torch
        from small import make_batches, make_trainer

        class Interrupt:
            def on_batch_end(self, trainer, batch, logs):
                if trainer.epoch == 1 and trainer.batch in (4, 9):
                    os.killpg(0, signal.SIGINT)

        if __name__ == "__main__":
            torch.set_num_threads(1)
            options = {{"num_workers": 2, "multiprocessing_context": {method!r}}}
            loader = torch.utils.data.DataLoader(make_batches(12), batch_size=None, **options)
            trainer = make_trainer(loader, epochs=3, callbacks=[Interrupt()])
            stops = []
            while trainer.epoch < 3:
                trainer.fit()
                stops.append((trainer.epoch, trainer.batch))
            assert stops == [(1, 4), (1, 9), (3, 0)], stops
            print("fine")
    """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300,
        start_new_session=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "fine", done.stdout + done.stderr


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
