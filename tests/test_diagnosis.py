"""What users meet, explained where it happens; and `check`, which looks for it beforehand."""

import os
import re
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from conftest import make_batches, make_trainer, same_history, same_state, small_net
from ununennium import Callback, CheckpointCallback, EarlyStopping, MaskedLoss
from ununennium.training.step import TrainingDiverged


class Named(Dataset):
    """Samples with file names; some have an infinite pixel."""

    def __init__(self, bad=(), count=12):
        image, mask = make_batches(1, size=count)[0]
        self.image, self.mask = image, mask
        for number in bad:
            self.image[number, 0, 0, 0] = torch.inf

    def __len__(self):
        return len(self.image)

    def __getitem__(self, number):
        return {
            "image": self.image[number], "mask": self.mask[number],
            "filename": f"tile_{number}.tif",
        }  # fmt: skip


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


@pytest.mark.parametrize("optimizer", [None, fused])
def test_the_file_of_a_bad_image_is_named(optimizer):
    """Alone where the step was decided on the host, with its batch where on the device."""
    trainer = make_trainer(DataLoader(Named(bad=[5]), 4), optimizer=optimizer)
    with pytest.warns(UserWarning, match=r"batch index 1 \(filename .*tile_5.tif") as caught:
        trainer.fit(1)
    alone = "tile_4.tif" not in str(caught[0].message)
    assert alone == (optimizer is None)


def test_without_names_the_sample_is_counted():
    batches = make_batches(3, size=4)
    batches[2][0][3, 1] = torch.nan
    with pytest.warns(UserWarning, match=r"batch index 2 \(sample 3\), where the input"):
        make_trainer(batches).fit(1)


def test_an_exploding_loss_is_told_from_its_beginning():
    """The loss squares itself from step 7 on, until it overflows."""

    class Explode(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = nn.Conv2d(4, 3, 1), 0

        def forward(self, x):
            self.calls += 1
            scale = 1.0 if self.calls < 7 else 10.0 ** min(2.0 ** (self.calls - 6), 39.0)
            return self.net(x) * scale

    trainer = make_trainer(make_batches(40), model=Explode(), max_skipped_steps=5)
    with pytest.raises(
        TrainingDiverged, match=r"grew from step 7 on: .* norms were .* before, and .* after"
    ):
        trainer.fit(1)


def test_out_of_memory_says_what_to_halve():
    class Full(nn.Conv2d):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer = make_trainer(make_batches(2, size=8), model=Full(4, 3, 1), accumulation_steps=2)
    advice = r"Tried to allocate.*\nHalve the loader's batch_size \(8 to 4\) .*\(2 to 4\)"
    with pytest.raises(torch.OutOfMemoryError, match=advice):
        trainer.fit(1)


def test_a_killed_worker_is_explained():
    class Deadly(Named):
        def __getitem__(self, number):
            if number == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(number)

    trainer = make_trainer(DataLoader(Deadly(), 4, num_workers=1))
    with pytest.raises(RuntimeError, match="worker .*\n?.*ended from outside"):
        trainer.fit(1)


def test_an_error_in_a_worker_keeps_its_traceback():
    class Broken(Named):
        def __getitem__(self, number):
            raise KeyError("band B08")

    trainer = make_trainer(DataLoader(Broken(), 4, num_workers=1))
    with pytest.raises(KeyError, match="(?s)worker process 0.*__getitem__.*band B08"):
        trainer.fit(1)


def test_a_batch_norm_with_one_value_is_explained():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8))
    model = nn.Sequential(model, nn.Upsample(scale_factor=8), nn.Conv2d(8, 3, 1))
    trainer = make_trainer(DataLoader(Named(count=9), 4), model=model)
    with pytest.raises(ValueError, match=r"more than 1 value.*\nA batch norm .*drop_last=True"):
        trainer.fit(1)


# The look beforehand.


def checked(capsys, *args, **options):
    trainer = make_trainer(*args, **options)
    problems = trainer.check()
    return problems, capsys.readouterr().out


def test_a_check_changes_nothing():
    def make():
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 3, 1)
        )
        loader = DataLoader(Named(), 4, shuffle=True, generator=torch.Generator().manual_seed(1))
        return make_trainer(loader, make_batches(2), model=model)

    plain, looked = make(), make()
    torch.manual_seed(5)
    plain.fit(2)
    torch.manual_seed(5)
    looked.check()
    assert looked.global_step == 0 and looked.model[0].weight.grad is None
    looked.fit(2)
    assert same_state(plain, looked) and same_history(plain.history, looked.history)


def test_a_check_in_the_middle_of_an_epoch_changes_nothing():
    from test_continuation import At

    runs = []
    for looks in (False, True):
        stop = At(2, lambda trainer: trainer.request_stop("look"))
        loader = DataLoader(Named(), 4, shuffle=True, num_workers=1, persistent_workers=True)
        trainer = make_trainer(loader, callbacks=[stop])
        torch.manual_seed(5)
        trainer.fit(2)
        if looks:
            trainer.check()
        trainer.fit(2)
        runs.append(trainer)
    assert same_state(*runs)


def test_a_sound_run_has_a_short_report(capsys):
    problems, out = checked(capsys, DataLoader(Named(), 4), make_batches(1))
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


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda image, mask: (image * 3000, mask), "not normalised"),
        (lambda image, mask: (image.index_fill(0, torch.tensor([1]), torch.nan), mask), "NaN"),
        (lambda image, mask: (image.index_fill(1, torch.tensor([2]), 0.5), mask), "Channels [2]"),
        (lambda image, mask: (image, torch.full_like(mask, 255)), "no label that counts"),
    ],
)  # fmt: skip
def test_suspicious_batches(capsys, spoil, expected):
    batches = [spoil(image, mask) for image, mask in make_batches(2)]
    problems, out = checked(capsys, batches)
    assert any(expected in problem for problem in problems), problems
    assert all(problem in out for problem in problems)


def test_labels_outside_the_classes_with_a_loss_of_ones_own(capsys):
    def loss(output, target):
        return nn.functional.cross_entropy(output, target.clamp(0, 2))

    problems, _ = checked(capsys, make_batches(2), loss=loss)
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
def test_an_output_that_the_loss_does_not_take(end, loss, expected):
    model = nn.Sequential(nn.Conv2d(4, 3, 1), end)
    problems = make_trainer(make_batches(2), loss=loss, model=model).check()
    assert len(problems) == (expected is not None)
    assert all(re.search(expected, problem) for problem in problems)


def test_what_the_run_would_raise_is_raised():
    batches = [(image, mask + 3) for image, mask in make_batches(2)]
    with pytest.raises(ValueError, match="outside the model's 3 classes"):
        make_trainer(batches).check()


def test_a_monitor_that_will_never_come(capsys, tmp_path):
    callbacks = [EarlyStopping("val_iou", mode="max"), CheckpointCallback(tmp_path, "val_loss")]
    problems, _ = checked(capsys, make_batches(2), make_batches(1), callbacks=callbacks)
    assert len(problems) == 1 and "Did you mean 'val_IoU'?" in problems[0]
    assert not list(tmp_path.iterdir())


def test_an_iterator_is_not_used_up(capsys):
    batches = iter(make_batches(3))
    problems, out = checked(capsys, batches)
    assert problems == [] and "only once" in out and len(list(batches)) == 3


def test_a_bad_batch_of_validation_says_so():
    image, mask = make_batches(1)[0]
    named = {"image": image, "mask": mask + 7, "filename": ["a.tif", "b.tif"]}
    trainer = make_trainer(val=[named])
    where = r"batch index 0 of the validation loader \(filename a.tif, b.tif\)\."
    for attempt in (trainer.validate, trainer.check):
        with pytest.raises(ValueError, match=where):
            attempt()


def test_a_check_of_a_frozen_model_says_what_a_fit_would():
    trainer = make_trainer(model=small_net())
    trainer.model.requires_grad_(False)
    for attempt in (trainer.check, lambda: trainer.fit(1)):
        with pytest.raises(ValueError, match="does not depend on the model's parameters"):
            attempt()


def test_a_batch_of_nothing_but_nodata_has_one_problem(capsys):
    image, mask = make_batches(1)[0]
    problems = make_trainer([(image, torch.full_like(mask, 255))]).check()
    assert problems == ["The batch has no label that counts: all of it is ignored."]
    assert "labels none; 100.0% ignored" in capsys.readouterr().out


def test_targets_of_floats_are_described(capsys):
    target = torch.tensor([1.0, 3.0, float("nan"), 5.0]).reshape(1, 1, 2, 2)
    model = nn.Conv2d(4, 1, 1)
    loss = MaskedLoss(nn.MSELoss(reduction="none"))
    make_trainer([(torch.rand(1, 4, 2, 2), target)], model=model, loss=loss).check()
    assert "mean 3, standard deviation 2; 25.0% not finite" in capsys.readouterr().out


def test_bands_that_the_model_does_not_take():
    trainer = make_trainer([(torch.rand(2, 6, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))])
    with pytest.raises(ValueError, match="image has 6 channels and the model takes 4"):
        trainer.fit(1)


def test_loading_while_a_fit_runs_is_refused(tmp_path):
    path = make_trainer().save_checkpoint(tmp_path / "a.pt")

    class Load(Callback):
        def on_batch_end(self, trainer, batch, logs):
            trainer.load_checkpoint(path)

    with pytest.raises(RuntimeError, match=r"cannot be loaded while fit\(\) runs"):
        make_trainer(callbacks=[Load()]).fit(1)


def test_the_reason_of_a_stop_is_one_line():
    class Broken(Named):
        def __getitem__(self, number):
            raise OSError("the archive is gone")

    trainer = make_trainer(DataLoader(Broken(), 4, num_workers=1))
    with pytest.raises(OSError, match="Original Traceback"):
        trainer.fit(1)
    assert trainer.stop_reason == "OSError: Caught OSError in DataLoader worker process 0."
