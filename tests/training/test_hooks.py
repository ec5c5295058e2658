"""Who is called, in which order, and what an error in a callback does."""

import pytest

from conftest import make_batches, make_trainer
from ununennium import Callback
from ununennium.training.hooks import HOOKS, Display, Hooks


class Fail(Callback):
    """Raise in one hook."""

    def __init__(self, hook, error):
        self.error = error
        setattr(self, hook, self.fail)

    def fail(self, trainer, *details):
        raise self.error


class Diary(Callback):
    def __init__(self):
        self.entries = []
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, *details, hook=hook: self.entries.append(hook))


def test_order_of_the_hooks():
    diary = Diary()
    make_trainer(make_batches(2), make_batches(1), callbacks=[diary]).fit(1)
    assert diary.entries == [
        "on_train_start", "on_epoch_start", "on_batch_start", "on_batch_end", "on_safepoint",
        "on_batch_start", "on_batch_end", "on_safepoint", "on_safepoint", "on_scores",
        "on_epoch_end", "on_train_end",
    ]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("error", [RuntimeError("oops"), KeyboardInterrupt()])
def test_every_callback_is_called_at_the_end(hook, error):
    diary = Diary()
    trainer = make_trainer(val=make_batches(1), callbacks=[Fail(hook, error), diary])
    try:
        trainer.fit(1)
    except RuntimeError:
        assert isinstance(error, RuntimeError)
    except KeyboardInterrupt:
        assert hook == "on_train_end"
    if not (hook == "on_train_end" and isinstance(error, KeyboardInterrupt)):
        assert diary.entries[-1] == "on_train_end"
    if hook not in ("on_exception", "on_train_end"):
        assert "on_exception" in diary.entries


def test_a_callback_that_exits_does_not_keep_others_from_the_end():
    ends = []

    class Last(Callback):
        def on_train_end(self, trainer):
            ends.append(1)

    with pytest.raises(SystemExit):
        make_trainer(callbacks=[Fail("on_train_end", SystemExit(3)), Last()]).fit(1)
    assert ends == [1]


def test_a_display_that_fails_is_switched_off():
    class Broken(Callback):
        is_display = True

        def on_batch_end(self, trainer, batch, logs):
            raise OSError("the browser is gone")

    with pytest.warns(UserWarning, match="Broken failed and is switched off") as caught:
        make_trainer(callbacks=[Broken()]).fit(2)
    assert len(caught) == 1


class Screen(Display):
    """A display that fails when it announces."""

    def __init__(self):
        self.calls = []

    def announce(self, text):
        self.calls.append(text)
        if text == "second":
            raise OSError("the browser is gone")

    def on_train_end(self, trainer):
        self.calls.append("closed")


def test_announcements_reach_the_displays_and_no_other_callback(capsys):
    class Shouting(Callback):
        def announce(self, text):
            raise AssertionError("this is no display")

    class Mute(Callback):
        is_display = True

    hooks = Hooks([Shouting(), Mute(), Display()], trainer=None)
    hooks.announce("a message")
    assert capsys.readouterr().out == "a message\n"


def test_a_display_that_cannot_announce_is_switched_off():
    screen, other = Screen(), Screen()
    hooks = Hooks([screen, other], trainer=None)
    hooks.announce("first")
    other.announce = lambda text: other.calls.append(text)
    with pytest.warns(UserWarning, match="Screen failed and is switched off; .* browser") as caught:
        hooks.announce("second")
    hooks.announce("third")
    hooks.call("on_train_end")
    assert len(caught) == 1
    assert screen.calls == ["first", "second", "closed"]
    assert other.calls == ["first", "second", "third", "closed"]
