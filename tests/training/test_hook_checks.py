"""What could never be called is found when the trainer is built."""

import warnings

import pytest

from small import At, boom, make_batches, make_trainer
from ununennium import EMA, Callback, CheckpointCallback, EarlyStopping
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


def folds(tmp_path, callbacks, count=2):
    """Train a new trainer per fold with the same list of callbacks; return what was warned."""
    told = []
    for fold in range(count):
        trainer = make_trainer(make_batches(3, seed=fold), make_batches(2), callbacks=callbacks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(1)
            trainer.fit(1)
        told.append([str(w.message) for w in caught if "another trainer" in str(w.message)])
    return told


def test_callbacks_shared_by_folds_are_told_at_the_start_of_the_second_fit(tmp_path):
    told = folds(tmp_path, [EarlyStopping(), CheckpointCallback(tmp_path), EMA()], 3)
    assert list(map(len, told)) == [0, 1, 1]
    assert told[1][0].startswith(
        f"EarlyStopping, CheckpointCallback({str(tmp_path)!r}), EMA served another trainer "
        "before. What was remembered of that run is forgotten now. In the folder its last.pt is "
        "renamed, and its best models stay beside the new ones. Build new callbacks for each "
        f"trainer, each with a folder: CheckpointCallback({str(tmp_path / 'fold-2')!r})."
    )


class Slotted(Callback):
    __slots__ = ("count",)
    __hash__ = None

    def __eq__(self, other):
        return True

    def state_dict(self):
        return {}


def test_callbacks_without_memory_may_be_shared(tmp_path):
    class Count(Callback):
        epochs = 0

        def on_epoch_end(self, trainer, epoch, logs):
            self.epochs += 1

    count = Count()
    assert folds(tmp_path, [count, Slotted()]) == [[], []] and count.epochs == 4


def test_new_callbacks_and_a_run_that_had_not_begun_are_not_told(tmp_path):
    def make(callbacks):
        return make_trainer(val=make_batches(2), callbacks=callbacks)

    callbacks = [EarlyStopping(), CheckpointCallback(tmp_path)]
    failing = make([*callbacks, At("on_batch_start", 1, boom)])
    with pytest.raises(RuntimeError, match="boom"):
        failing.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make(callbacks)
        trainer.fit(1)
        trainer.fit(1)
        again = make([EarlyStopping(), CheckpointCallback(tmp_path / "again")])
        again.fit(1)


def test_a_trainer_rebuilt_with_the_same_callbacks_that_resumes_is_not_told(tmp_path):
    callbacks = [EarlyStopping(), CheckpointCallback(tmp_path)]
    make_trainer(val=make_batches(2), callbacks=callbacks).fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rebuilt = make_trainer(val=make_batches(2), callbacks=callbacks)
        rebuilt.resume(tmp_path)
        assert rebuilt.fit(1)["val_loss"] and rebuilt.epoch == 2


def test_a_run_whose_callbacks_served_another_one_is_told_when_it_continues(tmp_path):
    callbacks = [EarlyStopping()]
    first, second = (make_trainer(val=make_batches(2), callbacks=callbacks) for _ in range(2))
    first.fit(1)
    with pytest.warns(UserWarning, match="What was remembered of that run is forgotten now"):
        second.fit(1)
    with pytest.warns(UserWarning, match="EarlyStopping served another trainer before. What is re"):
        first.fit(1)


def test_a_callback_of_your_own_with_a_memory_is_told(tmp_path):
    class Best(Callback):
        def state_dict(self):
            return {}

    told = folds(tmp_path, [Best()])
    assert told[1] == [
        "Best served another trainer before. Best still remembers that run, unless on_train_start "
        "resets. Build new callbacks for each trainer."
    ]
