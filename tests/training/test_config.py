"""Settings are checked when they are written, and the message names the setting."""

import copy
import dataclasses
import inspect
import math
import pickle

import numpy as np
import pytest

from ununennium import TrainerConfig


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "epochs=-1 must be a whole number, 0 or more"),
        ({"epochs": 1.0}, TypeError, "epochs=1.0"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps=0 must be .* 1 or more"),
        ({"max_skipped_steps": 0}, ValueError, "max_skipped_steps=0 must be .* 1 or more"),
        ({"seed": 2**32}, ValueError, "seed=4294967296 .* 4294967295 or less"),
        ({"ignore_index": "none"}, TypeError, "ignore_index='none' must be a whole number"),
        ({"gradient_clip": -0.5}, ValueError, "gradient_clip=-0.5 must be a number, 0 or more"),
        ({"gradient_clip": math.nan}, ValueError, "gradient_clip=nan"),
        ({"gradient_clip": True}, TypeError, "gradient_clip=True"),
        ({"class_names": "abc"}, TypeError, "class_names='abc' must be a list"),
        ({"class_names": ["a", "a"]}, ValueError, r"class_names=\['a', 'a'\] .* different"),
        ({"mixed_precision": "bf16"}, TypeError, "mixed_precision='bf16' .* amp_dtype"),
        (
            {"compile": "max-autotune"},
            TypeError,
            r"compile='max-autotune' .*torch.compile\(model, mode",
        ),
        ({"channels_last": None}, TypeError, "channels_last=None must be True or False"),
        ({"sharded_checkpoints": 1}, TypeError, "sharded_checkpoints=1 must be True or False"),
        ({"amp_dtype": "half"}, ValueError, r"amp_dtype='half' .* \['float16', 'bfloat16'\]"),
        ({"scheduler_interval": "batch"}, ValueError, "scheduler_interval='batch' is not known"),
        ({"progress": "loud"}, ValueError, "progress='loud' is not known"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        TrainerConfig(**settings)


def test_integers_of_every_kind_become_int():
    config = TrainerConfig(epochs=np.int64(3), seed=np.uint8(1), ignore_index=np.int32(-1))
    for value in (config.epochs, config.seed, config.ignore_index):
        assert type(value) is int


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0}, {"gradient_clip": None}, {"gradient_clip": 0}, {"ignore_index": None},
        {"ignore_index": "auto"}, {"class_names": ("a", "b")}, {"seed": 0}, {"seed": 2**32 - 1},
    ],
)  # fmt: skip
def test_settings_at_the_limits_are_taken(settings):
    config = TrainerConfig(**settings)
    for name, value in settings.items():
        assert getattr(config, name) == value


def test_only_the_first_five_settings_may_be_positional():
    assert TrainerConfig(5, "cpu", False, 2, None).accumulation_steps == 2
    with pytest.raises(TypeError):
        TrainerConfig(5, "cpu", False, 2, None, "float16")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("epoch", "Did you mean 'epochs'?"),
        ("max_epochs", "Did you mean 'epochs'?"),
        ("gradient_clip_val", "Did you mean 'gradient_clip'?"),
        ("accumulation", "Did you mean 'accumulation_steps'?"),
        ("lr", "Pass it to the optimizer."),
        ("batch_size", "Pass it to the DataLoader."),
        ("xyz", "The settings are epochs, device, "),
    ],
)
def test_a_setting_with_a_slip_in_its_name_is_told_with_the_name_meant(name, hint):
    for make in (TrainerConfig, lambda **new: dataclasses.replace(TrainerConfig(), **new)):
        with pytest.raises(TypeError) as caught:
            make(**{name: 3})
        assert str(caught.value).startswith(f"TrainerConfig has no setting {name!r}. {hint}")


def test_the_settings_are_still_a_dataclass_with_a_signature():
    config = TrainerConfig(5, "cpu", seed=3)
    names = [field.name for field in dataclasses.fields(config)]
    assert list(inspect.signature(TrainerConfig).parameters) == names
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert TrainerConfig(**dataclasses.asdict(config)) == config

    @dataclasses.dataclass
    class Own(TrainerConfig):
        rate: float = 0.1

    assert Own(5, rate=0.2).rate == 0.2 and Own(5).epochs == 5
