"""`check`: one batch forward and backward, a short report, and nothing changed."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
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


# What newcomers ran into.


def with_nan(batches):
    image, target = batches[0]
    image = image.clone()
    image[1, 0, 0, 0] = torch.nan
    return [(image, target), *batches[1:]]


def test_clean_validation_images_are_not_blamed_for_a_nan_in_training(capsys):
    """The batch norms of the trial step were still NaN when the validation batch came."""
    trainer = make_trainer(with_nan(make_batches(2)), make_batches(1), model=small_net(norm=True))
    problems = trainer.check()
    assert not [text for text in problems if "validation" in text], problems
    assert [text for text in problems if "The image has NaN or infinity (sample 1)" in text]


def test_steps_are_said_to_be_skipped_only_if_they_are(capsys):
    """A model that uses nanmean trains on NaN, and the check said it would not."""

    class Copes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net(norm=False)

        def forward(self, image):
            return self.inner(image.nan_to_num())

    batches = with_nan(make_batches(2))
    said = {}
    for name, model in (("copes", Copes()), ("spoiled", small_net(norm=False))):
        trainer = make_trainer(batches, model=model)
        (said[name],) = [text for text in trainer.check() if "NaN or infinity" in text]
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            skipped = trainer.fit(1)["train_skipped_steps"][0]
        assert ("skipped" in said[name]) == bool(skipped)
    assert "the model copes with it" in said["copes"]


def test_warnings_of_other_packages_are_not_problems_of_the_run(capsys):
    """A deprecation inside of a data set gave 112 equal lines."""

    class Old(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, number):
            for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                warnings.warn("Use `@` for matrices", category, stacklevel=1)
            warnings.warn("this tile has no projection", UserWarning, stacklevel=1)
            image, mask = make_batches(1)[0]
            return image[0], mask[0]

    problems = make_trainer(DataLoader(Old(), 4)).check()
    assert problems == ["this tile has no projection"]
    assert capsys.readouterr().out.count("!") == 1


def test_a_schedule_of_steps_is_found_by_a_check_too(capsys):
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    trainer = make_trainer(make_batches(4), scheduler=lambda o: cosine(o, T_max=12), epochs=3)
    (problem,) = trainer.check()
    assert "seems to be built for 12 steps" in problem


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda image, target: (image - 16.8, target), "not centred"),
        (lambda image, target: (image, F.one_hot(target, 3).movedim(-1, 1).float()),
         "one-hot"),
    ],
)  # fmt: skip
def test_decibels_and_one_hot_masks_are_told(spoil, said, capsys):
    batches = [spoil(image, target.clamp(max=2)) for image, target in make_batches(2)]
    trainer = make_trainer(batches, loss=nn.CrossEntropyLoss())
    assert [text for text in trainer.check() if said in text]


def test_a_gap_in_heights_is_told_unless_the_loss_knows_it(capsys):
    batches = [(image, torch.rand(len(image), 1, *image.shape[2:])) for image, _ in make_batches(2)]
    batches[0][1][0, 0, 0] = -9999
    for loss, count in (
        (nn.MSELoss(), 1),
        (MaskedLoss(nn.MSELoss(reduction="none")), 1),
        (MaskedLoss(nn.MSELoss(reduction="none"), ignore_index=-9999), 0),
    ):
        problems = make_trainer(batches, model=nn.Conv2d(4, 1, 1), loss=loss).check()
        assert len([text for text in problems if "The target is -9999" in text]) == count


def test_a_gradient_that_is_not_finite_at_a_finite_loss_is_told(capsys):
    def loss(output, target):
        return nn.functional.cross_entropy(output, target, ignore_index=255) + 0 * (
            output.mean() - output.mean()
        ).sqrt()  # fmt: skip

    problems = make_trainer(loss=loss, ignore_index=255).check()
    assert [text for text in problems if text.startswith("The gradient of the first batch is not")]


def test_a_target_of_one_number_has_no_spread_and_no_warning(capsys):
    batches = [(torch.randn(1, 4), torch.randn(1, 1))]
    assert make_trainer(batches, model=nn.Linear(4, 1), loss=nn.MSELoss()).check() == []
