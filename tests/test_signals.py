"""A signal is handled in a block, and its old handler is put back."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time

import pytest

from ununennium.signals import signal_deferred, signal_handled, terminated_only_by


def test_the_handler_holds_for_the_block_and_no_longer():
    seen, outer = [], lambda number, frame: seen.append("outer")
    before = signal.signal(signal.SIGUSR1, outer)
    try:
        with signal_handled(signal.SIGUSR1, lambda number, frame: seen.append(number)):
            signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1, "outer"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_handler_is_put_back_after_an_error():
    before = signal.getsignal(signal.SIGUSR1)
    with contextlib.suppress(ZeroDivisionError), signal_handled(signal.SIGUSR1, signal.SIG_IGN):
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(
    ("number", "default"),
    [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)],
)
def test_a_handler_that_python_did_not_install_becomes_the_default(monkeypatch, number, default):
    """Python reports it as None, which cannot be installed again."""
    installed = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: installed.append(handler))
    with signal_handled(number, signal.SIG_IGN):
        pass
    assert installed == [signal.SIG_IGN, default]


def test_other_threads_change_nothing():
    before, during = signal.getsignal(signal.SIGUSR1), []

    def work():
        with signal_handled(signal.SIGUSR1, signal.SIG_IGN):
            during.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [before]


def test_a_deferred_signal_comes_after_the_block():
    seen = []
    with signal_handled(signal.SIGUSR1, lambda number, frame: seen.append(number)):
        with contextlib.suppress(ZeroDivisionError), signal_deferred(signal.SIGUSR1):
            with signal_deferred(signal.SIGUSR1):
                signal.raise_signal(signal.SIGUSR1)
            assert seen == []  # the outer block still holds it back
            raise ZeroDivisionError
        assert seen == [signal.SIGUSR1]


def test_nothing_is_deferred_where_signals_cannot_be_blocked(monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")
    seen = []
    note = lambda number, frame: seen.append(number)
    with signal_handled(signal.SIGUSR1, note), signal_deferred(signal.SIGUSR1):
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]


def be_a_worker(pipe):
    terminated_only_by(multiprocessing.parent_process())
    pipe.send(os.getpid())
    time.sleep(60)


def be_a_parent(pipe):
    multiprocessing.get_context("fork").Process(target=be_a_worker, args=(pipe,)).start()
    pipe.close()
    time.sleep(60)


@pytest.fixture
def family():
    """A process, its worker's number, and a pipe that is closed when the worker is gone."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    parent = context.Process(target=be_a_parent, args=(theirs,))
    parent.start()
    theirs.close()
    worker = ours.recv()
    yield parent, worker, ours
    parent.kill()
    parent.join()
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)


def test_a_worker_survives_a_signal_that_its_parent_did_not_send(family):
    _, worker, pipe = family
    os.kill(worker, signal.SIGTERM)
    assert not pipe.poll(0.5)


def test_a_worker_does_not_outlive_a_parent_that_was_killed(family):
    parent, _, pipe = family
    parent.kill()
    assert pipe.poll(10)  # seconds
    with pytest.raises(EOFError):
        pipe.recv()
