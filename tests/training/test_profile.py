"""`profile`: slow parts show up in their row, and everything stays as it was."""

import copy
import gc
import json
import multiprocessing
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from small import (
    AtStep,
    assert_same,
    half,
    make_batches,
    make_trainer,
    outcome,
    same_history,
    same_state,
    small_net,
    stop,
)
from ununennium import Callback, Loop, Trainer
from ununennium.training.phases import BACKWARD, CALLBACKS, CHECKS, FORWARD, OPTIMIZER, OTHER, WAIT

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Augmented(Dataset):
    """Samples with noise from each of the three global generators."""

    def __init__(self, count=24, seconds=0.0):
        self.image, self.mask = make_batches(1, size=count)[0]
        self.seconds = seconds

    def __len__(self):
        return len(self.image)

    def __getitem__(self, number):
        time.sleep(self.seconds)
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        return self.image[number] + noise, self.mask[number]


# Slow parts show up in their row.


def slow_loader(seconds):
    for batch in make_batches(8):
        time.sleep(seconds)
        yield batch


class Reread(list):
    def __iter__(self):
        return slow_loader(0.03)


class SlowModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, image):
        time.sleep(0.03)
        return self.net(image)


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.03)
        return gradient


class SlowAdam(torch.optim.Adam):
    def step(self, closure=None):
        time.sleep(0.03)
        return super().step(closure)


class SlowCallback(Callback):
    def on_batch_end(self, trainer, batch, logs):
        time.sleep(0.03)


class SlowUnpack(Trainer):
    def unpack(self, batch):
        time.sleep(0.03)
        return super().unpack(batch)


class SlowStep(Trainer):
    class loop_class(Loop):
        def step(self, window, epoch):
            super().step(window, epoch)
            time.sleep(0.03)


def subclass(kind):
    base = make_trainer(make_batches(8))
    parts = (base.model, base.optimizer, base.loss_fn, base.train_loader)
    return kind(*parts, config=base.config)


def loss_with(function):
    def loss(output, target):
        return nn.functional.cross_entropy(function(output), target, ignore_index=255)

    return make_trainer(make_batches(8), loss=loss, ignore_index=255)


def sleeping(value):
    time.sleep(0.03)
    return value


SLOW = {
    WAIT: lambda: make_trainer(Reread(make_batches(8))),
    CHECKS: lambda: subclass(SlowUnpack),
    FORWARD: lambda: make_trainer(make_batches(8), model=SlowModel()),
    f"{FORWARD} (loss)": lambda: loss_with(sleeping),
    BACKWARD: lambda: loss_with(SlowBackward.apply),
    OPTIMIZER: lambda: make_trainer(make_batches(8), optimizer=SlowAdam),
    CALLBACKS: lambda: make_trainer(make_batches(8), callbacks=[SlowCallback()]),
    OTHER: lambda: subclass(SlowStep),
}


@pytest.mark.parametrize("row", SLOW)
def test_a_slow_part_is_in_its_row(row):
    profile, phase = SLOW[row]().profile(4, callbacks=row == CALLBACKS), row.split(" (")[0]
    assert max(profile.shares, key=profile.shares.__getitem__) == phase
    assert profile.shares[phase] > 0.5 and profile.milliseconds[phase] >= 30
    assert sum(profile.shares.values()) == pytest.approx(1)


def test_the_table_the_advice_and_the_plot():
    pytest.importorskip("matplotlib")
    loader = DataLoader(Augmented(seconds=0.02), 2)
    profile = make_trainer(loader).profile(steps=4)
    title, text = str(profile).splitlines()[0], str(profile)
    assert title == "4 steps of 2 samples on cpu, after 3 to warm up, by the host's clock"
    assert "waiting for data: raise num_workers from 0 to " in text
    assert profile.samples_per_second <= 50 and "samples/s" in text
    assert len(profile.plot().axes) == 1


def test_a_step_has_all_of_its_batches():
    trainer = make_trainer(make_batches(24, size=3), accumulation_steps=4)
    profile = trainer.profile(steps=3)
    assert profile.samples == [12.0] * 3


def test_workers_that_read_ahead_do_not_hide_that_they_are_slow():
    """Without the discarded batches, the steps counted would find theirs ready."""

    class SlowAtFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = small_net(), 0

        def forward(self, image):
            self.calls += 1
            time.sleep(0.5 if self.calls == 1 else 0.005)
            return self.net(image)

    loader = DataLoader(Augmented(30, seconds=0.04), 1, num_workers=1, prefetch_factor=12)
    profile = make_trainer(loader, model=SlowAtFirst()).profile(steps=6)
    assert profile.shares[WAIT] > 0.4 and not profile.notes
    notes = make_trainer(loader, model=SlowAtFirst()).profile(steps=20).notes
    assert notes == [
        "Up to 7 batches that workers had read ahead may hide that they are slow: train_loader has "
        "only 30 batches."
    ]


@pytest.mark.parametrize(("batches", "counted"), [(1, 1), (2, 1), (5, 3), (8, 5)])
def test_a_loader_that_ends_early(batches, counted):
    profile = make_trainer(make_batches(batches)).profile()
    assert len(profile.steps) == counted
    assert profile.notes == ["train_loader ended before there were more steps."]


def test_skipped_steps_are_mentioned():
    batches = make_batches(8)
    for image, _ in batches:
        image[0, 0, 0, 0] = torch.inf
    notes = make_trainer(batches).profile(steps=3).notes
    assert "6 steps were skipped because the gradient was not finite" in notes[0]


# Callbacks.


class Seen(Callback):
    def __init__(self):
        self.hooks = []

    def on_train_start(self, trainer):
        self.hooks.append("on_train_start")

    def on_batch_end(self, trainer, batch, logs):
        self.hooks.append("on_batch_end")
        self.step = trainer.global_step
        trainer.request_stop("not for real")

    def on_train_end(self, trainer):
        self.hooks.append("on_train_end")


@pytest.mark.parametrize("callbacks", [False, True])
def test_callbacks_see_nothing_of_a_profile(callbacks):
    seen = Seen()
    trainer = make_trainer(callbacks=[seen])
    profile = trainer.profile(steps=2, callbacks=callbacks)
    assert seen.hooks == [] and trainer.stop_reason is None and not hasattr(seen, "step")
    assert any("Not timed: the hooks of Seen." in note for note in profile.notes) != callbacks


def test_copies_of_callbacks_get_two_hooks_and_a_trainer_of_their_own():
    calls = []

    class Noted(Seen):
        def on_batch_end(self, trainer, batch, logs):
            calls.append((trainer is self.trainer, trainer is real, trainer.global_step))

        def on_train_start(self, trainer):
            raise AssertionError

    noted = Noted()
    real = noted.trainer = make_trainer(callbacks=[noted])
    noted.model = real.model
    real.profile(steps=2, callbacks=True)
    assert calls[:2] == [(True, False, 1), (True, False, 2)] and noted.model is real.model


def test_a_callback_that_cannot_be_copied():
    class Locked(Callback):
        def __init__(self):
            self.lines = (number for number in range(3))

        def on_batch_end(self, trainer, batch, logs):
            next(self.lines)

    trainer = make_trainer(callbacks=[Locked()])
    trainer.profile(steps=2)
    with pytest.raises(TypeError, match=r"Locked cannot be copied .*with callbacks=False"):
        trainer.profile(steps=2, callbacks=True)


def test_a_profile_writes_no_checkpoint(tmp_path):
    class Saving(Callback):
        def on_batch_end(self, trainer, batch, logs):
            trainer.save_checkpoint(tmp_path / "last.pt")

    with pytest.raises(RuntimeError, match="nothing may be saved"):
        make_trainer(callbacks=[Saving()]).profile(steps=2, callbacks=True)
    assert not list(tmp_path.iterdir())


# Everything stays as it was.


def state_of(trainer):
    """Everything that a profile might change, as values."""
    optimizer, run, model = trainer.optimizer, trainer.run, trainer.model
    return copy.deepcopy({
        "model": model.state_dict(),
        "gradients": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "frozen": len(run.modes.frozen),
        "optimizer": optimizer.state_dict(),
        "attributes": sorted(vars(optimizer)),
        "scheduler": run.schedule.scheduler and run.schedule.scheduler.state_dict(),
        "scaler": run.task.precision.scaler.state_dict(),
        "progress": vars(run.progress),
        "skips": run.skips.state_dict(),
        "place": (trainer.batch, trainer.goal, run.is_running, run.open and run.open.batches),
        "torch": torch.get_rng_state(),
        "random": (random.getstate(), np.random.get_state()),
    })  # fmt: skip


def full_trainer(workers=0, persistent=False, stop_at=None, own_generator=True, **options):
    """Dropout, batch norm, augmentation, a scheduler that counts steps, a callback with memory."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    model = nn.Sequential(nn.Dropout(0.3), small_net())
    model[1][1].eval()  # a frozen batch norm
    generator = torch.Generator().manual_seed(1) if own_generator else None
    loader = DataLoader(
        Augmented(), 2, shuffle=True, generator=generator, num_workers=workers,
        persistent_workers=persistent,
    )  # fmt: skip
    callbacks = [AtStep(stop_at, stop)] if stop_at else []
    return make_trainer(
        loader, make_batches(2), model=model, callbacks=callbacks,
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=24), **options,
    )  # fmt: skip


PLACES = {
    "before the first step": {},
    "in an epoch": {"stop_at": 5},
    "with workers": {"workers": 2},
    "with workers, in an epoch": {"workers": 2, "stop_at": 5},
    "with persistent workers, in an epoch": {"workers": 1, "persistent": True, "stop_at": 5},
    "with the global generator, in an epoch": {"stop_at": 5, "own_generator": False},
    "with accumulation, in an epoch": {"stop_at": 2, "accumulation_steps": 3},
    "between epochs": {"stop_at": 12},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_profile_changes_nothing(place):
    trainers = [full_trainer(**PLACES[place]) for _ in range(2)]
    outcomes = []
    for trainer, looks in zip(trainers, (False, True), strict=True):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        if "stop_at" in PLACES[place]:
            trainer.fit(2)
        if looks:
            before, loss = state_of(trainer), trainer.loss_fn
            trainer.profile(steps=4, callbacks=True)
            assert_same(before, state_of(trainer))
            assert trainer.loss_fn is loss and "predict" not in vars(trainer)
        trainer.fit(2 - trainer.epoch)
        outcomes.append(outcome(trainer) | {"numbers": trainer.global_step})
    assert_same(*outcomes)
    assert trainers[0].global_step in (24, 8)


def test_the_loss_scale_is_that_of_the_run():
    trainer = half(make_trainer(make_batches(12)), "cpu", init_scale=1024.0, growth_interval=2)
    trainer.fit(1)
    before, scaler = state_of(trainer), trainer.run.task.precision.scaler
    assert before["scaler"]["scale"] > 1024
    trainer.profile(steps=4)
    assert_same(before, state_of(trainer))
    assert trainer.run.task.precision.scaler is scaler


def test_buffers_that_are_replaced_and_a_loss_with_memory():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, image):
            self.calls = self.calls + 1
            return self.net(image)

    class Remembering(nn.CrossEntropyLoss):
        def __init__(self):
            super().__init__(ignore_index=255)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, output, target):
            self.seen += 1
            return super().forward(output, target)

    trainer = make_trainer(model=Counting(), loss=Remembering())
    trainer.profile(steps=2)
    assert trainer.model.calls == 0 and trainer.loss_fn.seen == 0


def test_gradients_of_your_own_stay():
    trainer = make_trainer()
    gradient = trainer.model[0].weight.grad = torch.ones_like(trainer.model[0].weight)
    trainer.profile(steps=2)
    assert trainer.model[0].weight.grad is gradient and bool((gradient == 1).all())


def test_which_modules_are_frozen_is_for_the_run_to_notice():
    trainer = make_trainer()
    trainer.model[1].eval()
    before = trainer.run.modes.frozen
    trainer.profile(steps=2)
    assert trainer.run.modes.frozen == before and not trainer.model[1].training


def test_a_sampler_keeps_the_number_of_its_epoch():
    data = Augmented()
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    trainer = make_trainer(DataLoader(data, 4, sampler=sampler))
    trainer.fit(2)
    sampler.epoch = 7
    trainer.profile(steps=2)
    assert sampler.epoch == 7


def test_after_an_error_everything_is_as_it_was():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = nn.Sequential(nn.Dropout(), small_net()), 0

        def forward(self, image):
            self.calls += 1
            if self.calls == 4:
                raise OSError("the archive is gone")
            return self.net(image)

    trainer = make_trainer(model=Breaks())
    before = state_of(trainer)
    with pytest.raises(OSError, match="the archive is gone"):
        trainer.profile()
    assert_same(before, state_of(trainer))
    assert len(trainer.fit(1)["train_loss"]) == 1


def test_an_interrupt_ends_a_profile_and_is_raised():
    class Interrupts(Trainer):
        def run_model(self, inputs):
            signal.raise_signal(signal.SIGINT)
            return super().run_model(inputs)

    trainer = subclass(Interrupts)
    before = state_of(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.profile()
    assert_same(before, state_of(trainer))


@pytest.mark.parametrize("persistent", [False, True])
def test_no_worker_is_left(persistent):
    loader = DataLoader(Augmented(), 2, num_workers=2, persistent_workers=persistent)
    trainer = make_trainer(loader)
    gc.collect()
    before = set(multiprocessing.active_children())  # other tests' own
    gc.disable()  # nothing may wait for the next collection
    try:
        trainer.profile(steps=2)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


# Loops and trainers of your own.


def test_your_own_loop_is_the_one_that_is_timed():
    class Own(Trainer):
        class loop_class(Loop):
            def losses(self, batch):
                losses = super().losses(batch)
                time.sleep(0.02)
                self.trainer.callbacks[0].total += 1
                return losses | {"twice": 2 * losses["loss"].detach()}

            def update(self, window, epoch):
                time.sleep(0.02)
                return super().update(window, epoch)

    class Total(Callback):
        total = 0

    base = make_trainer(make_batches(8))
    total = Total()
    parts = (base.model, base.optimizer, base.loss_fn, base.train_loader)
    trainer = Own(*parts, callbacks=[total], config=base.config)
    profile = trainer.profile(steps=3)
    assert profile.milliseconds[FORWARD] >= 20 and profile.milliseconds[OPTIMIZER] >= 20
    assert total.total == 0
    assert "train_twice" in trainer.fit(1)


def test_your_own_methods_are_called():
    class Own(Trainer):
        def unpack(self, batch):
            return batch["x"], batch["y"]

        def run_model(self, inputs):
            return self.model(inputs) * 1.0

    base = make_trainer()
    batches = [{"x": image, "y": mask} for image, mask in make_batches(5)]
    trainer = Own(base.model, base.optimizer, base.loss_fn, batches, config=base.config)
    assert len(trainer.profile(steps=2).steps) == 2


# The trace.


def test_the_trace_names_the_phases(tmp_path):
    trainer, plain = make_trainer(), make_trainer()
    profile = trainer.profile(steps=2, trace=tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count(BACKWARD) == 2 and {WAIT, CHECKS, FORWARD, OPTIMIZER} <= set(names)
    assert any("conv" in str(name) for name in names)
    assert "Trace of 2 steps: trace.json." in profile.notes[-1]
    for each in (trainer, plain):
        torch.manual_seed(1)
        each.fit(1)
    assert same_state(trainer, plain) and same_history(trainer.history, plain.history)


def test_a_trace_of_a_single_batch(tmp_path):
    profile = make_trainer(make_batches(1)).profile(trace=str(tmp_path / "trace.json"))
    assert (tmp_path / "trace.json").exists() and "Trace of 1 step:" in profile.notes[-1]


# What is refused.


def test_a_loader_that_can_be_read_once():
    batches = iter(make_batches(3))
    with pytest.raises(ValueError, match="list_iterator, which can be read once"):
        make_trainer(batches).profile()
    assert len(list(batches)) == 3


def test_a_loader_without_batches():
    class Empty:
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="train_loader gave no batch"):
        make_trainer(Empty()).profile()


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_other_numbers_of_steps(steps):
    with pytest.raises((ValueError, TypeError), match="steps=.* must be a whole number, 1 or more"):
        make_trainer().profile(steps)


def test_a_trace_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        make_trainer().profile(trace=tmp_path / "none" / "trace.json")


def test_a_call_from_a_callback():
    errors = []

    def look(trainer):
        with pytest.raises(RuntimeError, match=r"profile\(\) was called while a fit") as caught:
            trainer.profile()
        errors.append(caught)

    make_trainer(callbacks=[AtStep(1, look)]).fit(1)
    assert errors


def test_several_ranks(monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(trainer.run.lockstep, "ranks", type("Ranks", (), {"size": 4})())
    with pytest.raises(RuntimeError, match=r"a single process, and this run has 4\."):
        trainer.profile()


class Placed:
    """Remembers its position, as torchdata's loaders do."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        batches = make_batches(8)
        while self.position < len(batches):
            self.position += 1
            yield batches[self.position - 1]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_loader_that_keeps_its_own_position():
    loader = Placed()
    trainer = make_trainer(loader, callbacks=[AtStep(3, stop)])
    trainer.profile(steps=2)
    assert loader.position == 0
    trainer.fit(1)
    with pytest.raises(RuntimeError, match=r"after batch 3\. Call profile\(\) between two epochs"):
        trainer.profile()
    assert loader.position == 3
