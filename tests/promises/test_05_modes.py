"""5 · Modes: every module's mode is restored as it was found."""

import torch

from small import make_batches, make_trainer, small_net


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
