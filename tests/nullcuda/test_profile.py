"""A profile on a GPU: its clock makes nobody wait, and everything stays as it was."""

import pytest
import torch

from nullcuda.runs import PRECISIONS, make_run, waits_expected
from nullcuda.waits import waits_noted
from small import assert_same
from ununennium.training.batches import map_tensors


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW fused"])
def test_a_profile_makes_the_host_wait_no_more_than_a_step_does(optimizer, precision):
    noted = []
    with waits_noted(noted.append):
        found = []
        for steps in (2, 6):
            noted.clear()
            make_run(optimizer, precision).profile(steps)
            found.append(len(noted))
    assert found[1] - found[0] == 4 * waits_expected(optimizer)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW fused", "momentum fused"])
def test_a_profile_changes_nothing_on_a_gpu(optimizer, precision):
    trainer = make_run(optimizer, precision)
    trainer.fit(1)

    def state():
        parts = [trainer.model.state_dict(), trainer.optimizer.state_dict()]
        parts += [trainer.run.task.precision.scaler.state_dict(), torch.cuda.get_rng_state()]
        return map_tensors(lambda tensor: tensor.detach().to("cpu", copy=True), parts)

    before, attributes = state(), sorted(vars(trainer.optimizer))
    profile = trainer.profile(steps=4)
    assert_same(before, state())
    assert sorted(vars(trainer.optimizer)) == attributes
    assert "by CUDA events on" in profile.title and len(profile.steps) == 4
