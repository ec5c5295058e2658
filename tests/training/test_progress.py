"""How a run is shown: lines, bars, and the choice between them and the dashboard."""

import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ununennium.training.progress as module
from small import At, make_batches, make_trainer, raising
from ununennium import Dashboard
from ununennium.notebook.kernel import has_front_end
from ununennium.training.progress import (
    BarProgress,
    Pace,
    TextProgress,
    default_display,
    epoch_line,
    find_dashboard,
    size_of,
    start_line,
)


@pytest.fixture
def front_end(monkeypatch):
    """Let the choice believe that a notebook is open, with all libraries."""
    pytest.importorskip("anywidget")
    pytest.importorskip("plotly")
    monkeypatch.setattr(module, "running_kernel", lambda: "a kernel")
    monkeypatch.setattr(module, "has_front_end", lambda: True)


class Stream(IterableDataset):
    def __iter__(self):
        yield from make_batches(4)


def test_a_bar_takes_loaders_without_a_length():
    stream = DataLoader(Stream(), batch_size=None)
    cycle = lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8)
    for loader in (stream, iter(make_batches(3))):
        bar = BarProgress()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_trainer(loader, scheduler=cycle, callbacks=[bar]).fit(1)


def test_a_headless_run_shows_progress_as_text():
    assert not has_front_end()
    assert type(default_display("auto")).__name__ in ("BarProgress", "TextProgress")
    assert default_display("none") is None


def test_a_dashboard_that_you_pass_is_not_doubled(front_end):
    trainer = make_trainer(make_batches(2), callbacks=[Dashboard()], progress="auto")
    assert sum(getattr(callback, "is_display", False) for callback in trainer.callbacks) == 1
    assert type(default_display("auto")) is Dashboard


def test_missing_libraries_are_named(front_end, monkeypatch):
    monkeypatch.setattr(module, "missing_libraries", lambda: ["plotly"])
    with pytest.warns(
        UserWarning, match=re.escape("needs plotly: pip install 'ununennium[notebook]'")
    ):
        default_display("auto")
    with pytest.raises(ImportError, match="needs plotly"):
        default_display("dashboard")


def test_a_dashboard_of_your_own_without_plotly_says_what_to_install(shown, monkeypatch):
    monkeypatch.setattr(module, "missing_libraries", lambda: ["plotly"])
    trainer = make_trainer(make_batches(2), callbacks=[Dashboard()])
    with pytest.warns(UserWarning, match="is switched off; training continues") as caught:
        trainer.fit(1)
    assert str(caught[0].message).endswith("needs plotly: pip install 'ununennium[notebook]'.")


def test_a_dashboard_needs_a_kernel():
    with pytest.raises(ValueError, match="needs a Jupyter kernel"):
        make_trainer(make_batches(2), progress="dashboard")


def test_two_dashboards_are_refused():
    with pytest.raises(ValueError, match="2 dashboards"):
        make_trainer(make_batches(1), callbacks=[Dashboard(), Dashboard()])


def test_the_dashboard_is_found_among_the_callbacks():
    dashboard = Dashboard()
    assert find_dashboard([TextProgress(), dashboard]) is dashboard
    assert find_dashboard([TextProgress()]) is None


def test_a_terminal_gets_a_bar_and_a_log_gets_text(monkeypatch):
    for is_terminal, kind in ((True, BarProgress), (False, TextProgress)):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=is_terminal: answer)
        assert type(default_display("auto")) is kind


def test_a_line_names_the_worst_class_and_what_went_wrong():
    scores = {"train_loss": 0.51234, "val_IoU": 0.61, "val_IoU_classes": 2.0, "lr": 0.0003}
    scores |= {"val_IoU/water": 0.91, "val_IoU/1": 0.31, "val_IoU/snow": float("nan")}
    scores |= {"train_skipped_steps": 1.0, "train_empty_batches": 2.0}
    assert epoch_line(SimpleNamespace(goal=20), 4, scores) == (
        "epoch 5/20  train_loss 0.5123  val_IoU 0.6100 (2 of 3 classes, lowest 0.310 for class 1)"
        "  lr 0.0003  1 step skipped  2 batches empty"
    )


def test_a_bar_and_text_write_the_same_lines(capsys):
    for kind in (TextProgress, BarProgress):
        trainer = make_trainer(make_batches(3), make_batches(1), callbacks=[kind()])
        trainer.fit(2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[:3] == lines[3:] and lines[2].startswith("epoch 2/2  train")
    assert lines[0] == "Sequential (83 parameters) on cpu, float32: 3 batches per epoch"


def test_a_bar_announces_above_itself(monkeypatch, capsys):
    from tqdm import tqdm

    written = []
    monkeypatch.setattr(tqdm, "write", lambda text, file: written.append((text, file)))
    BarProgress().announce("Stopping after this step.")
    TextProgress().announce("Stopping after this step.")
    assert written == [("Stopping after this step.", sys.stdout)]
    assert capsys.readouterr().out == "Stopping after this step.\n"


def test_lines_tell_how_long_an_epoch_took_and_how_long_the_rest_will():
    pace = Pace()
    pace.begun, pace.last = pace.begun - 150, pace.last - 90
    pace.epochs = 1
    assert pace.note(4) == "1 min 30 s, 5 min 00 s left"
    assert pace.note(3) == ""  # in less than a second
    pace.last -= 12
    assert pace.note(0) == "12 s"


def test_the_first_line_of_a_run_says_what_is_trained():
    loader = DataLoader(TensorDataset(torch.zeros(10, 4), torch.zeros(10).long()), batch_size=4)
    model = nn.Linear(4, 500)
    trainer = make_trainer(loader, model=model, loss=nn.CrossEntropyLoss())
    assert start_line(trainer) == (
        "Linear (2.5 k parameters) on cpu, float32: 3 batches of 4 per epoch"
    )
    trainer.train_loader = iter([])
    assert start_line(trainer) == "Linear (2.5 k parameters) on cpu, float32"
    half = make_trainer(loader, model=model, device="cpu", amp_dtype="bfloat16")
    assert "bfloat16" in start_line(half)
    assert [size_of(n) for n in (999, 1000, 99_960, 999_600, 12_400_000)] == [
        "999", "1.0 k", "100 k", "1.0 M", "12 M",
    ]  # fmt: skip


def explode(output, target):
    return nn.functional.cross_entropy(output, target, ignore_index=255) * 1e9


def test_a_huge_loss_is_shown_with_a_power_of_ten(capsys):
    bar, shown = BarProgress(), []
    look = At("on_batch_end", 1, lambda trainer: shown.append(bar.bar.postfix))
    trainer = make_trainer(loss=explode, ignore_index=255, callbacks=[bar, look])
    (loss,) = trainer.fit(1)["train_loss"]
    assert f"train_loss {loss:.3e}  " in capsys.readouterr().out
    assert re.fullmatch(r"loss=\d\.\d{3}e\+09", shown[0])


@pytest.mark.parametrize("display", [TextProgress, BarProgress])
@pytest.mark.parametrize(
    ("hook", "when", "where"),
    [
        ("on_batch_end", 3, "in epoch 1, after batch 3"),
        ("on_batch_end", 9, "in epoch 2, after batch 3"),
        ("on_batch_start", 1, "in epoch 1"),
        ("on_epoch_start", 2, "after epoch 1"),
        ("on_epoch_end", 1, "after epoch 1"),
    ],
)
def test_an_error_is_told_once_and_the_line_says_where(display, hook, when, where, capsys):
    callbacks = [At(hook, when, raising(ValueError("The mask has the label 7."))), display()]
    trainer = make_trainer(callbacks=callbacks)
    with pytest.raises(ValueError, match="label 7"):
        trainer.fit(3)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"stopped by an error {where}: ValueError"
    assert "label 7" not in out
    trainer.request_stop("unheard of")  # a new fit forgets it, and the error
    trainer.fit(1)
    assert "stopped" not in capsys.readouterr().out


def test_an_interrupt_is_no_error(capsys):
    trainer = make_trainer(
        callbacks=[At("on_batch_end", 3, raising(KeyboardInterrupt())), TextProgress()]
    )
    trainer.fit(1)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "stopped (epoch 1, after batch 3): interrupted"
    )
