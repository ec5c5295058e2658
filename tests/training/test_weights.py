"""The weights of a file go into a model of another script, or nothing does."""

import numpy as np
import pytest
import torch
from torch import nn

from small import make_batches, make_trainer, small_net
from ununennium import EMA, CheckpointError, EarlyStopping, TrainerConfig, load_weights, predict
from ununennium.training.checkpoint import save_file

CPU = TrainerConfig(device="cpu", progress="none")
CHIPS = torch.cat([image for image, _ in make_batches(3)])


def test_weights_of_a_checkpoint_predict_in_another_script(tmp_path):
    trainer = make_trainer()
    trainer.fit(1)
    path = trainer.save_checkpoint(tmp_path / "run.pt")
    found = predict(load_weights(small_net(seed=1), path), [CHIPS], config=CPU)
    assert np.array_equal(found, trainer.predict([CHIPS]))
    assert torch.load(path, weights_only=True)["model"].keys() == small_net().state_dict().keys()


WRAPPERS = {
    "plain": lambda model: model,
    "data parallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled, then wrapped": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("loaded", WRAPPERS)
def test_a_file_of_weights_alone_will_do(saved, loaded, tmp_path):
    one, other = small_net(), small_net(seed=1)
    torch.save(WRAPPERS[saved](one).state_dict(), tmp_path / "weights.pt")
    model = load_weights(WRAPPERS[loaded](other), tmp_path / "weights.pt")
    assert not model.training
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_part_may_be_called_module(tmp_path):
    def make(seed):
        model = nn.Module()
        model.module = small_net(seed=seed)
        return model

    one, other = make(0), make(1)
    torch.save(one.state_dict(), tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert torch.equal(one.module[0].weight, other.module[0].weight)


def damage(path):
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(nn.Conv2d(4, 3, 1).state_dict(), path), "holds another model"),
        (lambda path: save_file({"model": nn.Linear(2, 1).state_dict()}, path), "another model"),
        (lambda path: (torch.save(small_net().state_dict(), path), damage(path)), "is damaged"),
        (
            lambda path: torch.save({"weights": 1}, path),
            r"expected a dictionary with 'model', found",
        ),
        (lambda path: torch.save({}, path), "expected a dictionary with 'model'"),
        (
            lambda path: torch.save({"0.weight": torch.zeros(8, 4, 1, 1), "epoch": 3}, path),
            "expected a dictionary with 'model'",
        ),
        (lambda path: None, "There is no checkpoint file"),
        (
            lambda path: save_file({"model": {}, "shards": "step=1.shards"}, path),
            "in the folder step",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(write, message, tmp_path):
    write(tmp_path / "a.pt")
    model = small_net()
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path / "a.pt")
    assert torch.equal(model[0].weight, before) and model.training


def test_a_best_path_that_is_none_is_told():
    with pytest.raises(CheckpointError, match="The path is None"):
        load_weights(small_net(), None)


def test_the_average_is_found_among_what_other_callbacks_keep(tmp_path):
    callbacks = [EMA(0.5), EarlyStopping("train_loss", patience=9)]
    for order, name in ((1, "a.pt"), (-1, "b.pt")):
        trainer = make_trainer(callbacks=callbacks[::order])
        trainer.fit(2)
        path = trainer.save_checkpoint(tmp_path / name)
        average = load_weights(small_net(), path, averaged=True).state_dict()
        expected = callbacks[0].state_dict()["model"]
        assert all(torch.equal(average[key], expected[key]) for key in average)


@pytest.mark.parametrize("callback", [EarlyStopping("train_loss"), EMA()])
def test_a_file_of_a_run_that_averaged_nothing_says_so(callback, tmp_path):
    trainer = make_trainer(callbacks=[callback])
    if not isinstance(callback, EMA):
        trainer.fit(1)
    path = trainer.save_checkpoint(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        load_weights(small_net(), path, averaged=True)


def test_raw_weights_are_not_taken_for_an_average(tmp_path):
    torch.save(small_net(seed=1).state_dict(), tmp_path / "weights.pt")
    model = small_net()
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match="expected a dictionary with 'model'"):
        load_weights(model, tmp_path / "weights.pt", averaged=True)
    assert torch.equal(model[0].weight, before)
