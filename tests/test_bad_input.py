"""Rule 20: a sentence that names the argument, the value and the fix; and nothing lost."""

import collections

import pytest
import torch
from torch import nn

from conftest import make_batches, make_trainer, small_net, vector
from ununennium import MaskedLoss, Trainer, TrainerConfig

IMAGE, MASK = torch.randn(2, 4, 8, 8), torch.randint(3, (2, 8, 8))
BCE = nn.BCEWithLogitsLoss()

BAD_BATCHES = {
    "labels beyond the classes": (
        (IMAGE, MASK + 5), None, 3, r"labels outside the model's 3 classes 0..2: 5 \(\d+ times\)"),
    "one label beyond": (
        (IMAGE, torch.full_like(MASK, 9)), None, 3, "build the loss with ignore_index=9"),
    "negative labels": ((IMAGE, MASK - 1), None, 3, r"-1 \(\d+ times\)"),
    "a mask of floats for cross-entropy": (
        (IMAGE, MASK.float()), None, 3, r"wants class numbers, .*float32. Pass integers"),
    "a channel too many for cross-entropy": (
        (IMAGE, MASK[:, None]), None, 3, r"labels of shape \(2, 8, 8\), .*squeeze\(1\)"),
    "a mask of another size": ((IMAGE, MASK[:, :4]), None, 3, r"\(2, 8, 8\), but .* \(2, 4, 8\)"),
    "(N,H,W) against (N,1,H,W) for BCE": (
        (IMAGE, (MASK > 1).float()), BCE, 1, r"element by element, .*: target.unsqueeze"),
    "classes for BCE": (
        (IMAGE, MASK[:, None]), BCE, 1, r"outside the model's 2 classes 0..1: 2 \(\d+ times\)"),
    "a dictionary without a mask": (
        {"image": IMAGE, "truth": MASK}, None, 3, r"needs 'image' and 'mask' or 'label', but has"),
    "three parts": ((IMAGE, MASK, MASK), None, 3, "tuple of 3; expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_named_and_nothing_is_lost(name):
    batch, loss, classes, message = BAD_BATCHES[name]
    trainer = make_trainer([batch], model=small_net(classes), loss=loss)
    before = vector(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.fit(1)
    assert torch.equal(vector(trainer.model), before) and trainer.model.training
    assert trainer.history == {} and trainer.global_step == 0
    with pytest.raises(ValueError, match=message):
        trainer.validate([batch])


def once(batches):
    yield from batches


def test_empty_and_exhausted_loaders():
    with pytest.raises(ValueError, match="train_loader is empty: its length is 0"):
        make_trainer([])
    with pytest.raises(ValueError, match="val_loader is empty"):
        make_trainer(val=[])
    dropped = torch.utils.data.DataLoader(range(3), batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="drop_last=True"):
        make_trainer(dropped)
    with pytest.raises(ValueError, match="gave no batch in epoch 1"):
        make_trainer(once([])).fit(1)
    trainer = make_trainer(once(make_batches(3)))
    with pytest.raises(ValueError, match="train_loader is a generator, .* read once, .* 2 epochs"):
        trainer.fit(2)
    trainer.fit(1)
    with pytest.raises(ValueError, match="gave no batch in epoch 2.* read before"):
        trainer.fit(1)
    assert trainer.epoch == 1 and trainer.global_step == 3
    with pytest.raises(ValueError, match="validation loader gave no batch"):
        trainer.validate([])
    with pytest.raises(ValueError, match="nothing to validate on"):
        trainer.validate()


def test_parts_of_a_trainer():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, batches = nn.CrossEntropyLoss(), make_batches()
    cases = [
        ((print, optimizer, loss, batches), TypeError, "model is a builtin"),
        ((model, torch.optim.SGD, loss, batches), TypeError, "optimizer is a type"),
        ((model, optimizer, "ce", batches), TypeError, "loss_fn is a str"),
        ((model, optimizer, loss, 3), TypeError, "train_loader is a int"),
        ((small_net(), optimizer, loss, batches), ValueError, "none of the model's parameters"),
        ((model, optimizer, nn.CrossEntropyLoss(reduction="sum"), batches), ValueError, "'sum'"),
    ]
    for parts, kind, message in cases:
        with pytest.raises(kind, match=message):
            Trainer(*parts, config=TrainerConfig(device="cpu"))
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match="LBFGS"):
        Trainer(model, lbfgs, loss, batches)
    other = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=1.0), 1)
    with pytest.raises(ValueError, match="scheduler belongs to another optimizer"):
        Trainer(model, optimizer, loss, batches, scheduler=other)


def test_losses_that_cannot_be_learned_from():
    for loss, message in [
        (lambda o, t: o.argmax(1).float().mean(), "does not depend on the model's parameters"),
        (
            lambda o, t: nn.functional.cross_entropy(o, t, ignore_index=255, reduction="none"),
            "one number",
        ),
        (lambda o, t: {"ce": o.mean()}, "must be called 'loss'"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            make_trainer(loss=loss).fit(1)
    with pytest.raises(TypeError, match="one number, a scalar tensor; 'loss' is of type float"):
        make_trainer(loss=lambda o, t: 0.5).fit(1)


def test_two_opinions_on_what_is_ignored():
    with pytest.raises(ValueError, match=r"CrossEntropyLoss ignores -100"):
        make_trainer(loss=nn.CrossEntropyLoss(), ignore_index=255)
    with pytest.raises(ValueError, match=r"Pass loss_fn=MaskedLoss"):
        make_trainer(loss=BCE, ignore_index=255)
    masked = MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"), 255)
    assert make_trainer(loss=masked, ignore_index=255).ignore_index == 255
    assert make_trainer(loss=nn.CrossEntropyLoss(), ignore_index=None).ignore_index is None


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


def test_the_rank_of_the_input_is_not_looked_at():
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
