"""Who is called, in which order, and what an error in a callback does."""

import pytest

from ununennium import Callback
from ununennium.training.hooks import Display, Hooks


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
