"""Devices, autocast and loss scaling."""

import warnings

import pytest
import torch
from torch import nn

from small import DEVICES
from ununennium import TrainerConfig
from ununennium.training.messages import TrainingWarning
from ununennium.training.precision import Precision, precision_for, renewed, resolve_device

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that there are so many GPUs."""

    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    return pretend


@pytest.mark.parametrize("name", ["cuda", "cuda:1", torch.device("cuda")])
def test_cuda_without_a_gpu_is_the_cpu_with_one_warning(gpus, name):
    gpus(0)
    silence = "Pass device='cpu' or device='auto' to silence this warning"
    with pytest.warns(
        TrainingWarning, match=f"no GPU here, .* instead of '{name}'. {silence}"
    ) as w:
        assert resolve_device(name) == CPU
    assert len(w) == 1 and w[0].filename == __file__


@pytest.mark.parametrize("name", ["auto", "cpu", CPU])
def test_the_cpu_is_found_without_a_warning(gpus, name):
    gpus(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device(name) == CPU


def test_auto_prefers_cuda_then_mps(gpus, monkeypatch):
    gpus(1)
    assert resolve_device("auto") == torch.device("cuda", 0)
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")


def test_the_gpu_of_a_process_of_torchrun(gpus, monkeypatch):
    gpus(4)
    assert resolve_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("cuda") == resolve_device("auto") == torch.device("cuda", 3)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(("count", "sees"), [(1, "1 GPU,"), (2, "2 GPUs,")])
def test_a_gpu_that_does_not_exist(gpus, count, sees):
    gpus(count)
    with pytest.raises(ValueError, match=f"device='cuda:{count}' does not exist: .* sees {sees}"):
        resolve_device(f"cuda:{count}")


def test_an_unknown_device():
    with pytest.raises(ValueError, match="device='gpu' is not known. Pass 'auto', 'cuda'"):
        resolve_device("gpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_autocast_changes_outputs_and_not_parameters(device, dtype):
    precision, layer = Precision(torch.device(device), dtype), nn.Linear(2, 2).to(device)
    with precision.autocast():
        output = layer(torch.ones(1, 2, device=device))
    assert output.dtype == (dtype or torch.float32) and layer.weight.dtype == torch.float32
    assert precision.scaler.is_enabled() == (dtype is torch.float16)


def test_full_precision_leaves_an_outer_autocast_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16), Precision(CPU, None).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


# The scale.


def scaled(dtype=torch.float16):
    weight = nn.Parameter(torch.zeros(3))
    return Precision(CPU, dtype), weight, torch.optim.SGD([weight], lr=1.0)


def test_gradients_are_unscaled_once_until_the_next_update():
    precision, weight, optimizer = scaled()
    for _ in range(2):
        precision.scale(weight.sum()).backward()
        assert weight.grad.tolist() == [2.0**16] * 3
        for _ in range(3):
            precision.unscale(optimizer)
        assert weight.grad.tolist() == [1.0] * 3
        precision.update()
        weight.grad = None


def test_a_backward_pass_after_unscaling_is_refused():
    precision, weight, optimizer = scaled()
    precision.scale(weight.sum()).backward()
    precision.unscale(optimizer)
    with pytest.raises(RuntimeError, match="scaled gradients to unscaled ones. Call unscale"):
        precision.scale(weight.sum(), optimizer)
    precision.update()
    precision.scale(weight.sum(), optimizer)


def test_each_optimizer_is_unscaled_once():
    precision, weight, optimizer = scaled()
    other = torch.ones(2, requires_grad=True)
    second = torch.optim.SGD([other])
    precision.scale(weight.sum() + other.sum()).backward()
    for each in (optimizer, second, optimizer, second):
        precision.unscale(each)
    assert weight.grad.tolist() == [1.0] * 3 and other.grad.tolist() == [1.0] * 2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_without_a_scale_gradients_stay_as_they_are(dtype):
    precision, weight, optimizer = scaled(dtype)
    scaler = precision.scaler
    for _ in range(2):
        precision.scale(weight.sum()).backward()
        precision.unscale(optimizer)
    assert weight.grad.tolist() == [2.0] * 3
    with pytest.raises(RuntimeError, match="scaled gradients to unscaled ones"):
        precision.scale(weight.sum(), optimizer)  # refused alike, so that a GPU is no surprise
    precision.update()
    precision.forget_unscaled()
    assert precision.scaler is scaler and scaler.state_dict() == {}


def test_a_forgotten_unscale_keeps_the_state_of_the_scaler():
    precision, weight, optimizer = scaled()
    for gradient in (torch.inf, 1.0, 1.0, 1.0):
        precision.scale((gradient * weight).sum()).backward()
        precision.unscale(optimizer)
        before = precision.scaler.state_dict()
        precision.forget_unscaled()
        assert precision.scaler.state_dict() == before and not precision.unscaled
        weight.grad = None
        precision.scale((gradient * weight).sum()).backward()
        precision.unscale(optimizer)
        precision.update()
        weight.grad = None
    assert precision.scaler.get_scale() == 2.0**15
    assert precision.scaler.state_dict()["_growth_tracker"] == 3


def test_a_renewed_scaler_has_all_settings():
    old = torch.amp.GradScaler("cpu", 8.0, growth_factor=3.0, backoff_factor=0.1, growth_interval=7)
    assert renewed(old, CPU).state_dict() == old.state_dict()


@pytest.mark.parametrize(
    ("settings", "device", "dtype"),
    [
        ({}, "cuda:1", torch.float16),
        ({"amp_dtype": "bfloat16"}, "cuda:1", torch.bfloat16),
        ({"amp_dtype": "bfloat16", "mixed_precision": False}, "cuda:1", None),
        ({"amp_dtype": "bfloat16"}, "cpu", None),  # stands in for a GPU
        ({"amp_dtype": "bfloat16", "device": "auto"}, "cpu", None),
        ({"device": "cpu"}, "cpu", None),
        ({"amp_dtype": "bfloat16", "device": "cpu"}, "cpu", torch.bfloat16),
        ({"amp_dtype": "bfloat16", "device": torch.device("cpu")}, "cpu", torch.bfloat16),
        ({"amp_dtype": "bfloat16", "device": "cpu", "mixed_precision": False}, "cpu", None),
        ({"amp_dtype": "bfloat16", "device": "mps"}, "mps", None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
def test_mixed_precision_is_for_cuda_and_for_a_cpu_that_is_named(settings, device, dtype):
    precision = precision_for(TrainerConfig(**settings), torch.device(device))
    assert precision.dtype == dtype and precision.device == torch.device(device)
    assert precision.scaler.is_enabled() == (dtype == torch.float16 and torch.cuda.is_available())
