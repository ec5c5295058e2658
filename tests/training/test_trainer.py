"""The façade: what `fit` counts, what can be trained, and what a dropped trainer leaves behind."""

import collections
import gc
import multiprocessing

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from small import make_batches, make_trainer, small_net
from ununennium import Callback


@pytest.mark.parametrize("epochs", [-1, 1.5, True])
def test_fit_refuses_other_numbers(epochs):
    error = ValueError if epochs == -1 else TypeError
    with pytest.raises(error, match="must be a whole number"):
        make_trainer().fit(epochs)


Pair = collections.namedtuple("Pair", ["images", "labels"])


def test_batches_of_every_kind_are_the_same():
    pairs = make_batches(3)
    kinds = [
        pairs,
        [
            {"image": image, "mask": mask, "crs": object(), "bounds": (0, 1)}
            for image, mask in pairs
        ],
        [{"image": image, "label": mask} for image, mask in pairs],
        [list(pair) for pair in pairs],
        [Pair(*pair) for pair in pairs],
        [type("Batch", (), {"images": image, "labels": mask})() for image, mask in pairs],
    ]
    histories = [make_trainer(batches, batches).fit(2) for batches in kinds]
    assert all(history == histories[0] for history in histories)


IMAGE, MASK = torch.randn(2, 4, 8, 8), torch.randint(3, (2, 8, 8))


def test_inputs_may_be_of_any_structure():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return {"out": self.net(x["series"].mean(1)), "aux": None}

    batches = [({"series": torch.randn(2, 5, 4, 8, 8), "days": ["a", "b"]}, MASK)]
    loss = lambda output, target: nn.functional.cross_entropy(output["out"], target)
    history = make_trainer(batches, batches, model=Mean(), loss=loss).fit(1)
    assert "val_IoU" in history


def test_loss_parts_are_in_the_history():
    def loss(output, target):
        fit = nn.functional.cross_entropy(output, target, ignore_index=255)
        return {"fit": fit, "loss": fit + 1.0}

    trainer = make_trainer(val=make_batches(2), loss=loss, ignore_index=255)
    history = trainer.fit(2)
    assert history["train_loss"][0] == pytest.approx(history["train_fit"][0] + 1.0)
    assert history["val_loss"][1] == pytest.approx(history["val_fit"][1] + 1.0)
    assert trainer.directions["val_loss"] == "min" and "val_fit" not in trainer.directions


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_workers_end_at_once_when_a_trainer_is_dropped(monkeypatch, stops, persistent):
    """A worker that misses the message is killed after PyTorch has waited for it."""

    class Look(Callback):
        def on_batch_end(self, trainer, batch, logs):
            workers[:] = multiprocessing.active_children()
            if stops:
                trainer.request_stop("enough")

    workers, killed = [], []
    terminate = multiprocessing.process.BaseProcess.terminate
    samples = [
        (image, mask) for batch in make_batches(4) for image, mask in zip(*batch, strict=True)
    ]
    loader = DataLoader(samples, 2, num_workers=2, persistent_workers=persistent)
    trainer = make_trainer(loader, loader, callbacks=[Look()])
    trainer.fit(1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 2.0)
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess,
        "terminate",
        lambda worker: [killed.append(worker), terminate(worker)],
    )
    del trainer, loader
    gc.collect()
    assert len(workers) >= 2 and not killed


def test_scores_without_a_prefix_have_plain_names():
    """`validate(prefix="")` gave `_loss`."""
    trainer = make_trainer(val=make_batches(1))
    assert {"loss", "IoU"} <= trainer.validate(prefix="").keys()
    assert {"test_loss", "test_IoU"} <= trainer.validate(prefix="test").keys()
