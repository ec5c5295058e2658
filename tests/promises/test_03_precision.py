"""3 · Precision: unscaled, then clipped; float32 parameters; the same autocast for validation.

On a CPU the same rules are tried with a CPU scaler and CPU autocast.
"""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import small
from small import DEVICES, half, make_batches, make_trainer, same_history, same_state, small_net
from ununennium import Callback, Trainer, TrainerConfig


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


def test_the_logged_norm_is_that_before_clipping():
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


@pytest.mark.parametrize("fused", [False, True])
def test_a_clipping_norm_of_0_clips_nothing_like_none(fused):
    sgd = lambda p: torch.optim.SGD(p, lr=0.1, fused=fused)
    clips = (0, None, 1e9, 0.1)  # beyond all gradients, and below
    off, none, high, low = (make_trainer(optimizer=sgd, gradient_clip=clip) for clip in clips)
    histories = [trainer.fit(2) for trainer in (off, none, high, low)]
    assert same_state(off, none) and same_state(off, high) and not same_state(off, low)
    assert histories[0] == histories[1] == histories[2] != histories[3]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_halves_the_scale_once_and_moves_no_scheduler(device, fused, monkeypatch):
    # On a GPU, the outcome of a fused step is read late.
    monkeypatch.setattr("ununennium.training.schedule.OwedMoves.size", 1)
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


@pytest.mark.parametrize("settings", [{"mixed_precision": True}, {"amp_dtype": "float16"}])
def test_mixed_precision_on_a_cpu_is_full_precision(settings):
    mixed, full = make_trainer(**settings), make_trainer(mixed_precision=False)
    mixed.fit(2), full.fit(2)
    assert same_state(mixed, full) and same_history(mixed.history, full.history)


@pytest.mark.parametrize("device", ["cuda", "auto"])
@pytest.mark.filterwarnings("ignore:PyTorch sees no GPU")
def test_a_cpu_that_stands_in_for_a_gpu_computes_in_full_precision(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    trainer, full = make_trainer(device=device, amp_dtype="bfloat16"), make_trainer()
    trainer.fit(2), full.fit(2)
    assert same_state(trainer, full) and same_history(trainer.history, full.history)


def test_a_cpu_that_is_named_computes_in_bfloat16_if_asked():
    seen = []

    class Spy(Callback):
        def on_batch_end(self, trainer, batch, logs):
            seen.append({p.dtype for p in trainer.model.parameters()})

    class Typed(Trainer):
        def run_model(self, inputs):
            output = self.model(inputs)
            seen.append(output.dtype)
            return output

    like = make_trainer(amp_dtype="bfloat16")
    rest = like.optimizer, like.loss_fn, like.train_loader, make_batches(2), None, [Spy()]
    trainer, full = Typed(like.model, *rest, like.config), make_trainer(val=make_batches(2))
    history = trainer.fit(8)
    full.fit(8)
    assert torch.bfloat16 in seen and {torch.float32} in seen and len(seen) == 8 * (2 * 6 + 2)
    assert all(x in (torch.bfloat16, {torch.float32}) for x in seen)
    assert history["train_loss"] != full.history["train_loss"]
    assert history["train_loss"] == pytest.approx(full.history["train_loss"], abs=0.03)


def test_cuda_without_a_gpu_warns_once_and_trains_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no GPU here, so training is on the CPU") as caught:
        trainer = make_trainer(device="cuda")
    assert len(caught) == 1 and caught[0].filename == small.__file__
    trainer.fit(1)


def test_the_default_device_without_a_gpu_is_told_in_the_first_line_and_not_warned(
    monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    model, batches = small_net(), make_batches()
    optimizer, loss = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    for config in (TrainerConfig(1, progress="text"), replace(TrainerConfig(1), progress="text")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer = Trainer(
                model, optimizer, loss, [(i, m % 3) for i, m in batches], config=config
            )
            trainer.fit(1)
        first = capsys.readouterr().out.splitlines()[0]
        assert (
            first == "Sequential (83 parameters) on cpu (no GPU here), float32: 6 batches per epoch"
        )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    trainer.fit(1)
    assert "on cpu (no CUDA here; device='auto' takes the MPS device)" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_device_that_was_chosen_has_no_note(monkeypatch, capsys, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    make_trainer(device=device, progress="text").fit(1)
    assert "on cpu, float32" in capsys.readouterr().out
