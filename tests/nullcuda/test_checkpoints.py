"""Files go from one kind of optimizer to another and between devices, and hold their moment."""

import pytest
import torch

from nullcuda import counts, late_copies
from nullcuda.runs import make_run, waits_expected
from nullcuda.waits import waits_noted, waits_of
from small import AtStep, boom, stop
from ununennium import Callback, CheckpointCallback
from ununennium.training.checkpoint import load_file


def resumed(tmp_path, before, after, *devices):
    """Stop a run in its second epoch; return one that has taken over its file."""
    first = make_run(before, device=devices[0], callbacks=[AtStep(14, stop)])
    first.fit(2)
    second = make_run(after, device=devices[1])
    second.load_checkpoint(first.save_checkpoint(tmp_path / "a.pt"))
    assert (second.epoch, second.batch) == (1, 4)
    return second


def places(optimizer):
    """Return where `step` and the rest of an optimizer's state lie."""
    states = optimizer.state.values()
    steps = {state["step"].device.type for state in states}
    rest = {x.device.type for state in states for name, x in state.items() if name != "step"}
    return steps, rest


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("AdamW", "AdamW"),
        ("AdamW fused", "AdamW fused"),
        ("AdamW", "AdamW foreach"),
        ("AdamW", "AdamW fused"),
        ("AdamW", "AdamW capturable"),
        ("AdamW fused", "AdamW"),
        ("AdamW capturable", "AdamW one by one"),
        ("AdamW fused", "AdamW capturable"),
    ],
)
def test_a_run_goes_on_with_an_optimizer_of_another_kind(tmp_path, before, after):
    trainer = resumed(tmp_path, before, after, "cuda", "cuda")
    on_device = "fused" in after or "capturable" in after
    assert places(trainer.optimizer) == ({"cuda" if on_device else "cpu"}, {"cuda"})
    found = waits_of(trainer).steady("train")
    assert all(len(lines) == waits_expected(after) for lines in found), found
    assert trainer.epoch == 2


@pytest.mark.parametrize("optimizer", ["momentum", "AdamW", "AdamW fused"])
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")], ids="-".join)
def test_a_run_goes_on_elsewhere(tmp_path, devices, optimizer):
    trainer = resumed(tmp_path, optimizer, optimizer, *devices)
    assert {x.device.type for x in trainer.model.state_dict().values()} == {devices[1]}
    if optimizer != "momentum":
        step = devices[1] if "fused" in optimizer else "cpu"
        assert places(trainer.optimizer) == ({step}, {devices[1]})
    trainer.fit(1)
    assert trainer.epoch == 2


def test_a_file_can_be_read_without_a_gpu(tmp_path):
    trainer = make_run()
    trainer.fit(1)
    saved = torch.load(trainer.save_checkpoint(tmp_path / "a.pt"), weights_only=True)
    assert {x.device.type for x in saved["model"].values()} == {"cpu"}


# Files that are written in the background.


class Fill(Callback):
    """Overwrite the parameters after each step with a number of its own."""

    def __init__(self, offset=0):
        self.offset = offset

    def on_safepoint(self, trainer, phase):
        for parameter in trainer.model.parameters():  # which makes no host wait
            parameter.data.fill_(float(trainer.global_step + self.offset))


def test_a_file_holds_the_tensors_of_its_moment(tmp_path):
    """Copies into pinned memory arrive when the host waits: who does not wait has older bytes."""
    keep = CheckpointCallback(tmp_path, every_n_steps=4, save_on_exception=False)
    trainer = make_run(callbacks=[Fill(), keep, Fill(100), AtStep(4, boom)])
    with late_copies(), pytest.raises(RuntimeError, match="boom"):
        trainer.fit(1)
    saved = load_file(tmp_path / "last.pt")
    for name, _ in trainer.model.named_parameters():
        assert (saved["model"][name] == 4).all(), name


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW fused"])
def test_a_background_file_costs_one_wait(tmp_path, optimizer):
    trainer, lines = make_run(optimizer), []
    trainer.fit(1)
    before = counts()["waits"]
    with waits_noted(lines.append):
        writing = trainer.save_in_background(tmp_path / "a.pt")
    waited = counts()["waits"] - before
    writing.result()
    assert waited == 1, lines
