"""What surrounds a `fit`: signals, hints, and what is put back however it ends."""

import contextlib
import re
import signal

import pytest
import torch

from small import At, Named, boom, make_batches, make_trainer, stop
from ununennium import Callback
from ununennium.training.hooks import Hooks
from ununennium.training.run import make_stepper
from ununennium.training.session import hint_for, session, signal_noted, termination_noted


def test_the_first_signal_is_noted_and_later_ones_act():
    calls = []
    note, again = (lambda name=name: calls.append(name) for name in ("note", "again"))
    with signal_noted(signal.SIGUSR1, note, again) as noted:
        assert noted == []
        for _ in range(3):
            signal.raise_signal(signal.SIGUSR1)
    assert calls == ["note", "again", "again"] and noted == [signal.SIGUSR1]


def test_a_request_to_terminate_is_obeyed_at_the_end_of_the_block():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append("outer"))
    try:
        with termination_noted(lambda: seen.append("noted")):
            signal.raise_signal(signal.SIGTERM)
            seen.append("the block continues")
        assert seen == ["noted", "the block continues", "outer"]
        with termination_noted(lambda: seen.append("noted")):
            pass
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "size", "hint"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 8, r"batch_size \(8 to 4\) .*\(3 to 6\)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, r"\(2 to 1\)"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "one sample already: use smaller tiles"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), 4, "ended from outside"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), 4, "ended from outside"),
        (ValueError("Expected more than 1 value per channel when training"), 1, "drop_last=True"),
        (RuntimeError("anything else"), 4, "^$"),
    ],
)
def test_hints(error, size, hint):
    assert re.search(hint, hint_for(error, size, 3))


def enter(trainer):
    """Return the session of a `fit`, as the loop opens it."""
    return session(trainer.run, make_stepper(trainer.run), Hooks(trainer.callbacks, trainer))


def test_modes_gradients_and_handlers_are_put_back():
    trainer = make_trainer(epochs=1)
    trainer.model.eval()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.suppress(RuntimeError), enter(trainer):
        assert trainer.model.training and trainer.run.is_running
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        boom(trainer)
    assert not trainer.model.training and not trainer.run.is_running
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert trainer.stop_reason == "RuntimeError: boom"


def test_requests_of_an_earlier_fit_are_forgotten():
    trainer = make_trainer(epochs=1)
    trainer.request_stop("earlier")
    trainer.request_pause()
    with enter(trainer):
        assert not trainer.should_stop and not trainer.run.progress.pause_requested


def test_an_interrupt_is_a_request_a_second_one_ends_the_block():
    ends = []

    class Note(Callback):
        def on_exception(self, trainer, error):
            ends.append(type(error))

    trainer = make_trainer(epochs=1, callbacks=[Note()])
    with enter(trainer):
        signal.raise_signal(signal.SIGINT)
        assert trainer.stop_reason == "interrupted"
    assert ends == [KeyboardInterrupt]
    with enter(trainer):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second interrupt was ignored")
    assert ends == [KeyboardInterrupt] * 2


def test_the_interrupt_is_announced_on_the_display():
    class Screen(Callback):
        is_display = True
        said = ()

        def announce(self, text):
            self.said = (*self.said, text)

    trainer = make_trainer(callbacks=[screen := Screen()], epochs=1)
    with enter(trainer):
        signal.raise_signal(signal.SIGINT)
    assert screen.said == (
        "Stopping after this step: interrupted. Interrupt again to stop at once.",
    )


def test_a_random_state_is_remembered_only_in_an_open_epoch():
    trainer = make_trainer(callbacks=[At("on_batch_end", 2, stop)])
    trainer.fit(1)
    assert trainer.run.open is not None and trainer.run.random is not None
    trainer.fit(1)
    assert trainer.run.open is None and trainer.run.random is None


def test_a_loader_that_is_read_once_cannot_serve_two_epochs():
    for loaders in ((iter(make_batches(2)), None), (make_batches(2), iter(make_batches(2)))):
        trainer = make_trainer(*loaders, epochs=2)
        name = "train" if loaders[1] is None else "val"
        with pytest.raises(
            ValueError, match=f"{name}_loader is of type list_iterator, .* 2 epochs"
        ):
            trainer.fit()


def test_an_error_frees_the_graphs_of_its_window():
    trainer = make_trainer(
        torch.utils.data.DataLoader(Named(), 2), accumulation_steps=3,
        callbacks=[At("on_batch_end", 2, boom)],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(1)
    assert len(trainer.run.open.window) == 3
    assert all(not b.losses and not b.checks for b in trainer.run.open.window)


def test_a_callback_that_was_appended_is_looked_at_too():
    class Wrong(Callback):
        def on_epoch_edn(self, trainer, epoch, logs):
            pass

    trainer = make_trainer()
    trainer.callbacks.append(Wrong())
    with pytest.raises(TypeError, match="Did you mean on_epoch_end"):
        trainer.fit(1)
