"""5 · Modes: every module's mode is restored as it was found."""

import pytest
import torch
from torch import nn

from small import AtStep, make_batches, make_trainer, same_history, same_state, small_net
from ununennium import Callback


def test_modes_are_restored_module_by_module():
    model = small_net()
    model[1].eval()  # a frozen batch norm
    frozen = model[1].running_mean.clone()
    trainer = make_trainer(val=make_batches(), model=model)
    trainer.fit(2)
    assert torch.equal(model[1].running_mean, frozen)
    assert model.training and not model[1].training and model[0].training
    model.eval()  # to inspect predictions
    seen = []
    trainer.callbacks.append(
        type("See", (), {"on_batch_end": lambda s, t, b, logs: seen.append(t.model[0].training)})()
    )
    trainer.fit(1)
    assert all(seen) and not model.training


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


class Freeze(Callback):
    """As in the recipe for fine-tuning."""

    def __init__(self, part, epochs):
        self.part, self.epochs = part, epochs

    def on_train_start(self, trainer):
        self.on_epoch_start(trainer, trainer.epoch)

    def on_epoch_start(self, trainer, epoch):
        trains = epoch >= self.epochs
        self.part.requires_grad_(trains).train(trains)


def fine_tuned(*callbacks):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    model = nn.Sequential(backbone, nn.Conv2d(8, 3, 1))

    def optimizer(parameters):
        groups = [{"params": backbone.parameters(), "lr": 1e-3}, {"params": model[1].parameters()}]
        return torch.optim.AdamW(groups, lr=2e-2)

    freeze = [Freeze(backbone, 2), *callbacks]
    return make_trainer(make_batches(4), make_batches(2), model=model, optimizer=optimizer,
                        callbacks=freeze, epochs=4)  # fmt: skip


def test_a_frozen_backbone_keeps_weights_and_batch_norms_until_it_is_thawed():
    trainer = fine_tuned()
    before = {name: value.clone() for name, value in trainer.model[0].state_dict().items()}
    trainer.fit(2)
    for name, value in trainer.model[0].state_dict().items():
        assert torch.equal(value, before[name]), name
    trainer.fit(1)
    after = trainer.model[0].state_dict()
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert after["1.num_batches_tracked"] == 4
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3, 2e-2]


@pytest.mark.parametrize("step", [3, 7, 10])
def test_fine_tuning_resumes_exactly_before_and_after_the_thaw(tmp_path, step):
    whole, first, second = fine_tuned(), fine_tuned(), fine_tuned()
    whole.fit()
    first.callbacks.append(AtStep(step, lambda trainer: trainer.request_stop("enough")))
    first.fit()
    second.load_checkpoint(first.save_checkpoint(tmp_path / "a.pt"))
    second.fit()
    assert same_state(whole, second) and same_history(whole.history, second.history)
