"""Who is called, in which order, and what an error in a callback or a display does."""

import pytest

from small import make_trainer
from ununennium import Callback
from ununennium.training.hooks import HOOKS, Display, Hooks, find_listeners, is_fresh, position_of


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


class Listener:
    """Note what it hears, under its name; raise if there is an error."""

    def __init__(self, name, heard, error=None):
        self.name, self.heard, self.error = name, heard, error

    def on_epoch_end(self, trainer, *details):
        self.heard.append((self.name, trainer, *details))
        if self.error is not None:
            raise self.error


def test_hooks_are_called_in_the_order_of_the_list_with_the_trainer_first():
    heard = []
    hooks = Hooks([Listener("a", heard), Callback(), Listener("b", heard)], "the trainer")
    hooks.call("on_epoch_end", 3, {"lr": 0.1})
    hooks.call("on_train_end")  # that nothing here has
    assert heard == [(name, "the trainer", 3, {"lr": 0.1}) for name in "ab"]


def test_an_error_ends_the_call_unless_all_have_to_hear():
    heard = []
    first, second = KeyError("first"), KeyError("second")
    callbacks = [Listener("a", heard, first), Listener("b", heard, second), Listener("c", heard)]
    with pytest.raises(KeyError, match="first"):
        Hooks(callbacks, None).call("on_epoch_end")
    assert [name for name, *_ in heard] == ["a"]
    heard.clear()
    with pytest.raises(KeyError, match="first"):
        Hooks(callbacks, None).call("on_epoch_end", to_all=True)
    assert [name for name, *_ in heard] == ["a", "b", "c"]


def test_an_interrupt_in_a_display_is_no_failure_of_it():
    display = Listener("a", [], KeyboardInterrupt())
    display.is_display = True
    hooks = Hooks([display], None)
    with pytest.raises(KeyboardInterrupt):
        hooks.call("on_epoch_end")
    assert hooks.callbacks == [display]


def test_only_overridden_hooks_are_listened_to():
    assert not any(find_listeners([Callback()]).values())
    own = type("Own", (), {"on_scores": lambda *_: None})()
    assert [hook for hook, found in find_listeners([own]).items() if found] == ["on_scores"]
    assert set(find_listeners([])) == set(HOOKS)


def test_positions_are_read_from_a_trainer():
    trainer = make_trainer()
    assert is_fresh(trainer) and position_of(trainer) == (0, 0, 0)
    trainer.fit(1)
    assert not is_fresh(trainer) and position_of(trainer) == (1, 6, 0)
