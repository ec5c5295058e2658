"""The average of the weights: its value, its scores, its files; the raw run does not notice."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from small import (
    At,
    assert_same,
    make_batches,
    make_trainer,
    names_in,
    outcome,
    same_history,
    same_state,
    small_net,
    start_process,
)
from ununennium import (
    EMA,
    Callback,
    CheckpointCallback,
    CheckpointError,
    EarlyStopping,
    load_weights,
)
from ununennium.plots import plot_history
from ununennium.training.ema import decay_after


class Noisy(Dataset):
    """Samples with noise from every global generator, and from one of its own."""

    def __init__(self, count=12, seed=0):
        self.image, self.mask = make_batches(1, size=count, seed=seed)[0]
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self):
        return len(self.image)

    def __getitem__(self, number):
        noise = torch.randn(4, 8, 8) + torch.randn(4, 8, 8, generator=self.generator)
        return self.image[number] + 0.1 * noise + random.random() + np.random.rand(), self.mask[
            number
        ]


def noisy_trainer(*callbacks, workers=0, persistent=False, model=None, **settings):
    def loader(seed):
        return DataLoader(
            Noisy(seed=seed), 2, shuffle=True, generator=torch.Generator().manual_seed(seed),
            num_workers=workers, persistent_workers=persistent,
        )  # fmt: skip

    settings = {"epochs": 3, "seed": 1} | settings
    return make_trainer(loader(3), loader(4), model=model, callbacks=callbacks, **settings)


def ema_of(trainer):
    return next(callback for callback in trainer.callbacks if isinstance(callback, EMA))


def averaged(trainer):
    return {k: v.clone() for k, v in ema_of(trainer).state_dict()["model"].items()}


def test_the_average_is_that_of_a_loop_by_hand():
    seen = []

    class Watch(Callback):
        def on_safepoint(self, trainer, phase):
            if phase == "train":
                seen.append({k: v.clone() for k, v in trainer.model.state_dict().items()})

    trainer = make_trainer(callbacks=[Watch(), EMA(0.6)], accumulation_steps=2)
    trainer.fit(3)
    assert len(seen) == 9
    expected = {name: value.double() for name, value in seen[0].items()}
    for number, state in enumerate(seen[1:], 1):
        decay = min(0.6, (1 + number) / (10 + number))
        for name, value in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    own = averaged(trainer)
    assert own.keys() == expected.keys()
    for name, value in own.items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[name], atol=1e-6), name
        else:
            assert torch.equal(value, seen[-1][name])  # a counter
    assert ema_of(trainer).state_dict()["updates"] == 9


def test_the_decay_grows_up_to_the_given_one():
    assert decay_after(1, 0.999) == 2 / 11 and decay_after(10**6, 0.999) == 0.999


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_the_raw_run_is_bitwise_that_without_an_average(workers, persistent):
    plain = noisy_trainer(workers=workers, persistent=persistent)
    with_average = noisy_trainer(EMA(0.9), workers=workers, persistent=persistent)
    history, random_state = plain.fit(), outcome(plain)["random"]
    more = with_average.fit()
    assert random_state == outcome(with_average)["random"]
    assert same_state(plain, with_average)
    assert same_history(history, {name: more[name] for name in history})
    assert {name for name in more if name not in history} == {
        name.replace("val_", "val_ema_") for name in history if name.startswith("val_")
    } - {"val_ema_IoU_classes"}
    assert_same(plain.confusion.table, with_average.confusion.table)


def test_modes_and_gradients_are_left_alone():
    model = small_net()
    model[1].eval()
    trainer = make_trainer(val=make_batches(2), model=model, callbacks=[EMA()])
    trainer.fit(2)
    assert [m.training for m in trainer.model.modules()] == [True, True, False, True, True]
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert trainer.model[1].num_batches_tracked == 0


def test_the_scores_are_those_of_the_average():
    trainer = make_trainer(val=make_batches(3), callbacks=[EMA(0.9)])
    history = trainer.fit(2)
    fresh = make_trainer(val=make_batches(3), model=small_net(seed=7))
    fresh.model.load_state_dict(averaged(trainer))
    for name, value in fresh.validate().items():
        if not name.endswith("_classes"):  # a count, which has no curve of its own
            assert history[name.replace("val_", "val_ema_")][-1] == value
    assert history["val_ema_loss"] != history["val_loss"]
    with ema_of(trainer).applied():
        assert trainer.validate()["val_loss"] == history["val_ema_loss"][-1]
    assert trainer.validate()["val_loss"] == history["val_loss"][-1]


def test_metrics_of_the_user_keep_the_raw_scores():
    class Count:
        higher_is_better = True

        def reset(self):
            self.values = []

        def update(self, output, target):
            self.values.append(float(output.mean()))

        def compute(self):
            return sum(self.values)

    metric = Count()
    trainer = make_trainer(val=make_batches(3), callbacks=[EMA()], metrics={"mine": metric})
    history = trainer.fit(2)
    assert metric.compute() == pytest.approx(history["val_mine"][-1], rel=1e-6)
    assert history["val_mine"] != history["val_ema_mine"]
    assert trainer.directions["val_ema_mine"] == "max"
    assert not any("ema_ema" in name for name in trainer.directions)


def test_a_best_file_and_early_stopping_go_by_the_average(tmp_path):
    keep = CheckpointCallback(tmp_path, monitor="val_ema_IoU", mode="max")
    stop = EarlyStopping("val_ema_IoU", patience=50)
    trainer = make_trainer(val=make_batches(2), callbacks=[EMA(0.9), keep, stop])
    assert trainer.check() == []
    history = trainer.fit(3)
    assert keep.best_score == stop.best == max(history["val_ema_IoU"])
    model = small_net(seed=5)
    assert load_weights(model, keep.best_path, averaged=True) is model and not model.training
    saved = dict(torch.load(keep.best_path)["callbacks"])["EMA"]["model"]
    assert_same(dict(model.state_dict()), saved)
    raw = load_weights(small_net(), keep.best_path).state_dict()
    assert not torch.equal(raw["0.weight"], saved["0.weight"])


def test_a_file_without_an_average_says_so(tmp_path):
    path = make_trainer().save_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no EMA among the callbacks"):
        load_weights(small_net(), path, averaged=True)


def test_a_monitor_before_the_average_is_told_to_come_after_it():
    trainer = make_trainer(val=make_batches(1), callbacks=[EarlyStopping("val_ema_IoU"), EMA()])
    with pytest.raises(ValueError, match="Put EMA first"):
        trainer.fit(1)
    assert trainer.global_step == 0


@pytest.mark.parametrize("wrong", [1.0, -0.1, "0.9", True, False])
def test_a_wrong_decay_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="such as 0.999"):
        EMA(wrong)


def test_an_average_that_does_not_exist_yet_is_refused():
    with pytest.raises(RuntimeError, match="Call fit first"), EMA().applied():
        pass


def test_one_object_starts_anew_for_a_new_run():
    ema = EMA(0.9)
    make_trainer(callbacks=[ema]).fit(2)
    again = make_trainer(callbacks=[ema])
    again.fit(1)
    alone = make_trainer(callbacks=[EMA(0.9)])
    alone.fit(1)
    assert_same(averaged(again), averaged(alone))


def end(trainer):
    return outcome(trainer) | {
        "ema": averaged(trainer),
        "n": ema_of(trainer).state_dict()["updates"],
    }


def run_in_folder(folder, step=None, phase="train", **options):
    """Train with an average and files; the process is killed at a step, if there is one."""
    steps = CheckpointCallback(folder, "val_ema_IoU", "max", every_n_steps=1)

    class Kill(Callback):
        def on_safepoint(self, trainer, now):
            if now == phase and trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    # The file is saved by a callback before EMA, and by one after it, in turn.
    save_first = CheckpointCallback(folder, every_n_steps=1)
    callbacks = (
        [save_first, EMA(0.9), Kill()] if options.pop("first") else [EMA(0.9), steps, Kill()]
    )
    trainer = noisy_trainer(*callbacks, **options)
    trainer.resume(folder)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("step", "phase"), [(4, "train"), (8, "train"), (6, "validate")])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_was_killed_resumes_to_the_same_average(
    tmp_path, step, phase, first, accumulation
):
    options = {"first": first, "accumulation_steps": accumulation}
    step = step if accumulation == 1 else step // 2
    process = start_process(run_in_folder_quietly, tmp_path / "a", step, phase, options)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert "last.pt" in names_in(tmp_path / "a")
    resumed = run_in_folder(tmp_path / "a", **options)
    state = end(resumed)  # before another run draws random numbers
    whole = run_in_folder(tmp_path / "b", **options)
    assert whole.epoch == resumed.epoch == 3
    assert_same(end(whole), state)


def run_in_folder_quietly(folder, step, phase, options):
    run_in_folder(folder, step, phase, **options)


def test_a_fit_that_was_stopped_by_an_error_loses_no_update():
    def fail(trainer):
        raise RuntimeError("a callback fails")

    whole, broken = (noisy_trainer(EMA(0.9)) for _ in range(2))
    whole.fit()
    broken.callbacks.insert(0, At("on_safepoint", 3, fail))  # before EMA sees the step
    with pytest.raises(RuntimeError):
        broken.fit()
    broken.callbacks.pop(0)
    broken.fit()
    assert_same(averaged(whole), averaged(broken))


def test_a_loaded_file_replaces_the_average(tmp_path):
    trainer = noisy_trainer(EMA(0.9))
    trainer.fit(1)
    path, then = trainer.save_checkpoint(tmp_path / "a.pt"), averaged(trainer)
    trainer.fit(1)
    assert not torch.equal(averaged(trainer)["0.weight"], then["0.weight"])
    trainer.load_checkpoint(path)
    assert_same(averaged(trainer), then)


def test_an_average_from_a_file_is_taken_over_once(tmp_path):
    """A second fit goes on from where the first one ended, not from the file."""
    straight, resumed = noisy_trainer(EMA(0.9)), noisy_trainer(EMA(0.9))
    straight.fit(1)
    path = straight.save_checkpoint(tmp_path / "a.pt")
    for _ in range(2):
        straight.fit(1)
    resumed.load_checkpoint(path)
    for _ in range(2):
        resumed.fit(1)
    assert_same(averaged(resumed), averaged(straight))
    assert ema_of(resumed).state_dict()["updates"] == 18


def test_without_a_second_validation_there_are_no_scores():
    history = make_trainer(val=make_batches(1), callbacks=[EMA(validates=False)]).fit(1)
    assert not any(name.startswith("val_ema_") for name in history)
    assert "val_loss" not in make_trainer(callbacks=[EMA()]).fit(1)


def test_the_raw_weights_are_back_after_an_error():
    trainer = make_trainer(callbacks=[EMA(0.9)])
    trainer.fit(1)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(KeyError), ema_of(trainer).applied():
        raise KeyError
    assert_same(dict(trainer.model.state_dict()), before)


def test_a_model_that_cannot_be_copied_is_explained():
    class Locked(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    trainer = make_trainer(model=Locked(4, 3, 1), callbacks=[EMA()])
    with pytest.raises(RuntimeError, match=r"no copies[\s\S]*EMA keeps a copy of the model"):
        trainer.fit(1)


def test_average_and_raw_scores_share_panels():
    history = make_trainer(val=make_batches(2), callbacks=[EMA()]).fit(2)
    panels = {axis.get_title(): axis for axis in plot_history(history).axes}
    labels = {t: [line.get_label() for line in axis.get_lines()] for t, axis in panels.items()}
    assert "val_ema_loss" in labels["loss"] and "mean of EMA" in labels["IoU"]
    assert "val_ema_loss" not in labels["scores"] and "val_ema_IoU" not in labels["scores"]
