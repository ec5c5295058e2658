"""What could never be called is found when the trainer is built."""

import pytest

from ununennium import Callback
from ununennium.training.hook_checks import check_callbacks, check_hooks


def make(base, *names):
    return type("Own", base, {name: lambda self, *details: None for name in names})()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("on_epoch_finish", "Did you mean on_epoch_end?"),
        ("on_train_epoch_end", "Did you mean on_epoch_end?"),
        ("on_validation_end", "Did you mean on_scores?"),
        ("on_epoch_begin", "Did you mean on_epoch_start?"),
        ("on_batchend", "Did you mean on_batch_end?"),
        ("on_better", "The hooks are on_train_start"),
    ],
)
def test_a_hook_that_is_never_called_is_refused(name, meant):
    with pytest.raises(TypeError) as caught:
        check_callbacks([make((Callback,), name)])
    assert f"Own.{name} is no hook, so it would never be called. {meant}" in str(caught.value)


@pytest.mark.parametrize("name", ["on_epoch_ends", "on_validation_end"])
def test_also_in_a_class_of_its_own_if_it_resembles_a_hook(name):
    with pytest.raises(TypeError, match=f"{name} is no hook"):
        check_callbacks([make((), "on_epoch_end", name)])


def test_other_methods_are_left_alone():
    class Widget:
        def on_click(self):
            pass

        def on_msg(self):
            pass

    check_callbacks([make((Callback, Widget), "on_epoch_end", "_on_better")])
    check_callbacks([make((), "on_epoch_end", "on_click", "on_message")])


def test_every_part_of_the_class_is_looked_at():
    parent = type(make((Callback,), "on_fit_start"))
    with pytest.raises(TypeError, match="Did you mean on_train_start"):
        check_callbacks([make((parent,), "on_epoch_end")])


def test_a_hook_has_to_take_the_loops_arguments():
    class Short(Callback):
        def on_epoch_end(self, trainer):
            pass

    with pytest.raises(TypeError, match="does not fit the loop's call") as caught:
        check_callbacks([Short()])
    assert "Write def on_epoch_end(self, trainer, epoch, logs)." in str(caught.value)

    class Right(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            pass

    check_hooks(Right())
    check_callbacks([make((), "on_epoch_end"), type("C", (), {"on_train_end": max})()])


def test_a_name_that_resembles_a_hook_may_be_that_of_another_library():
    """In a callback it is a mistake, with a hint; in a class of its own it has to be closer."""
    check_callbacks([make((), "on_epoch_end", "on_batch_done")])
    with pytest.raises(TypeError, match="Did you mean on_batch_end?"):
        check_callbacks([make((Callback,), "on_batch_done")])


def test_what_is_no_method_may_have_any_name():
    check_callbacks([type("Own", (Callback,), {"on_better": None, "on_epoch_end_count": 0})()])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Callback(), r"callbacks is of type Callback; pass a list"),
        ([Callback], r"Callback is a class; pass an instance: Callback\(...\)"),
        ([print], "has none of the hooks: on_train_start"),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused(callbacks, message):
    with pytest.raises(TypeError, match=message):
        check_callbacks(callbacks)
    check_callbacks(None)
    check_callbacks((Callback(),))
