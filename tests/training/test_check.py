"""`check`: one batch forward and backward, a short report, and nothing changed."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from small import AtStep, Named, make_batches, make_trainer, same_history, same_state, small_net
from ununennium import CheckpointCallback, EarlyStopping, Loop, MaskedLoss, Trainer

# Nothing changes.


def test_a_check_changes_nothing():
    def make():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 3, 1)
        )
        loader = DataLoader(Named(), 4, shuffle=True, generator=torch.Generator().manual_seed(1))
        return make_trainer(loader, make_batches(2), model=model)

    plain, checked = make(), make()
    torch.manual_seed(5)
    plain.fit(2)
    torch.manual_seed(5)
    checked.check()
    assert checked.global_step == 0 and checked.model[0].weight.grad is None
    checked.fit(2)
    assert same_state(plain, checked) and same_history(plain.history, checked.history)


def test_a_buffer_that_cannot_be_written_is_left_alone():
    model = small_net()
    model.register_buffer("scale", torch.ones(1).expand(3))
    make_trainer(model=model).check()
    assert model.scale.tolist() == [1, 1, 1]


def test_a_check_in_the_middle_of_an_epoch_changes_nothing():
    runs = []
    for looks in (False, True):
        stop = AtStep(2, lambda trainer: trainer.request_stop("look"))
        loader = DataLoader(Named(), 4, shuffle=True, num_workers=1, persistent_workers=True)
        trainer = make_trainer(loader, callbacks=[stop])
        torch.manual_seed(5)
        trainer.fit(2)
        if looks:
            trainer.check()
        trainer.fit(2)
        runs.append(trainer)
    assert same_state(*runs)


def checked_run(capsys, *args, **options):
    trainer = make_trainer(*args, **options)
    problems = trainer.check()
    return problems, capsys.readouterr().out


def test_an_iterator_is_not_used_up(capsys):
    batches = iter(make_batches(3))
    problems, out = checked_run(capsys, batches)
    assert problems == [] and "only once" in out and len(list(batches)) == 3


# What it reports.


def test_a_sound_run_has_a_short_report(capsys):
    problems, out = checked_run(capsys, DataLoader(Named(), 4), make_batches(1))
    assert problems == [] and "nothing suspicious" in out
    lines = (
        "3 batches, 3 steps",
        "(4, 4, 8, 8) float32",
        "labels 0 (",
        "% ignored",
        "output  (4, 3, 8, 8)",
        "gradient norm",
        "kept for the backward pass",
        "val_IoU",
    )
    for line in lines:
        assert line in out, line


def test_targets_of_floats_are_described(capsys):
    target = torch.tensor([1.0, 3.0, float("nan"), 5.0]).reshape(1, 1, 2, 2)
    model = nn.Conv2d(4, 1, 1)
    loss = MaskedLoss(nn.MSELoss(reduction="none"))
    make_trainer([(torch.rand(1, 4, 2, 2), target)], model=model, loss=loss).check()
    assert "mean 3, standard deviation 2; 25.0% not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda image, mask: (image * 3000, mask), "not normalised"),
        (lambda image, mask: (image.index_fill(0, torch.tensor([1]), torch.nan), mask), "NaN"),
        (lambda image, mask: (image.index_fill(1, torch.tensor([2]), 0.5), mask), "Channels [2]"),
        (lambda image, mask: (image, torch.full_like(mask, 255)), "no label that counts"),
    ],
)  # fmt: skip
def test_suspicious_batches_are_reported(capsys, spoil, expected):
    batches = [spoil(image, mask) for image, mask in make_batches(2)]
    problems, out = checked_run(capsys, batches)
    assert any(expected in problem for problem in problems), problems
    assert all(problem in out for problem in problems)


def test_a_batch_of_nothing_but_nodata_has_one_problem(capsys):
    image, mask = make_batches(1)[0]
    problems = make_trainer([(image, torch.full_like(mask, 255))]).check()
    assert problems == ["The batch has no label that counts: all of it is ignored."]
    assert "labels none; 100.0% ignored" in capsys.readouterr().out


def test_labels_outside_the_classes_with_a_loss_of_your_own(capsys):
    def loss(output, target):
        return nn.functional.cross_entropy(output, target.clamp(0, 2))

    problems, _ = checked_run(capsys, make_batches(2), loss=loss)
    assert any("labels [255] outside the model's 3 classes" in problem for problem in problems)


@pytest.mark.parametrize(
    ("end", "loss", "expected"),
    [
        (nn.Identity(), nn.CrossEntropyLoss(ignore_index=255), None),
        (nn.Softmax(1), nn.CrossEntropyLoss(ignore_index=255), "a softmax of its own"),
        (nn.Softmax(1), nn.NLLLoss(ignore_index=255), r"nn\.LogSoftmax\(1\)"),
        (nn.LogSoftmax(1), nn.NLLLoss(ignore_index=255), None),
        (nn.ReLU(), nn.CrossEntropyLoss(ignore_index=255), None),
    ],
)  # fmt: skip
def test_an_output_that_does_not_fit_the_loss_is_reported(end, loss, expected):
    model = nn.Sequential(nn.Conv2d(4, 3, 1), end)
    problems = make_trainer(make_batches(2), loss=loss, model=model).check()
    assert len(problems) == (expected is not None)
    assert all(re.search(expected, problem) for problem in problems)


def test_a_monitored_score_that_the_run_will_not_have(capsys, tmp_path):
    callbacks = [EarlyStopping("val_iou", mode="max"), CheckpointCallback(tmp_path, "val_loss")]
    problems, _ = checked_run(capsys, make_batches(2), make_batches(1), callbacks=callbacks)
    assert len(problems) == 1 and "Did you mean 'val_IoU'?" in problems[0]
    assert not list(tmp_path.iterdir())


# What it raises.


def test_what_the_run_would_raise_is_raised():
    batches = [(image, mask + 3) for image, mask in make_batches(2)]
    with pytest.raises(ValueError, match="outside the model's 3 classes"):
        make_trainer(batches).check()


def test_a_frozen_model_is_refused_as_in_a_fit():
    trainer = make_trainer(model=small_net())
    trainer.model.requires_grad_(False)
    for attempt in (trainer.check, lambda: trainer.fit(1)):
        with pytest.raises(ValueError, match="does not depend on the model's parameters"):
            attempt()


def test_a_loop_of_ones_own_is_mentioned_and_its_parts_are_known(capsys):
    class Mine(Trainer):
        class loop_class(Loop):
            def losses(self, batch):
                return super().losses(batch)

    def parts(output, target):
        loss = nn.functional.cross_entropy(output, target, ignore_index=255)
        return {"loss": loss, "fit": loss}

    base = make_trainer(ignore_index=255)
    keep = CheckpointCallback("unused", "train_fit", "min")
    trainer = Mine(
        base.model, base.optimizer, parts, base.train_loader, callbacks=[keep], config=base.config
    )
    assert trainer.check() == []
    assert "loop_class has its own losses, which this check does not run" in capsys.readouterr().out
