"""Cases that once went wrong, each in a few lines."""

import math
import os
import pickle
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from conftest import make_batches, make_trainer, same_history, same_state, small_net, vector
from ununennium import (
    Callback,
    CheckpointCallback,
    CheckpointError,
    ConfusionMatrix,
    EarlyStopping,
    MaskedLoss,
    Trainer,
)
from ununennium.training.checkpoint import save_file
from ununennium.training.precision import Precision


def spoiled(number=0, count=8):
    batches = make_batches(count)
    batches[number][0][0, 0, 0, 0] = math.nan
    return batches


class At(Callback):
    """Do something once, at the n-th call of a hook."""

    def __init__(self, hook, when, action):
        self.calls, self.when, self.action = 0, when, action
        setattr(self, hook, self.act)

    def act(self, trainer, *details):
        self.calls += 1
        if self.calls == self.when:
            self.action(trainer)


def boom(trainer):
    raise RuntimeError("boom")


def pause(trainer):
    trainer.request_stop("pause")


# The step.


@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_fused_momentum_after_a_skipped_first_step(options):
    """The momentum that a skipped first step leaves behind is zero, not what was in memory."""
    one, other = (
        make_trainer(
            spoiled(), optimizer=lambda p, f=f: torch.optim.SGD(p, lr=0.1, fused=f, **options)
        )
        for f in (False, True)
    )
    one.fit(2)
    other.fit(2)
    assert torch.allclose(vector(one.model), vector(other.model), atol=1e-5)


def test_buffers_survive_an_error_before_the_first_step_of_a_fit():
    trainer = make_trainer(callbacks=[At("on_batch_start", 2, boom), At("on_train_start", 2, boom)])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit(1)
    straight = make_trainer()
    trainer.fit(1)
    straight.fit(1)
    assert same_state(trainer, straight)


def test_parameters_that_are_unfrozen_in_mid_run_are_guarded():
    model = small_net()
    late = model[-1].weight

    def unfreeze(trainer):
        trainer.optimizer.add_param_group({"params": [late], "lr": 0.1})
        late.register_hook(lambda gradient: gradient * math.nan)

    trainer = make_trainer(
        model=model, callbacks=[At("on_epoch_start", 2, unfreeze)], max_skipped_steps=99,
        optimizer=lambda _: torch.optim.SGD(model[0].parameters(), lr=0.1),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="Epoch 2: 6 steps were skipped"):
        trainer.fit(2)
    assert late.isfinite().all()


def test_a_step_that_raises_is_taken_anew():
    trainer = make_trainer()
    trainer.run.task.precision = Precision(torch.device("cpu"), torch.float16)
    calls = []

    def once(optimizer, args, kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("boom")

    handle = trainer.optimizer.register_step_pre_hook(once)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(1)
    assert trainer.batch == 3
    assert all(batch.losses == {} for batch in trainer.run.open.window)  # and no graph is kept
    handle.remove()
    trainer.fit(1)
    assert trainer.global_step == 6


def test_a_buffer_that_is_assigned_anew_is_guarded_too():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net(norm=False)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("shared", torch.zeros(1).expand(5))

        def forward(self, x):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
            return self.net(x)

    trainer = make_trainer(spoiled(3), model=Moving())
    with pytest.warns(UserWarning, match=r"index 3 \(sample 0\), where the input"):
        trainer.fit(1)
    assert trainer.model.mean.isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_the_warning_names_the_culprit_within_a_window(fused):
    trainer = make_trainer(
        spoiled(5), accumulation_steps=4,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused),
    )  # fmt: skip
    place = "index 5" if fused else r"index 5 \(sample 0\)"  # the batch is gone by then
    with pytest.warns(UserWarning, match=f"{place}, where the input"):
        trainer.fit(1)


# Weights.


def test_targets_in_containers_weigh_by_samples():
    def run(size, accumulation):
        (image, mask), = make_batches(1, size=10, nodata=0.0)  # fmt: skip
        parts = zip(image.split(size), mask.split(size), strict=True)
        batches = [(x, {"mask": y, "area": y.float()}) for x, y in parts]
        loss = lambda output, target: nn.functional.cross_entropy(output, target["mask"])
        trainer = make_trainer(
            batches, loss=loss, model=small_net(norm=False), accumulation_steps=accumulation,
            metrics={}, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), gradient_clip=None,
        )  # fmt: skip
        trainer.fit(1)
        return vector(trainer.model)

    assert torch.allclose(run(10, 1), run(4, 3), atol=1e-6)


def test_a_tensor_from_an_own_weight_can_be_zero():
    class Own(Trainer):
        def batch_weight(self, target):
            return (target != 255).sum()

    base = make_trainer([(image, torch.full_like(mask, 255)) for image, mask in make_batches(3)])
    trainer = Own(base.model, base.optimizer, base.loss_fn, base.train_loader, config=base.config)
    before = vector(trainer.model)
    assert trainer.fit(1)["train_empty_batches"] == [3.0]
    assert torch.equal(vector(trainer.model), before) and trainer.global_step == 0


def test_all_labels_outside_is_an_error_and_not_an_empty_batch():
    batches = [(image, torch.full_like(mask, 7)) for image, mask in make_batches(2)]
    with pytest.raises(ValueError, match=r"7 \(128 times\)"):
        make_trainer(batches, loss=nn.CrossEntropyLoss(torch.ones(3))).fit(1)


def test_what_a_wrapped_loss_ignores_is_found():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.CrossEntropyLoss(ignore_index=255)

        def forward(self, output, target):
            return self.part(output, target) + 0.01 * output.square().mean()

    assert make_trainer(loss=Sum()).ignore_index == 255
    assert make_trainer(loss=nn.CrossEntropyLoss(ignore_index=np.int64(7))).ignore_index == 7


# Pauses and loaders.


def test_one_cycle_goes_on_after_a_pause():
    cycle = lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12)
    trainer = make_trainer(scheduler=cycle, callbacks=[At("on_batch_end", 2, pause)], epochs=2)
    trainer.fit()
    trainer.fit()
    assert trainer.global_step == 12


class Stream(IterableDataset):
    def __iter__(self):
        yield from make_batches(4)


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
    again = pytest.warns(UserWarning, match="error when it read batch 3 of epoch 1. That batch is")
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


def shuffled(callbacks=(), own_generator=False):
    generator = torch.Generator().manual_seed(3) if own_generator else None
    data = make_batches(8)
    return make_trainer(
        DataLoader(data, batch_size=None, shuffle=True, generator=generator),
        DataLoader(make_batches(2), batch_size=None, shuffle=True), seed=1, epochs=3,
        model=nn.Sequential(nn.Dropout(0.3), small_net()), callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_look_at_the_loader_in_a_pause_changes_nothing(own_generator):
    straight = shuffled(own_generator=own_generator)
    straight.fit()
    paused = shuffled([At("on_batch_end", 11, pause)], own_generator)
    paused.fit()
    next(iter(paused.train_loader))
    torch.rand(9)
    paused.validate()
    paused.fit()
    assert same_state(straight, paused) and same_history(straight.history, paused.history)


def test_validating_in_a_hook_changes_nothing():
    straight = shuffled()
    straight.fit()
    watched = shuffled([At("on_batch_end", 4, lambda trainer: trainer.validate())])
    watched.fit()
    assert same_state(straight, watched)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_survive_two_interrupts(method, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {[os.path.dirname(__file__)]!r}
        import torch
        from conftest import make_batches, make_trainer

        class Interrupt:
            def on_batch_end(self, trainer, batch, logs):
                if trainer.epoch == 1 and trainer.batch in (4, 9):
                    os.killpg(0, signal.SIGINT)

        if __name__ == "__main__":
            options = {{"num_workers": 2, "multiprocessing_context": {method!r}}}
            loader = torch.utils.data.DataLoader(make_batches(12), batch_size=None, **options)
            trainer = make_trainer(loader, epochs=3, callbacks=[Interrupt()])
            stops = []
            while trainer.epoch < 3:
                trainer.fit()
                stops.append((trainer.epoch, trainer.batch))
            assert stops == [(1, 4), (1, 9), (3, 0)], stops
            print("fine")
    """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300,
        start_new_session=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "fine", done.stdout + done.stderr


def test_an_error_in_on_scores_does_not_cost_the_record_of_the_epoch(tmp_path):
    callbacks = [CheckpointCallback(tmp_path, "train_loss"), At("on_scores", 1, boom)]
    with pytest.raises(RuntimeError, match="boom"):
        make_trainer(callbacks=callbacks).fit(2)
    assert (tmp_path / "last.pt").exists()


# Files.


def test_state_that_no_file_can_hold_is_refused_by_name(tmp_path):
    class Bad(Callback):
        def state_dict(self):
            return {"function": lambda: 0}

        def load_state_dict(self, state):
            pass

    trainer = make_trainer(callbacks=[Bad()])
    with pytest.raises(
        CheckpointError, match=r"\['callbacks'\]\[0\]\[1\]\['function'\] is a function"
    ):
        trainer.save_checkpoint(tmp_path / "a.pt")
    trainer.callbacks.append(CheckpointCallback(tmp_path / "run", "train_loss"))
    with pytest.warns(UserWarning, match="There is no checkpoint after epoch 1"):
        trainer.fit(1)


def test_a_refused_file_leaves_a_pause_as_it_was(tmp_path):
    other = make_trainer(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    other.fit(1)
    path = other.save_checkpoint(tmp_path / "a.pt")
    trainer, straight = (
        make_trainer(callbacks=[At("on_batch_end", 3, pause)], epochs=2),
        make_trainer(),
    )
    trainer.fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError, match="its optimizer is SGD, and this one's is AdamW"):
            trainer.load_checkpoint(path)
    assert (trainer.epoch, trainer.batch, trainer.stop_reason) == (0, 3, "pause")
    trainer.fit()
    straight.fit(2)
    assert same_state(trainer, straight)


def test_another_scheduler_is_refused(tmp_path):
    first = make_trainer(scheduler=lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12))
    first.fit(1)
    path = first.save_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="its scheduler is OneCycleLR"):
        make_trainer(scheduler=lambda o: lr_scheduler.CosineAnnealingLR(o, 6)).load_checkpoint(path)


def test_a_file_of_another_program_or_version(tmp_path):
    trainer = make_trainer()
    path = trainer.save_checkpoint(tmp_path / "a.pt")
    state = torch.load(path)
    for change, message in (
        ({"format": 99}, "has format 99"),
        ({"model": 5}, "is not a checkpoint of this package"),
    ):
        content = {name: part for name, part in state.items() if name != "checksum"}
        save_file(content | change, path)
        with pytest.raises(CheckpointError, match=message):
            trainer.load_checkpoint(path)
    torch.save({"model": state["model"]}, path)
    with pytest.raises(CheckpointError, match="another program or version: it lacks callbacks"):
        trainer.load_checkpoint(path)
    path.write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(CheckpointError) as caught:
        trainer.load_checkpoint(path)
    assert "\x1b" not in str(caught.value)


# Scores.


def test_nan_and_soft_targets_of_a_yes_or_no_map():
    image = torch.randn(2, 4, 8, 8)
    target = (image[:, :1] > 0).float() * 0.9 + 0.05
    target[:, :, :2] = math.nan
    loss = MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"))
    trainer = make_trainer([(image, target)], [(image, target)], model=small_net(1), loss=loss)
    history = trainer.fit(80)
    assert history["val_accuracy"][-1] > 0.95 and history["val_IoU_classes"][-1] == 2
    with pytest.raises(ValueError, match=r"255 \(\d+ times\)"):
        trainer.validate([(image, target.nan_to_num(255.0))])


def test_two_tables_keep_their_scores_apart():
    metrics = {"all": ConfusionMatrix(3, 255), "without water": ConfusionMatrix(3, 0)}
    batches = make_batches(2, nodata=0.0)
    scores = make_trainer(val=batches, metrics=metrics).validate()
    assert scores["val_IoU"] != scores["val_without water_IoU"]


def test_labels_of_a_function_are_looked_at_in_the_first_batch():
    loss = lambda output, target: nn.functional.cross_entropy(output, target, ignore_index=255)
    trainer = make_trainer(loss=loss)
    with pytest.raises(ValueError, match=r"pass TrainerConfig\(ignore_index=255\)"):
        trainer.validate(make_batches(2))


def test_a_dictionary_without_out_needs_no_scores():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return {"logits": self.net(x)}

    loss = lambda output, target: nn.functional.cross_entropy(
        output["logits"], target, ignore_index=255
    )
    settings = {"val": make_batches(2), "model": Named(), "loss": loss, "ignore_index": 255}
    assert "val_loss" in make_trainer(metrics={}, **settings).fit(1)
    with pytest.raises(ValueError, match="Name the prediction 'out'"):
        make_trainer(**settings).fit(1)


# Messages.


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


def test_settings_of_the_wrong_type():
    for settings, message in (
        ({"gradient_clip": "1"}, "gradient_clip='1' must be a number"),
        ({"seed": -1}, "seed=-1 must be a whole number, 0 or more"),
        ({"epochs": 1.5}, "epochs=1.5 must be a whole number"),
        ({"accumulation_steps": True}, "accumulation_steps=True"),
        ({"class_names": ["a", "b"]}, "2 names, but the model has 3 classes"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make_trainer(**settings).fit(1)
    assert make_trainer(epochs=np.int64(2)).config.epochs == 2
    base = make_trainer()
    with pytest.raises(TypeError, match=r"pass a list: callbacks=\[...\]"):
        Trainer(base.model, base.optimizer, base.loss_fn, [1], callbacks=EarlyStopping())


# What a newcomer stumbled on.


def test_a_frozen_batch_norm_stays_frozen_after_a_look_at_predictions():
    model = small_net()
    model[1].eval()
    trainer = make_trainer(model=model)
    model.eval()  # before the first fit, and between fits
    trainer.fit(1)
    model.eval()
    trainer.fit(1)
    assert not model[1].running_mean.any()
    model.train()  # now it is meant to learn
    trainer.fit(1)
    assert model[1].running_mean.any()


def test_a_validation_loss_that_is_not_finite_is_explained():
    trainer = make_trainer()
    with pytest.warns(UserWarning, match=r"of 1 batch is not finite, first at batch index 2"):
        scores = trainer.validate(spoiled(2, 4))
    assert math.isnan(scores["val_loss"])
    with pytest.raises(CheckpointError, match="best_path is None until"):
        trainer.load_checkpoint(None)


def test_parameters_that_nobody_trains_are_reported():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[-1] = nn.Conv2d(8, 3, 1)
    with pytest.warns(UserWarning, match="does not hold 2 .* such as 3.weight"):
        Trainer(model, optimizer, nn.CrossEntropyLoss(), make_batches())


def test_metrics_that_count_what_the_loss_ignores_are_reported():
    from torchmetrics.classification import MulticlassF1Score

    with pytest.warns(UserWarning, match="ignores the label 255, and the metric 'F1' does not"):
        make_trainer(metrics={"F1": MulticlassF1Score(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(metrics={"F1": MulticlassF1Score(3, ignore_index=255)})


def test_a_plateau_in_the_wrong_direction():
    plateau = lr_scheduler.ReduceLROnPlateau
    with pytest.raises(ValueError, match="Pass mode='max'"):
        make_trainer(scheduler=plateau, scheduler_monitor="val_accuracy")
    with pytest.raises(ValueError, match="Pass mode='min'"):
        make_trainer(scheduler=lambda o: plateau(o, mode="max"))


def test_data_without_any_valid_pixel_is_reported():
    nothing = [(image, torch.full_like(mask, 255)) for image, mask in make_batches(2)]
    with pytest.warns(UserWarning, match="No batch of train_loader has a valid pixel in epoch 1"):
        make_trainer(nothing).fit(1)
    with pytest.warns(
        UserWarning, match="No batch of the validation loader .* ignore_index is 255"
    ):
        make_trainer().validate(nothing)


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.zeros(4, 8, 8), torch.zeros(8, 8, dtype=torch.int64)


def test_parts_in_the_wrong_place():
    base = make_trainer()
    model, optimizer, loss, batches = base.model, base.optimizer, base.loss_fn, base.train_loader
    for parts, options, message in (
        ((batches, batches, base.config), {}, "TrainerConfig, which has no step.* config="),
        ((batches,), {"callbacks": ["EarlyStopping"]}, "'EarlyStopping' .* none of the hooks"),
        ((batches,), {"callbacks": [EarlyStopping]}, "EarlyStopping is a class"),
        ((batches,), {"config": {"epochs": 3}}, "config is a dict"),
        ((Samples(),), {}, "is a data set, Samples, .* DataLoader"),
        ((batches,), {"metrics": [ConfusionMatrix(3)]}, "metrics is a list"),
    ):
        with pytest.raises(TypeError, match=message):
            Trainer(model, optimizer, loss, *parts, **options)
    with pytest.raises(TypeError, match=r"CrossEntropyLoss; pass an instance"):
        Trainer(model, optimizer, nn.CrossEntropyLoss, batches)
    with pytest.raises(ValueError, match="has an ignore_index of its own"):
        MaskedLoss(nn.CrossEntropyLoss(reduction="none"), 255)
    with pytest.raises(TypeError, match="target is a numpy array"):
        make_trainer([(image, mask.numpy()) for image, mask in batches], metrics={}).fit(1)


def test_labels_that_start_at_one():
    batches = [(image, mask.clamp(max=2) + 1) for image, mask in make_batches(2, nodata=0.0)]
    with pytest.raises(ValueError, match="start at 1: subtract 1"):
        make_trainer(batches).fit(1)


def test_figures_of_unusual_runs():
    from ununennium.plots import plot_chips, plot_history

    history = {"train_loss": [-0.1, -0.4], "val_RMSE": [3.0, 2.0], "val_IoU": [0.0, 0.0]}
    figure = plot_history(history)
    loss, iou, scores = figure.axes
    assert loss.get_ylim()[0] < -0.4 and iou.get_ylim()[0] < 0 and scores.get_title() == "scores"
    flood = torch.zeros(2, 1, 8, 8)
    plot_chips(np.zeros((2, 1, 8, 8), np.float32), flood, flood)
    with pytest.raises(ValueError, match="add a dimension"):
        plot_chips(torch.zeros(4, 8, 8), torch.zeros(8, 8), torch.zeros(8, 8))
    with pytest.raises(ValueError, match="pass ignore_index=255"):
        plot_chips(
            torch.zeros(2, 4, 8, 8), torch.full((2, 8, 8), 255), flood[:, 0], class_names=["a"]
        )
