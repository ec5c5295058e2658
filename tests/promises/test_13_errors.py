"""13 · Errors are sentences: what is wrong, with the value, and what to do; and nothing is lost."""

import inspect
import math
import os
import signal
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from small import (
    At,
    Named,
    boom,
    make_batches,
    make_trainer,
    same_state,
    small_net,
    spoiled,
    vector,
)
from ununennium import (
    Callback,
    CheckpointError,
    ConfusionMatrix,
    EarlyStopping,
    MaskedLoss,
    Trainer,
    TrainerConfig,
    remap_labels,
)

# Parts and settings.


def test_parts_that_cannot_be_trained_together():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, batches = nn.CrossEntropyLoss(), make_batches()
    cases = [
        ((print, optimizer, loss, batches), TypeError, "model is of type builtin"),
        ((model, torch.optim.SGD, loss, batches), TypeError, "optimizer is of type type"),
        ((model, optimizer, "ce", batches), TypeError, "loss_fn is of type str"),
        ((model, optimizer, loss, 3), TypeError, "train_loader is of type int"),
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


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.zeros(4, 8, 8), torch.zeros(8, 8, dtype=torch.int64)


def test_swapped_arguments():
    base = make_trainer()
    model, optimizer, loss, batches = base.model, base.optimizer, base.loss_fn, base.train_loader
    for parts, options, message in (
        ((batches, batches, base.config), {}, "TrainerConfig, which has no step.* config="),
        ((batches,), {"callbacks": ["EarlyStopping"]}, "'EarlyStopping' .* none of the hooks"),
        ((batches,), {"callbacks": [EarlyStopping]}, "EarlyStopping is a class"),
        ((batches,), {"config": {"epochs": 3}}, "config is of type dict"),
        ((Samples(),), {}, "is a data set, Samples, .* DataLoader"),
        ((batches,), {"metrics": [ConfusionMatrix(3)]}, "metrics is of type list"),
    ):
        with pytest.raises(TypeError, match=message):
            Trainer(model, optimizer, loss, *parts, **options)
    with pytest.raises(TypeError, match=r"CrossEntropyLoss; pass an instance"):
        Trainer(model, optimizer, nn.CrossEntropyLoss, batches)
    with pytest.raises(ValueError, match="has an ignore_index of its own"):
        MaskedLoss(nn.CrossEntropyLoss(reduction="none"), 255)
    with pytest.raises(TypeError, match="target is a numpy array"):
        make_trainer([(image, mask.numpy()) for image, mask in batches], metrics={}).fit(1)


def test_settings_of_the_wrong_type():
    for settings, message in (
        ({"gradient_clip": "1"}, "gradient_clip='1' must be a number"),
        ({"seed": -1}, "seed=-1 must be a whole number, 0 or more"),
        ({"epochs": 1.5}, "epochs=1.5 must be a whole number"),
        ({"accumulation_steps": True}, "accumulation_steps=True"),
        ({"class_names": ["a", "b"]}, "3 classes, and the length of class_names is 2"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make_trainer(**settings).fit(1)
    assert make_trainer(epochs=np.int64(2)).config.epochs == 2
    base = make_trainer()
    with pytest.raises(TypeError, match=r"pass a list: callbacks=\[...\]"):
        Trainer(base.model, base.optimizer, base.loss_fn, [1], callbacks=EarlyStopping())


def test_settings_that_are_passed_to_the_trainer_itself():
    base = make_trainer()
    parts = base.model, base.optimizer, base.loss_fn, base.train_loader
    for options, message in (
        ({"epochs": 4, "device": "cpu"}, r"config=TrainerConfig\(epochs=4, device='cpu'\)"),
        ({"epochs": 4, "config": base.config}, r"config=TrainerConfig\(epochs=4\)"),
        (
            {"max_epochs": 4},
            r"no argument 'max_epochs'. Did you mean config=TrainerConfig\(epochs=",
        ),
        ({"schedular": None}, r"no argument 'schedular'. Did you mean scheduler=...\?"),
        ({"fold": 1}, r"no argument 'fold'. It takes model, optimizer, .*, metrics."),
    ):
        with pytest.raises(TypeError, match=message):
            Trainer(*parts, **options)
    assert [*inspect.signature(Trainer).parameters][:2] == ["model", "optimizer"]


def test_a_loss_in_the_order_of_keras_is_told_before_it_learns_nonsense():
    def loss(y_true, y_pred):
        return BCE(y_pred, y_true)

    with pytest.warns(UserWarning, match=r"takes \(y_true, y_pred\), .*\(output, target\). Swap"):
        make_trainer(loss=loss)


def test_mps_without_mps_falls_back_as_cuda_does(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("mps", "cuda"):
        with pytest.warns(UserWarning, match=f"on the CPU instead of '{device}'"):
            assert make_trainer(device=device).device == torch.device("cpu")


def test_parameters_without_an_optimizer_are_reported():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[-1] = nn.Conv2d(8, 3, 1)
    with pytest.warns(UserWarning, match="does not hold 2 .* such as 3.weight"):
        Trainer(model, optimizer, nn.CrossEntropyLoss(), make_batches())


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
    with pytest.raises(
        ValueError, match="train_loader is of type generator, .* read once, .* 2 epochs"
    ):
        trainer.fit(2)
    trainer.fit(1)
    with pytest.raises(ValueError, match="gave no batch in epoch 2.* read before"):
        trainer.fit(1)
    assert trainer.epoch == 1 and trainer.global_step == 3
    with pytest.raises(ValueError, match="validation loader gave no batch"):
        trainer.validate([])
    with pytest.raises(ValueError, match="nothing to validate on"):
        trainer.validate()


def test_a_fit_within_a_fit_is_refused():
    class Again(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            trainer.fit(1)

    trainer = make_trainer(callbacks=[Again()])
    with pytest.raises(RuntimeError, match="while a fit of this trainer runs"):
        trainer.fit(1)
    trainer.callbacks.clear()
    trainer.fit(1)


# Batches.


BCE = nn.BCEWithLogitsLoss()


IMAGE, MASK = torch.randn(2, 4, 8, 8), torch.randint(3, (2, 8, 8))


BAD_BATCHES = {
    "labels beyond the classes": (
        (IMAGE, MASK + 5), None, 3, r"labels outside the model's 3 classes 0..2: 5 \(\d+ times\)"),
    "one label beyond": (
        (IMAGE, torch.full_like(MASK, 9)), None, 3, "9 .* or set these pixels to 255"),
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


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 4, 8, 8), np.float32), r"numpy array.* torch.from_numpy"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), r"torch.uint8 .* image.float\(\)"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.float64), r"torch.float64 .* image.float\(\)"),
    ],
)
def test_images_of_the_wrong_type(image, message):
    with pytest.raises(TypeError, match=message):
        make_trainer([(image, torch.zeros(2, 8, 8, dtype=torch.int64))]).fit(1)


def test_labels_that_start_at_one():
    batches = [(image, mask.clamp(max=2) + 1) for image, mask in make_batches(2, nodata=0.0)]
    with pytest.raises(ValueError, match="start at 1: subtract 1"):
        make_trainer(batches).fit(1)


def test_a_batch_of_labels_outside_the_classes_is_an_error_and_not_empty():
    batches = [(image, torch.full_like(mask, 7)) for image, mask in make_batches(2)]
    with pytest.raises(ValueError, match=r"7 \(128 times\)"):
        make_trainer(batches, loss=nn.CrossEntropyLoss(torch.ones(3))).fit(1)


def test_bands_that_do_not_fit_the_model():
    trainer = make_trainer([(torch.rand(2, 6, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))])
    with pytest.raises(ValueError, match="image has 6 channels and the model takes 4"):
        trainer.fit(1)


def test_images_with_their_channels_last():
    trainer = make_trainer([(torch.rand(4, 32, 32, 4), torch.zeros(4, 32, 32, dtype=torch.long))])
    with pytest.raises(
        ValueError, match=r"channels last, .* in the dataset: image.permute\(2, 0, 1"
    ):
        trainer.fit(1)


def test_one_hot_masks():
    one_hot = nn.functional.one_hot(MASK, 3)
    for mask, cure in ((one_hot.movedim(-1, 1), r"argmax\(1\)"), (one_hot, r"argmax\(-1\)")):
        with pytest.raises(ValueError, match=f"The mask is one-hot: pass target.{cure}"):
            make_trainer([(IMAGE, mask)]).fit(1)


def test_one_bad_label_is_an_annotation_error_in_a_sample_of_a_batch():
    batches = make_batches(9, size=4)
    batches[7][1][3, 2, 2] = 7
    message = r"7 \(1 time\) in sample 3; ignore_index is 255. Correct the mask, .*"
    with pytest.raises(ValueError, match=rf"(?s){message}This is batch index 7 of train_loader."):
        make_trainer(batches).fit(1)
    tiles = Named()
    tiles.mask[6, 1, 1] = 7
    for loaders in ([DataLoader(tiles, 4)], [None, DataLoader(tiles, 4)]):
        with pytest.raises(ValueError, match=r"(?s)in filename tile_6.tif; .* batch index 1 of"):
            make_trainer(*loaders).fit(1)


def test_label_ids_with_gaps():
    ids = torch.tensor([10, 20, 30])
    batches = [(IMAGE, ids[MASK])]
    with pytest.raises(ValueError, match=r"remap_labels\(mask, \[10, 20, 30\]\)"):
        make_trainer(batches).fit(1)
    batches = [remap_labels(batch, [10, 20, 30]) for batch in batches]
    assert make_trainer(batches).fit(1)["train_skipped_steps"] == [0]


def test_a_loss_that_takes_no_data_for_a_class():
    class Dice(nn.Module):
        def forward(self, output, target):
            hot = torch.zeros_like(output).scatter_(1, target[:, None], 1)
            return 1 - (output.softmax(1) * hot).mean()

    message = (
        r"label 255, which means no data .*, and the loss Dice does not leave it out. Pass one"
    )
    for attempt in (lambda trainer: trainer.fit(1), lambda trainer: trainer.check()):
        with pytest.raises(RuntimeError, match=message):
            attempt(make_trainer(loss=Dice(), ignore_index=255))


def test_a_loss_with_its_arguments_swapped():
    def loss(a, b):
        return nn.functional.cross_entropy(b, a, ignore_index=255)

    with pytest.raises(RuntimeError, match=r"seems to take the target first. Swap its parameters."):
        make_trainer(loss=loss).fit(1)


class HuggingFace(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = small_net(), kind

    def forward(self, image):
        return self.kind(logits=self.net(image))


@pytest.mark.parametrize("kind", [SimpleNamespace, dict])
def test_outputs_with_logits_are_understood(kind):
    """By a plain loss and by the scores, as if the model had returned the logits alone."""
    plain, wrapped = (
        make_trainer(val=make_batches(2), model=model) for model in (None, HuggingFace(kind))
    )
    assert wrapped.fit(2) == plain.fit(2)
    assert wrapped.check() == []


def test_class_names_must_match():
    with pytest.raises(ValueError, match="3 classes, .* class_names is 2"):
        make_trainer(class_names=["a", "b"]).validate(make_batches())


def test_a_bad_batch_of_validation_is_named():
    image, mask = make_batches(1)[0]
    named = {"image": image, "mask": mask + 7, "filename": ["a.tif", "b.tif"]}
    trainer = make_trainer(val=[named])
    where = r"batch index 0 of the validation loader \(filename a.tif, b.tif\)\."
    for attempt in (trainer.validate, trainer.check):
        with pytest.raises(ValueError, match=where):
            attempt()


def test_a_validation_loss_that_is_not_finite_is_explained():
    trainer = make_trainer()
    with pytest.warns(UserWarning, match=r"of 1 batch is not finite, first at batch index 2"):
        scores = trainer.validate(spoiled(2, count=4))
    assert math.isnan(scores["val_loss"])


def messages_of(trainer, epochs=1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(epochs)
    return [str(warning.message) for warning in caught]


def test_nan_in_targets_is_not_blamed_on_the_images():
    good = [(IMAGE, torch.randn(2, 1, 8, 8)) for _ in range(3)]
    bad = [(image, height.clone()) for image, height in good]
    bad[1][1][1, 0, 0, 0] = math.nan
    model = nn.Conv2d(4, 1, 1)
    (message,) = messages_of(make_trainer(good, bad, model=model, loss=nn.MSELoss()))
    assert "at batch index 1 (sample 1), where the target was not finite" in message
    assert "Look for NaN in the targets; MaskedLoss leaves them out." in message
    assert "images" not in message and "class" not in message  # a regression has no scores
    masked = MaskedLoss(nn.MSELoss(reduction="none"))
    assert messages_of(make_trainer(bad, bad, model=model, loss=masked)) == []


def test_a_diverged_model_is_not_blamed_on_the_data():
    """Neither in training nor in validation, and no class is said to be counted."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e12)

    messages = messages_of(
        make_trainer(val=make_batches(4), optimizer=sgd, gradient_clip=None, max_skipped_steps=99)
    )
    assert len(messages) == 2
    for message in messages:
        assert "where the output was not finite" in message and "images" not in message
        assert "lower the learning rate" in message and "class" not in message


def test_a_bad_image_of_validation_is_named_with_what_the_scores_make_of_it():
    tiles = Named()
    tiles.image[5], tiles.mask[5] = math.nan, 0
    for loader in (DataLoader(tiles, 4), DataLoader(tiles, 4, num_workers=1)):
        (message,) = messages_of(make_trainer(val=loader))
        assert "batch index 1 (filename tile_5.tif), where the input was not finite" in message
        assert message.endswith("Where predictions are NaN, scores count class 0.")
    (message,) = messages_of(make_trainer(val=DataLoader(tiles, 4), metrics={}))
    assert message.endswith("such as unmasked nodata.")
    (message,) = messages_of(make_trainer(val=DataLoader(tiles, 4, shuffle=True)))
    assert "Look for NaN in its images and targets; if there is none, the model" in message


def test_a_best_path_of_none_is_explained():
    trainer = make_trainer()
    with pytest.raises(CheckpointError, match="best_path is None until"):
        trainer.load_checkpoint(None)


# Errors of others.


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


def test_the_reason_of_a_stop_is_one_line():
    class Broken(Named):
        def __getitem__(self, number):
            raise OSError("the archive is gone")

    trainer = make_trainer(DataLoader(Broken(), 4, num_workers=1))
    with pytest.raises(OSError, match="Original Traceback"):
        trainer.fit(1)
    assert trainer.stop_reason == "OSError: the archive is gone (in DataLoader worker process 0)"


# After an error the trainer can continue.


def test_buffers_survive_an_error_before_the_first_step_of_a_fit():
    trainer = make_trainer(callbacks=[At("on_batch_start", 2, boom), At("on_train_start", 2, boom)])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit(1)
    straight = make_trainer()
    trainer.fit(1)
    straight.fit(1)
    assert same_state(trainer, straight)


def test_a_loader_that_raised_is_not_taken_as_finished_silently():
    class Failing:
        def __iter__(self):
            for number, batch in enumerate(make_batches(10)):
                if number == 3:
                    raise OSError("the disk is gone")
                yield batch

    trainer = make_trainer(Failing(), epochs=1)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit()
    again = pytest.warns(
        UserWarning, match="an error in epoch 1, after 3 batches. What followed is read again"
    )
    with again, pytest.raises(OSError, match="the disk is gone"):
        trainer.fit()
    assert (trainer.epoch, trainer.batch) == (0, 3)

    trainer = make_trainer(iter(Failing()), epochs=1)  # which cannot be read again
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit()
    with pytest.warns(UserWarning, match="raised an error on the way, so epoch 1, of 3 batches"):
        trainer.fit()


def test_a_batch_that_could_not_be_unpacked_is_not_lost():
    class Moody(Trainer):
        moods = 0

        def unpack(self, batch):
            self.moods += 1
            if self.moods == 4:
                raise RuntimeError("boom")
            return super().unpack(batch)

    base, straight = make_trainer(), make_trainer()
    trainer = Moody(base.model, base.optimizer, base.loss_fn, base.train_loader, config=base.config)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(1)
    trainer.fit(1)
    straight.fit(1)
    assert same_state(trainer, straight)


@pytest.mark.parametrize("call", ["fit", "check"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_class_weights_of_the_wrong_length_are_told_with_both_numbers(count, call):
    batches = [(image, mask % 4) for image, mask in make_batches(2)]
    loss = nn.CrossEntropyLoss(weight=torch.ones(count))
    trainer = make_trainer(batches, model=small_net(4), loss=loss)
    with pytest.raises(RuntimeError, match="weight tensor") as caught:
        getattr(trainer, call)()
    assert str(caught.value).endswith(
        f"The loss CrossEntropyLoss has weights for {count} class{'' if count == 1 else 'es'}, and "
        "the model has 4. Pass a weight for each class, such as class_weights(count_classes("
        "dataset, num_classes=4)), or build the model for as many classes."
    )


def test_class_weights_inside_a_loss_of_your_own_are_told_as_well():
    def loss(output, target):
        return nn.functional.cross_entropy(output, target % 4, weight=torch.ones(3))

    with pytest.raises(RuntimeError, match=r"has weights for another number of classes, and the m"):
        make_trainer(model=small_net(4), loss=loss).fit(1)


@pytest.mark.parametrize("call", ["fit", "check"])
@pytest.mark.parametrize(
    ("shape", "cure"),
    [
        ((2, 3, 4, 8, 8), "merge two dimensions in the dataset, such as times and bands"),
        ((2, 1, 4, 8, 8), "In the dataset, return image.squeeze(0)."),
        ((8, 8), "Let the dataset give images with their channels, and the loader batch them."),
    ],
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_input_with_a_wrong_number_of_dimensions_is_told_with_its_shape(
    shape, cure, norm_first, call
):
    model = nn.Sequential(nn.BatchNorm2d(4), small_net()) if norm_first else small_net()
    trainer = make_trainer([(torch.ones(shape), torch.zeros(2, 8, 8).long())], model=model)
    with pytest.raises(ValueError, match="dimensions") as caught:
        getattr(trainer, call)()
    text = str(caught.value)
    assert text.startswith(f"The input has {len(shape)} dimensions, {shape}, and the model takes 4")
    assert cure in text and caught.value.__cause__ is not None


def test_a_later_layer_that_wants_other_dimensions_blames_no_input():
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"^expected 2D or 3D input \(got 4D input\)$"):
        make_trainer(model=model).fit(1)
