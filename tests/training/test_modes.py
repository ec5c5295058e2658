"""Training and evaluation mode, module by module."""

import contextlib

from torch import nn

from ununennium.training.modes import TrainingModes, modes_restored


def make_model():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Sequential(nn.Dropout()))
    model[1].eval()
    return model


def modes_of(model):
    return [module.training for module in model.modules()]


def test_modes_are_restored_after_an_error_too():
    model = make_model()
    with contextlib.suppress(ZeroDivisionError), modes_restored(model):
        model.eval()
        assert not any(modes_of(model))
        raise ZeroDivisionError
    assert modes_of(model) == [True, True, False, True, True]


def test_a_module_that_was_added_in_the_block_keeps_its_mode():
    model = make_model()
    with modes_restored(model):
        model.append(nn.Dropout().eval())
    assert modes_of(model) == [True, True, False, True, True, False]


def test_frozen_modules_stay_frozen_after_the_model_was_evaluated():
    model = make_model()
    modes = TrainingModes(model)
    model.eval()
    modes.apply(model)
    assert modes_of(model) == [True, True, False, True, True]


def test_a_model_in_training_mode_decides_again_what_is_frozen():
    model = make_model()
    modes = TrainingModes(model)
    model.train()
    model[2].eval()
    modes.apply(model)
    assert modes_of(model) == [True, True, True, False, False]


def test_a_model_that_was_never_in_training_mode_has_nothing_frozen():
    model = make_model().eval()
    TrainingModes(model).apply(model)
    assert all(modes_of(model))
