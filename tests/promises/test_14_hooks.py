"""14 · Hooks: in order, before and after the history is written, and to the end."""

import csv
import json
import re
import sys
import types
from pathlib import Path

import pytest

from small import (
    HOOKS,
    ROOT,
    At,
    boom,
    make_batches,
    make_trainer,
    raising,
    same_state,
    shuffled,
)
from ununennium import Callback, CheckpointCallback


class Diary(Callback):
    def __init__(self):
        self.entries = []
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, *details, hook=hook: self.entries.append(hook))


def test_hooks_are_called_in_order():
    diary = Diary()
    make_trainer(make_batches(2), make_batches(1), callbacks=[diary]).fit(1)
    assert diary.entries == [
        "on_train_start", "on_epoch_start", "on_batch_start", "on_batch_end", "on_safepoint",
        "on_batch_start", "on_batch_end", "on_safepoint", "on_safepoint", "on_scores",
        "on_epoch_end", "on_train_end",
    ]  # fmt: skip


class Fail(Callback):
    """Raise in one hook."""

    def __init__(self, hook, error):
        self.error = error
        setattr(self, hook, self.fail)

    def fail(self, trainer, *details):
        raise self.error


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


def test_logs_have_the_keys_of_the_history():
    seen = {}

    class Keys(Callback):
        def on_scores(self, trainer, epoch, logs):
            seen["scores"] = set(logs)

        def on_epoch_end(self, trainer, epoch, logs):
            seen["epoch"] = set(logs)

    history = make_trainer(val=make_batches(1), callbacks=[Keys()]).fit(1)
    assert seen["scores"] == seen["epoch"] == set(history)


def test_an_error_in_a_callback_is_raised_and_the_epoch_counts():
    trainer = make_trainer(callbacks=[At("on_scores", 1, raising(RuntimeError("oops")))])
    with pytest.raises(RuntimeError, match="oops"):
        trainer.fit(2)
    assert trainer.epoch == 1 and len(trainer.history["train_loss"]) == 1


def test_an_error_in_on_scores_does_not_cost_the_record_of_the_epoch(tmp_path):
    callbacks = [CheckpointCallback(tmp_path, "train_loss"), At("on_scores", 1, boom)]
    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(callbacks=callbacks).fit(2)
    assert (tmp_path / "last.pt").exists()


def test_validating_in_a_hook_changes_nothing():
    straight = shuffled()
    straight.fit()
    watched = shuffled([At("on_batch_end", 4, lambda trainer: trainer.validate())])
    watched.fit()
    assert same_state(straight, watched)


def test_a_display_that_fails_is_switched_off():
    class Broken(Callback):
        is_display = True

        def on_batch_end(self, trainer, batch, logs):
            raise OSError("the browser is gone")

    with pytest.warns(UserWarning, match="Broken failed and is switched off") as caught:
        make_trainer(callbacks=[Broken()]).fit(2)
    assert len(caught) == 1


class Average(Callback):
    """Adds a score, as one of an averaged model would be added."""

    def on_scores(self, trainer, epoch, logs):
        logs["val_ema_IoU"] = 0.5 + 0.1 * epoch


def test_a_score_that_a_callback_adds_keeps_the_best_model(tmp_path):
    """It was monitored, but not found: no best file, and no word."""
    kept = CheckpointCallback(tmp_path, monitor="val_ema_IoU", mode="max")
    trainer = make_trainer(val=make_batches(1), callbacks=[Average(), kept])
    assert trainer.fit(3)["val_ema_IoU"] == [0.5, 0.6, 0.7]
    assert kept.best_path is not None and kept.best_score == 0.7


def test_a_hook_of_another_library_is_refused():
    class Lightning(Callback):
        def on_train_epoch_end(self, trainer, module):
            pass

    with pytest.raises(TypeError, match="is no hook.*Did you mean on_epoch_end?"):
        make_trainer(callbacks=[Lightning()])


# The loggers of the recipes.


def recipe(name):
    """Return the source of a class from the recipes: from a cell, or from a block of text."""
    cells = json.loads((ROOT / "nbs" / "tutorials" / "50_recipes.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.S)]
    source = next(text for text in [*blocks, *texts] if f"class {name}(" in text)
    return source.partition("\n\n\ntrainer_for(")[0]


def logger(name, *args, **options):
    space = {"Callback": Callback, "Path": Path}
    exec(recipe(name), space)
    return space[name](*args, **options)


def test_the_recipe_for_a_table_has_a_row_per_epoch_also_after_a_resume(tmp_path):
    def make():
        log = logger("CSVLog", tmp_path / "scores.csv")
        return make_trainer(val=make_batches(2), callbacks=[log, CheckpointCallback(tmp_path)])

    make().fit(2)
    trainer = make()
    trainer.resume(tmp_path)
    history = trainer.fit(1)
    with open(tmp_path / "scores.csv", newline="") as file:
        names, *rows = csv.reader(file)
    assert names == ["epoch", *history] and [row[0] for row in rows] == ["1", "2", "3"]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    assert all(str([*map(float, columns[name])]) == str(history[name]) for name in history)


class Recorder:
    """Stands for a writer of TensorBoard, and for a run of Weights & Biases."""

    def __init__(self, *args, **options):
        self.calls = [("open", *args, options)]

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, *args, options))


def test_the_recipe_for_tensorboard_logs_each_score_by_epoch(monkeypatch):
    board = types.SimpleNamespace(SummaryWriter=Recorder)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    trainer = make_trainer(val=make_batches(2), callbacks=[logger("TensorBoardLog", "runs")])
    history = trainer.fit(2)
    opened, *scalars, closed = trainer.callbacks[0].writer.calls
    assert opened == ("open", "runs", {"purge_step": 1}) and closed == ("close", {})
    logged = [(name, step) for _, name, _, step, _ in scalars]
    assert logged == [(name, epoch) for epoch in (1, 2) for name in history]
    trainer.fit(1)
    assert trainer.callbacks[0].writer.calls[0] == ("open", "runs", {"purge_step": 3})


def test_the_recipe_for_weights_and_biases_logs_scores_and_settings(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Recorder))
    trainer = make_trainer(callbacks=[logger("WandbLog", project="eo")], seed=3)
    history = trainer.fit(2)
    opened, *logged, closed = trainer.callbacks[0].logged.calls
    assert opened[1]["project"] == "eo" and opened[1]["config"]["seed"] == 3
    assert [(name, list(logs), rest) for name, logs, rest in logged] == [
        ("log", list(history), {"step": epoch}) for epoch in (1, 2)
    ]
    assert closed == ("finish", {})
