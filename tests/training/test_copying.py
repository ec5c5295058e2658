"""A copied trainer goes on exactly as the original would, and leaves it alone."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from small import (
    SCHEDULERS,
    AtStep,
    assert_same,
    make_batches,
    make_trainer,
    names_in,
    outcome,
    same_history,
    same_state,
    shuffled,
    small_net,
    stop,
    vector,
)
from ununennium import EMA, CheckpointCallback, Dashboard, EarlyStopping, Trainer


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def goes_on(trainer, epochs=1):
    """Train, and return all that the run has decided."""
    trainer.fit(epochs)
    return {name: part for name, part in outcome(trainer).items() if name != "random"}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("epochs", [0, 1])
def test_k_fold_by_deepcopy_before_and_after_a_fit(scheduler, epochs):
    base = make_trainer(
        val=make_batches(2, seed=5), scheduler=SCHEDULERS[scheduler], callbacks=[EMA()], epochs=4,
        scheduler_interval="epoch" if scheduler in ("cosine", "sequence") else "auto",
    )  # fmt: skip
    base.fit(epochs)
    before, history = vector(base.model), base.history
    folds = [copy.deepcopy(base) for _ in range(3)]
    for number, fold in enumerate(folds):
        fold.train_loader = make_batches(6, seed=number)
        assert len(fold.fit(2)["train_loss"]) == epochs + 2
    assert torch.equal(vector(base.model), before) and base.history == history
    assert not torch.equal(vector(folds[0].model), vector(folds[1].model))
    fold = copy.deepcopy(base)
    assert_same(goes_on(fold, 2), goes_on(base, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [4, 8, 11])
def test_a_copy_in_the_middle_of_an_epoch_goes_on_as_the_original(step, workers):
    trainer = shuffled([AtStep(step, stop), EarlyStopping("train_loss")], own_generator=True)
    data = make_batches(16)
    trainer.train_loader = DataLoader(
        data, batch_size=None, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    trainer.fit()
    twin, number = copy.deepcopy(trainer), torch.get_rng_state()
    twin.fit()
    torch.set_rng_state(number)
    trainer.fit()
    assert same_state(twin, trainer) and same_history(twin.history, trainer.history)
    assert twin.epoch == 3 and trainer.callbacks[1].best == twin.callbacks[1].best


def test_a_copy_is_seeded_as_a_new_trainer():
    base = make_trainer(model=nn.Sequential(nn.Dropout(0.5), small_net()), seed=3)
    first, second = copy.deepcopy(base), copy.deepcopy(base)
    assert first.fit(1) == second.fit(1) == base.fit(1)


def test_frozen_layers_and_attributes_of_a_subclass_are_copied():
    class Own(Trainer):
        def loss(self, output, target):
            return self.factor * nn.functional.cross_entropy(output, target, ignore_index=255)

    base = make_trainer()
    own = Own.__new__(Own)
    own.run, own.factor = base.run, 2.0
    own.run.task.methods, own.run.task.loss_fn = own, own.loss
    own.model[1].eval()
    own.fit(1)
    twin = copy.deepcopy(own)
    twin.model.eval()
    twin.factor = 0.0
    before = vector(twin.model)
    assert twin.run.task.methods is twin and twin.fit(1)["train_loss"][-1] == 0
    mean = own.model[1].running_mean
    assert torch.equal(mean, torch.zeros_like(mean)) and twin.model[1].running_mean.equal(mean)
    assert before.shape == vector(own.model).shape and own.fit(1)["train_loss"][-1] > 0


def test_an_optimizer_with_memory_of_its_own_is_copied():
    trainer = make_trainer(optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
    calls = []
    trainer.optimizer.register_step_post_hook(lambda *details: calls.append(details[0]))
    trainer.optimizer.lookahead = {"slow": list(trainer.model.parameters())}
    twin = copy.deepcopy(trainer)
    slow = twin.optimizer.lookahead["slow"]
    assert all(a is b for a, b in zip(slow, twin.model.parameters(), strict=True))
    twin.fit(1)
    assert set(map(id, calls)) == {id(twin.optimizer)}


def test_a_copy_leaves_the_checkpoints_of_the_original_alone(tmp_path):
    trainer = make_trainer(callbacks=[CheckpointCallback(tmp_path, "train_loss")])
    trainer.fit(1)
    files = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
    with pytest.warns(UserWarning, match="The copy of the trainer writes to .*Give it callbacks"):
        twin = copy.deepcopy(trainer)
    with pytest.warns(UserWarning, match=r"last.pt of an earlier run was moved to last-old1.pt"):
        twin.fit(1)
    (best,) = [name for name in files if name.startswith("epoch")]
    assert (tmp_path / "last-old1.pt").read_bytes() == files["last.pt"]
    assert (tmp_path / best).read_bytes() == files[best]


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_pickled_trainer_is_refused_in_a_sentence(epochs):
    trainer = make_trainer()
    trainer.fit(epochs)
    with pytest.raises(TypeError, match=r"cannot be pickled. Save it by trainer.save_checkpoint"):
        pickle.dumps(trainer)


def test_what_cannot_be_copied_is_named():
    class OpenFile(Dataset):
        def __init__(self):
            self.file = open(__file__)  # noqa: SIM115

        def __len__(self):
            return 6

        def __getitem__(self, number):
            return make_batches(1, size=1)[0]

    data = OpenFile()
    trainer = make_trainer(DataLoader(data, batch_size=None))
    with pytest.raises(TypeError, match=r"as its train_loader cannot: .*Build a new one, for each"):
        copy.deepcopy(trainer)
    data.file.close()


def test_a_trainer_is_not_copied_while_it_trains():
    refused = []

    def try_it(trainer):
        with pytest.raises(RuntimeError, match="was called while a fit"):
            copy.deepcopy(trainer)
        refused.append(True)

    make_trainer(callbacks=[AtStep(2, try_it)]).fit(1)
    assert refused


def test_the_copy_of_a_dashboard_has_a_cell_of_its_own(shown):
    trainer = make_trainer(callbacks=[Dashboard(height=300)])
    trainer.fit(1)
    twin = copy.deepcopy(trainer)
    assert twin.dashboard is not trainer.dashboard and twin.dashboard.height == 300
    count = len(shown)
    twin.fit(1)
    assert len(shown) > count and twin.dashboard.cell is not trainer.dashboard.cell
