"""Rules 4-6: what is not finite stays out; precision; and nobody waits for the device."""

import math
import warnings

import pytest
import torch
from torch import nn

from conftest import DEVICES, HostReads, make_batches, make_trainer, same_state, small_net, vector
from ununennium import Callback, TrainingDiverged
from ununennium.training.precision import Precision

OPTIMIZERS = {
    "host": lambda p: torch.optim.AdamW(p, lr=0.02),
    "device": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "device SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
}


def spoil(batches, number, what):
    batches = [(image.clone(), mask.clone()) for image, mask in batches]
    batches[number][0][0, 1, 2, 3] = what
    return batches


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_nan_image_changes_nothing_but_the_count(optimizer, accumulation):
    """The run is that of one where the window with the NaN is not there."""
    batches = make_batches(9)
    bad = spoil(batches, 4, math.nan)
    start = 4 // accumulation * accumulation
    without = batches[:start] + batches[start + accumulation :]
    settings = {"optimizer": OPTIMIZERS[optimizer], "accumulation_steps": accumulation}
    spoiled, clean = make_trainer(bad, **settings), make_trainer(without, **settings)
    with pytest.warns(UserWarning, match=r"Epoch 1: 1 step was skipped .* index [34].* input"):
        history = spoiled.fit(1)
    clean.fit(1)
    assert same_state(spoiled, clean)
    assert history["train_skipped_steps"] == [1.0]
    assert spoiled.global_step == clean.global_step
    assert history["train_loss"] == pytest.approx(clean.history["train_loss"], rel=1e-6)


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


@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_numbered_alike_after_a_resume_that_follows_skips(optimizer, tmp_path):
    """Skips that a file has in its counts are in its step number already."""
    batches = spoil(spoil(make_batches(8), 1, math.nan), 5, math.nan)

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


def reads_of_a_fit(steps, **settings):
    trainer = make_trainer(make_batches(steps, side=4), **settings)
    with HostReads() as reads:
        trainer.fit(1)
    return reads.count


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optimizer", ["device", "device SGD"])
def test_no_host_read_in_a_step(optimizer, accumulation):
    settings = {"optimizer": OPTIMIZERS[optimizer], "accumulation_steps": accumulation}
    few, many = reads_of_a_fit(8, **settings), reads_of_a_fit(64, **settings)
    assert few == many


def test_other_optimizers_cost_one_read_a_step_and_never_more():
    """SGD, because AdamW reads its own step counters on the CPU."""
    for accumulation in (1, 4):
        sgd = lambda p: torch.optim.SGD(p, lr=0.02)
        settings = {"optimizer": sgd, "accumulation_steps": accumulation}
        few, many = reads_of_a_fit(8, **settings), reads_of_a_fit(64, **settings)
        assert many - few == (64 - 8) / accumulation


# Mixed precision. On the CPU the same rules are tried with a CPU scaler and CPU autocast.


def half(trainer, device, dtype=torch.float16, **scaler):
    trainer.run.task.precision = Precision(torch.device(device), dtype)
    if scaler:
        trainer.run.task.precision.scaler = torch.amp.GradScaler(device, **scaler)
    return trainer


@pytest.mark.parametrize("device", DEVICES)
def test_tiny_gradients_survive_clipping(device):
    """Clipped while still scaled, this step would be 2**16 times too small."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    batch = (torch.ones(2, 4), torch.zeros(2))
    loss = lambda output, target: 1e-3 * output.float().mean()
    trainer = make_trainer(
        [batch],
        model=model,
        loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        device=device,
    )
    half(trainer, device, init_scale=2.0**16)
    trainer.fit(1)
    assert torch.allclose(model.weight.cpu(), torch.full((1, 4), -1e-3), rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_halves_the_scale_once_and_moves_no_scheduler(device, fused):
    rates = []

    class Watch(Callback):
        def on_batch_end(self, trainer, batch, logs):
            scale = trainer.run.task.precision.scaler.get_scale()
            rates.append((scale, trainer.optimizer.param_groups[0]["lr"], trainer.global_step))

    model = nn.Linear(4, 1)
    big = (torch.full((2, 4), 6e4), torch.zeros(2))
    good = (torch.ones(2, 4), torch.zeros(2))
    loss = lambda output, target: output.float().mean() * 1.0
    trainer = make_trainer(
        [big, good], model=model, loss=loss, device=device,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0, fused=fused),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1),
        scheduler_interval="step", callbacks=[Watch()],
    )  # fmt: skip
    half(trainer, device, init_scale=1024.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no order warning of PyTorch either
        history = trainer.fit(1)
    assert rates == [(512.0, 1.0, 0), (512.0, pytest.approx(0.1), 1)]
    assert history["train_skipped_steps"] == [1.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_stay_float32_and_validation_is_autocast(device, dtype):
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            output = self.net(x)
            seen.append((self.training, output.dtype))
            return output

    trainer = make_trainer(val=make_batches(2), model=Spy(), device=device)
    half(trainer, device, dtype)
    history = trainer.fit(2)
    assert set(seen) == {(True, dtype), (False, dtype)}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert math.isfinite(history["val_loss"][-1])
    assert trainer.run.task.precision.scaler.is_enabled() == (dtype == torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
@pytest.mark.parametrize("amp_dtype", ["float16", "bfloat16"])
def test_mixed_precision_from_the_config_on_a_gpu(amp_dtype):
    trainer = make_trainer(val=make_batches(2), device="cuda", amp_dtype=amp_dtype)
    history = trainer.fit(8)
    assert trainer.run.task.precision.dtype == getattr(torch, amp_dtype)
    assert history["val_IoU"][-1] > history["val_IoU"][0]


def test_mixed_precision_on_a_cpu_is_full_precision():
    trainer = make_trainer(mixed_precision=True)
    assert (
        trainer.run.task.precision.dtype is None
        and not trainer.run.task.precision.scaler.is_enabled()
    )


def test_cuda_without_a_gpu_warns_once_and_trains_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no GPU here, so training is on the CPU") as caught:
        trainer = make_trainer(device="cuda")
    assert len(caught) == 1 and caught[0].filename == __file__.replace("test_guard", "conftest")
    trainer.fit(1)


def test_clipping_off_and_the_norm_before_clipping():
    norms, free = [], []

    class Watch(Callback):
        def __init__(self, where):
            self.where = where

        def on_batch_end(self, trainer, batch, logs):
            self.where.append(float(logs["grad_norm"]))

    sgd = lambda p: torch.optim.SGD(p, lr=0.0)
    make_trainer(optimizer=sgd, callbacks=[Watch(norms)], gradient_clip=1e-3).fit(1)
    make_trainer(optimizer=sgd, callbacks=[Watch(free)], gradient_clip=0).fit(1)
    assert norms == free and min(norms) > 1e-3
