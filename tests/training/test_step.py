"""One guarded optimizer step: all of it happens, or none."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from small import DEVICES, HostReads, small_net
from ununennium.training.batches import MicroBatch
from ununennium.training.precision import Precision
from ununennium.training.step import (
    BufferGuard,
    Gradients,
    Step,
    Stepper,
    check_gradient,
    clip_gradients,
    gradient_norm,
)

pytestmark = pytest.mark.usefixtures("device_decides")

CPU = torch.device("cpu")
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def make_window(*weights):
    weights = weights or (1.0,)
    return [MicroBatch(None, None, None, weight, number) for number, weight in enumerate(weights)]


def make_stepper(optimizer="SGD", dtype=None, clip=None, size=2, device="cpu"):
    weight = nn.Parameter(torch.zeros(size, device=device))
    made = OPTIMIZERS[optimizer]([weight])
    precision = Precision(torch.device(device), dtype)
    return Stepper(nn.ParameterList([weight]), made, precision, clip), weight


def backward(stepper, weight, gradient, share=1.0):
    stepper.backward((weight * torch.as_tensor(gradient, device=weight.device)).sum(), share)


def take(stepper, weight, gradient):
    """Take a whole step along a gradient."""
    stepper.begin()
    backward(stepper, weight, gradient)
    return stepper.step(make_window())


# The norm and the clip.


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.5, 1.0, 30.0]),
)
def test_clipping_is_that_of_pytorch(values, limit):
    ours = [torch.tensor(part) for part in values]
    theirs = [nn.Parameter(torch.zeros_like(part)) for part in ours]
    for parameter, gradient in zip(theirs, ours, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(theirs, limit or math.inf)
    assert torch.allclose(gradient_norm(ours), expected)
    norm = gradient_norm(ours)
    assert torch.allclose(norm, expected)
    by_number = [gradient.clone() for gradient in ours]
    clip_gradients(ours, norm, limit)
    clip_gradients(by_number, norm.item(), limit)
    assert all(map(torch.equal, ours, by_number))
    assert all(torch.allclose(g, p.grad) for g, p in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_makes_the_norm_bad(bad):
    gradients = [torch.zeros(1000), torch.zeros(3, 3, dtype=torch.float16)]
    assert gradient_norm(gradients).item() == 0 == gradient_norm([]).item()
    gradients[1][1, 1] = bad
    assert not gradient_norm(gradients).isfinite()


# Buffers.


def test_buffers_are_restored_even_if_the_model_assigned_new_ones():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("shared", torch.zeros(1).expand(5))
            self.register_buffer("nothing", None)
            self.register_buffer("count", torch.tensor(0))

        def spoil(self):
            self.mean = torch.full((4,), math.nan)
            self.count += 1

    model = nn.Sequential(Moving(), nn.BatchNorm1d(4))
    guard, before = BufferGuard(model), copy.deepcopy(model.state_dict())
    guard.keep()
    for restore, is_back in (
        (guard.restore, True),
        (lambda: guard.restore_unless(torch.tensor(False)), True),
        (lambda: guard.restore_unless(torch.tensor(True)), False),
    ):
        model[0].spoil()
        restore()
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before) == is_back
    BufferGuard(nn.Linear(1, 1)).keep()  # there are none


# The step.


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2), max_size=12),
    st.sets(st.integers(0, 11)),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from([None, torch.float16]),
    st.booleans(),
)
def test_steps_are_those_of_a_plain_loop_without_the_bad_ones(gradients, bad, name, dtype, clip):
    stepper, weight = make_stepper(name, dtype, 1.0 if clip else None)
    plain = nn.Parameter(torch.zeros(2))
    optimizer = OPTIMIZERS[name]([plain])
    for number, gradient in enumerate(gradients):
        is_bad = number in bad
        step = take(stepper, weight, [math.nan, gradient[1]] if is_bad else gradient)
        assert bool(step.stepped) == (not is_bad)
        if not is_bad:
            plain.grad = torch.tensor(gradient)
            if clip:
                nn.utils.clip_grad_norm_([plain], 1.0)
            optimizer.step()
    assert torch.allclose(weight, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("after", [0, 2])
def test_a_skipped_step_changes_nothing(name, after):
    model = small_net()
    optimizer = OPTIMIZERS[name](model.parameters())
    stepper = Stepper(model, optimizer, Precision(CPU, None), 1.0)

    def step(image):
        stepper.begin()
        stepper.backward(model(image).square().mean(), 1.0)
        return stepper.step(make_window())

    for _ in range(after):
        step(torch.rand(2, 4, 8, 8))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    image = torch.rand(2, 4, 8, 8)
    image[0, 0, 3, 3] = math.nan
    assert not step(image).stepped
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before[0].items())
    for key, state in before[1].items():
        now = optimizer.state_dict()["state"][key]
        assert all(
            torch.equal(torch.as_tensor(now[n]), torch.as_tensor(v)) for n, v in state.items()
        )
    assert all(p.grad is None for p in model.parameters())
    assert step(torch.rand(2, 4, 8, 8)).stepped


def test_new_momentum_of_a_skipped_first_step_is_zero():
    stepper, weight = make_stepper("fused momentum", size=10_000)
    junk = [torch.full((10_000,), 7.0) for _ in range(8)]
    del junk  # so that fresh memory is not zero by accident
    take(stepper, weight, math.nan)
    assert not stepper.guarded.optimizer.state[weight]["momentum_buffer"].any()


def test_shares_add_up():
    one, other = make_stepper()[0], make_stepper()[0]
    weights = [stepper.gradients.trained[0] for stepper in (one, other)]
    one.begin()
    for gradient, share in (([4.0, 0.0], 0.25), ([0.0, 8.0], torch.tensor(0.75))):
        backward(one, weights[0], gradient, share)
    norm = one.step(make_window()).norm
    assert take(other, weights[1], [1.0, 6.0]).norm == norm
    assert torch.equal(*weights)


def test_batches_without_valid_pixels_are_left_out_and_alone_do_nothing():
    stepper, weight = make_stepper()
    stepper.begin()
    stepper.unscale()
    step = stepper.step(make_window(0.0, 0.0))
    assert step == Step([]) and step.logs == {} and step.stepped is False
    backward(stepper, weight, [1.0, 0.0])
    window = make_window(0.0, 2.0, torch.tensor(0.0))
    step = stepper.step(window)
    assert step.used == window[1:] and step.logs == {"grad_norm": step.norm}


def test_a_loss_and_an_optimizer_without_gradient_are_refused():
    stepper, _ = make_stepper()
    with pytest.raises(ValueError, match="does not depend on the model's parameters"):
        stepper.backward(torch.tensor(1.0), 1.0)
    with pytest.raises(ValueError, match="does not depend on the model's parameters"):
        check_gradient(torch.tensor(1.0))
    other = nn.Parameter(torch.zeros(2))
    backward(stepper, other, [1.0, 1.0])
    with pytest.raises(ValueError, match="None of the optimizer's parameters got a gradient"):
        stepper.step(make_window())


def test_gradients_of_parameters_without_an_optimizer_are_cleared():
    model = small_net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    gradients = Gradients(model, optimizer)
    model(torch.rand(2, 4, 8, 8)).mean().backward()
    assert len(gradients.found()) == 2
    optimizer.add_param_group({"params": model[3].parameters()})
    assert len(gradients.found()) == 2
    gradients.refresh()
    assert len(gradients.found()) == 4
    gradients.clear()
    assert all(p.grad is None for p in model.parameters())


def test_parameters_of_a_new_group_are_guarded():
    model = small_net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    stepper = Stepper(model, optimizer, Precision(CPU, None), None)
    optimizer.add_param_group({"params": model[3].parameters()})
    stepper.begin()
    model[3].weight.register_hook(lambda gradient: gradient * math.nan)
    stepper.backward(model(torch.rand(2, 4, 8, 8)).mean(), 1.0)
    assert stepper.step(make_window()).stepped is False


# Loss scaling.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["SGD", "fused momentum"])
def test_tiny_gradients_are_unscaled_before_they_are_clipped(name, device):
    stepper, weight = make_stepper(name, torch.float16, clip=1.0, device=device)
    step = take(stepper, weight, [1e-3, 0.0])
    assert step.norm.item() == pytest.approx(1e-3)
    assert weight.tolist() == pytest.approx([-1e-4, 0.0])


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("name", ["SGD", "fused AdamW"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_unscaling_early_or_often_changes_nothing(calls, name, dtype):
    (one, first), (other, second) = (make_stepper(name, dtype, clip=1.0) for _ in range(2))
    for gradient in ([3.0, 4.0], [math.inf, 1.0], [-1.0, 2.0]):
        expected = take(one, first, gradient)
        other.begin()
        backward(other, second, gradient)
        for _ in range(calls):
            other.unscale()
        if calls:
            assert second.grad.tolist() == gradient
        step = other.step(make_window())
        assert step.norm == expected.norm and step.stepped == expected.stepped
    assert torch.equal(first, second)
    assert one.precision.scaler.state_dict() == other.precision.scaler.state_dict()


@pytest.mark.parametrize("name", ["SGD", "fused momentum"])
def test_a_gradient_changed_after_unscaling_is_what_is_measured_and_used(name):
    stepper, weight = make_stepper(name, torch.float16)
    stepper.begin()
    backward(stepper, weight, [30.0, 40.0])
    stepper.unscale()
    weight.grad = weight.grad / 10
    assert stepper.step(make_window()).norm == 5.0
    assert weight.tolist() == pytest.approx([-0.3, -0.4])


def test_a_backward_pass_after_unscaling_is_refused():
    stepper, weight = make_stepper(dtype=torch.float16)
    stepper.begin()
    backward(stepper, weight, [1.0, 1.0])
    stepper.unscale()
    with pytest.raises(RuntimeError, match="after the last backward pass of a window"):
        backward(stepper, weight, [1.0, 1.0])


@pytest.mark.parametrize("drop", ["abandon", "clear"])
def test_a_window_dropped_after_unscaling_is_taken_again(drop):
    stepper, weight = make_stepper(dtype=torch.float16)
    take(stepper, weight, [math.inf, 1.0])  # the scale is no longer the first one
    for _ in range(3):
        stepper.begin()
        backward(stepper, weight, [1.0, 2.0])
        stepper.unscale()
        getattr(stepper, drop)()
        assert weight.grad is None
    assert take(stepper, weight, [1.0, 2.0]).stepped is True
    assert weight.tolist() == pytest.approx([-0.1, -0.2])
    assert stepper.precision.scaler.get_scale() == 2.0**15


def test_a_step_that_raises_is_taken_again_after_it_was_abandoned():
    stepper, weight = make_stepper(dtype=torch.float16)

    def fail(optimizer, args, kwargs):
        raise RuntimeError("boom")

    handle = stepper.guarded.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        take(stepper, weight, [1.0, 2.0])
    stepper.abandon()
    handle.remove()
    assert take(stepper, weight, [1.0, 2.0]).stepped is True


def test_a_window_unscaled_with_the_scaler_itself_can_be_abandoned():
    stepper, weight = make_stepper(dtype=torch.float16)
    stepper.begin()
    backward(stepper, weight, [1.0, 2.0])
    stepper.precision.scaler.unscale_(stepper.guarded.optimizer)
    stepper.abandon()
    assert take(stepper, weight, [1.0, 2.0]).stepped is True


def test_abandoning_restores_the_buffers():
    model = small_net()
    stepper = Stepper(model, torch.optim.SGD(model.parameters(), lr=0.1), Precision(CPU, None), 1.0)
    stepper.begin()
    model(torch.rand(2, 4, 8, 8)).mean().backward()
    stepper.abandon()
    assert not model[1].running_mean.any()
    assert all(p.grad is None for p in model.parameters())


def test_an_ordinary_step_keeps_the_scaler_and_an_overflow_halves_it_once():
    stepper, weight = make_stepper(dtype=torch.float16)
    scaler = stepper.precision.scaler
    for gradient, scale in (([1.0, 1.0], 2.0**16), ([math.inf, 1.0], 2.0**15)):
        take(stepper, weight, gradient)
        assert stepper.precision.scaler is scaler and scaler.get_scale() == scale


# The host waits for the device once per step, or never.


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize(("name", "expected"), [("SGD", 1), ("momentum", 1), ("fused momentum", 0)])
@pytest.mark.parametrize("batches", [1, 4])
def test_reads_per_step(name, expected, batches, dtype):
    stepper, weight = make_stepper(name, dtype, clip=1.0)
    with HostReads() as reads:
        for _ in range(10):
            stepper.begin()
            for _ in range(batches):
                backward(stepper, weight, [1.0, 2.0], torch.tensor(1 / batches))
            stepper.unscale()
            stepper.step(make_window())
    assert reads.count == 10 * expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
@pytest.mark.parametrize("name", ["fused momentum", "fused AdamW"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_cuda_itself_sees_no_synchronisation(name, dtype):
    model, target = small_net().cuda(), torch.zeros(2, 3, 8, 8, device="cuda")
    optimizer = OPTIMIZERS[name](model.parameters())
    stepper = Stepper(model, optimizer, Precision(torch.device("cuda"), dtype), 1.0)
    images = [torch.rand(2, 4, 8, 8, device="cuda") for _ in range(6)]
    images[3][0, 0, 0, 0] = math.nan

    def step(image):
        stepper.begin()
        with stepper.precision.autocast():
            loss = (model(image).float() - target).square().mean()
        stepper.backward(loss, 1.0)
        return stepper.step(make_window()).stepped

    stepped = [step(images[0])]  # sets everything up
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepped += [step(image) for image in images[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [bool(x) for x in stepped] == [True, True, True, False, True, True]
    assert all(x.isfinite().all() for x in model.state_dict().values())
