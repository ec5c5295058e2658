"""2 · One bad tile costs one step: what is not finite stays out, is counted, and is named."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from small import (
    At,
    AtStep,
    Named,
    make_batches,
    make_trainer,
    same_state,
    small_net,
    spoiled,
    stop,
    vector,
)
from ununennium import Callback, MaskedLoss, TrainingDiverged

pytestmark = pytest.mark.usefixtures("device_decides")

# Skipped, and counted.


OPTIMIZERS = {
    "host": lambda p: torch.optim.AdamW(p, lr=0.02),
    "device": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "device SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_nan_image_changes_nothing_but_the_count(optimizer, accumulation):
    """The run is that of one where the window with the NaN is not there."""
    batches = make_batches(9)
    bad = spoiled(4, count=9)
    start = 4 // accumulation * accumulation
    without = batches[:start] + batches[start + accumulation :]
    settings = {"optimizer": OPTIMIZERS[optimizer], "accumulation_steps": accumulation}
    with_nan, clean = make_trainer(bad, **settings), make_trainer(without, **settings)
    with pytest.warns(UserWarning, match=r"Epoch 1: 1 step was skipped .* index [34].* input"):
        history = with_nan.fit(1)
    clean.fit(1)
    assert same_state(with_nan, clean)
    assert history["train_skipped_steps"] == [1.0]
    assert with_nan.global_step == clean.global_step
    assert history["train_loss"] == pytest.approx(clean.history["train_loss"], rel=1e-6)


def test_a_finite_loss_with_an_infinite_gradient_is_caught():
    class Sharp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    trainer = make_trainer(loss=lambda output, target: Sharp.apply(output.mean()), metrics={})
    before = vector(trainer.model)
    with pytest.warns(UserWarning, match="where the gradient was not finite"):
        history = trainer.fit(1)
    assert history["train_skipped_steps"] == [6.0]
    assert torch.equal(vector(trainer.model), before)


@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_numbered_alike_after_a_resume_that_follows_skips(optimizer, tmp_path):
    """Skips that a file has in its counts are in its step number already."""
    batches = spoiled(1, 5, count=8)

    class Pause(Callback):
        def on_batch_end(self, trainer, batch, logs):
            if trainer.batch == 4:
                trainer.request_stop("pause")

    paused, resumed, straight = (
        make_trainer(batches, optimizer=OPTIMIZERS[optimizer], callbacks=callbacks)
        for callbacks in ([Pause()], [], [])
    )
    paused.fit(1)
    resumed.load_checkpoint(paused.save_checkpoint(tmp_path / "a.pt"))
    for trainer in (resumed, straight):
        trainer.fit(1)
    assert straight.global_step == resumed.global_step == 6
    assert straight.history["train_skipped_steps"] == resumed.history["train_skipped_steps"] == [2]


@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_a_skipped_first_step_leaves_no_momentum(options):
    """The momentum that a skipped first step leaves behind is zero, not what was in memory."""
    one, other = (
        make_trainer(
            spoiled(0), optimizer=lambda p, f=f: torch.optim.SGD(p, lr=0.1, fused=f, **options)
        )
        for f in (False, True)
    )
    one.fit(2)
    other.fit(2)
    assert torch.allclose(vector(one.model), vector(other.model), atol=1e-5)


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


def test_a_buffer_that_the_model_replaces_is_guarded():
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


# Named.


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


def test_a_sample_without_a_name_is_numbered():
    batches = make_batches(3, size=4)
    batches[2][0][3, 1] = torch.nan
    with pytest.warns(UserWarning, match=r"batch index 2 \(sample 3\), where the input"):
        make_trainer(batches).fit(1)


@pytest.mark.parametrize("fused", [False, True])
def test_the_bad_batch_of_a_window_is_named(fused):
    trainer = make_trainer(
        spoiled(5), accumulation_steps=4,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused),
    )  # fmt: skip
    culprit = "index 5" if fused else r"index 5 \(sample 0\)"  # the batch is gone by then
    with pytest.warns(UserWarning, match=f"{culprit}, where the input"):
        trainer.fit(1)


# Too many.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_too_many_in_a_row_end_the_run_with_the_parameters_intact(optimizer):
    model = small_net()
    with torch.no_grad():
        model[-1].bias[0] = math.inf
    before = vector(model)
    trainer = make_trainer(
        make_batches(12), model=model, optimizer=OPTIMIZERS[optimizer], max_skipped_steps=5
    )
    with pytest.raises(TrainingDiverged, match=r"5 steps in a row .* output .* not finite"):
        trainer.fit(1)
    assert torch.equal(vector(model), before)


def test_an_exploding_loss_is_described_from_its_beginning():
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


# Only the bad samples left out.


DICE_LIKE = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), ignore_index=255)


def binary(batches):
    """The same images with one channel of floats as target, some of them NaN."""
    return [
        (image, image[:, :1].masked_fill(mask[:, None] > 2, math.nan)) for image, mask in batches
    ]


KINDS = {
    "cross-entropy": (lambda batches: batches, lambda: nn.CrossEntropyLoss(ignore_index=255), 3),
    "class weights": (lambda batches: batches, lambda: DICE_LIKE, 3),
    "masked": (binary, lambda: MaskedLoss(nn.MSELoss(reduction="none")), 1),
    "your own": (lambda batches: batches, lambda: own_loss, 3),
}


def own_loss(output, target):
    """A mean over samples."""
    return (output.softmax(1)[:, 0] - (target == 0).float()).square().mean()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sample_costs_only_itself(optimizer, accumulation, kind):
    """Bit for bit the run of a loader that never had it, batch norms and means included."""
    change, loss, classes = KINDS[kind]
    bad, without = change(make_batches(7, size=4)), []
    for number, rows in ((1, [2]), (4, [0, 3]), (5, [0, 1, 2, 3])):
        for row in rows:
            bad[number][0][row, 1, 2, 3] = math.nan
    for image, target in bad:
        rows = image.flatten(1).isfinite().all(1)
        without.append((image[rows], target[rows]))
    without[5] = bad[5][0].nan_to_num(), torch.full_like(bad[5][1], 255)
    if kind in ("masked", "your own"):  # which know no label to ignore
        without.pop(5)
        bad.pop(5)
    settings = {"optimizer": OPTIMIZERS[optimizer], "accumulation_steps": accumulation}
    one, other = (
        make_trainer(
            batches, model=small_net(classes), loss=loss(), metrics={},
            drop_bad_samples=drops, **settings,
        )
        for batches, drops in ((bad, True), (without, False))
    )  # fmt: skip
    with pytest.warns(UserWarning, match="samples of train_loader were left out"):
        history = one.fit(2)
    expected = other.fit(2)
    assert history.pop("train_dropped_samples") == [7.0 if len(bad) == 7 else 3.0] * 2
    assert same_state(one, other) and history == expected
    assert history["train_skipped_steps"] == [0.0, 0.0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_the_setting_a_bad_sample_costs_its_step(optimizer):
    trainer = make_trainer(spoiled(4), optimizer=OPTIMIZERS[optimizer])
    with pytest.warns(UserWarning, match="1 step was skipped"):
        history = trainer.fit(1)
    assert "train_dropped_samples" not in history and history["train_skipped_steps"] == [1.0]


def test_dropped_files_are_named_once_in_a_run(recwarn):
    """Python shows the same sentence once, so each epoch has the same, however it is shuffled."""
    loader = DataLoader(Named(bad=(3, 8, 10)), batch_size=4, shuffle=True)
    history = make_trainer(loader, drop_bad_samples=True, seed=0).fit(3)
    told = {str(warning.message) for warning in recwarn}
    assert told == {
        "3 samples of train_loader were left out, because their input is not finite: filename "
        "tile_3.tif, tile_8.tif, tile_10.tif."
    }
    assert history["train_dropped_samples"] == [3.0] * 3


def test_samples_without_names_have_their_index_in_the_data_set():
    image, mask = make_batches(1, size=12)[0]
    image[7, 0, 0, 0] = math.nan
    loader = DataLoader(TensorDataset(image, mask), batch_size=4, shuffle=True)
    with pytest.warns(UserWarning, match=r"left out, .*: dataset index 7\.$"):
        make_trainer(loader, drop_bad_samples=True).fit(1)


def test_the_line_of_the_epoch_has_the_count(capsys):
    with pytest.warns(UserWarning, match="left out"):
        make_trainer(
            spoiled(4), drop_bad_samples=True, progress="text", model=small_net(norm=False)
        ).fit(1)
    line = capsys.readouterr().out
    assert line.rstrip().endswith("1 sample dropped") and "train_dropped" not in line


def test_validation_leaves_them_out_too():
    train, val = make_batches(4), spoiled(1, count=3)
    without = [(image[rows], mask[rows]) for image, mask in val
               for rows in [image.flatten(1).isfinite().all(1)]]  # fmt: skip
    one = make_trainer(train, val, drop_bad_samples=True)
    other = make_trainer(train, without)
    with pytest.warns(UserWarning, match=r"^1 sample of the validation loader was left out, .*: "
                      r"batch index 1, sample 0\.$"):  # fmt: skip
        history = one.fit(1)
    assert history.pop("train_dropped_samples") == [0.0] and history == other.fit(1)


@pytest.mark.filterwarnings("ignore:.* left out")
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_a_resumed_run_has_counted_each_dropped_sample_once(steps, tmp_path):
    def make(callbacks=()):
        loader = DataLoader(Named(bad=(3, 8, 10), count=24), batch_size=4, shuffle=True)
        return make_trainer(loader, drop_bad_samples=True, seed=0, callbacks=callbacks)

    straight, first, second = make(), make([AtStep(steps, stop)]), make()
    straight.fit(2)
    first.fit(2)
    second.load_checkpoint(first.save_checkpoint(tmp_path / "a.pt"))
    second.fit(2)
    assert same_state(second, straight) and second.history == straight.history


def test_what_cannot_be_taken_apart_is_refused_with_the_first_batch():
    batches = [((torch.randn(2, 4, 8, 8), torch.zeros(7, 2)), torch.zeros(2, 8, 8).long())]
    trainer = make_trainer(batches, drop_bad_samples=True)
    with pytest.raises(
        ValueError, match="drop_bad_samples=True needs tensors .* one N in the model"
    ):
        trainer.fit(1)


def test_check_tells_of_samples_that_will_be_dropped(capsys):
    problems = make_trainer(
        DataLoader(Named(bad=(1,)), batch_size=6), drop_bad_samples=True
    ).check()
    assert problems == ["Not finite, and left out of the batch: filename tile_1.tif."]
