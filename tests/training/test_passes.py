"""Memory formats and compiled models: what is converted, what is put back, what is refused."""

import copy
import types

import pytest
import torch
from torch import nn

from small import small_net
from ununennium import TrainerConfig
from ununennium.distributed import Exchange
from ununennium.training.passes import (
    CompilationFailed,
    CompiledForward,
    Passes,
    channels_last,
    compile_forward,
    forward_replaced,
    lay_out,
)


def make_passes(model, **settings):
    return Passes(model, Exchange(model), TrainerConfig(device="cpu", **settings))


class Volume(nn.Sequential):
    """Kernels of four and of five dimensions, and parameters of other kinds."""

    def __init__(self):
        super().__init__(
            nn.Conv3d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.Linear(4, 4)
        )


# Channels last.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize("bands", [1, 3, 13])
def test_an_image_keeps_its_values_and_type(dtype, bands):
    image = torch.randint(0, 99, (2, bands, 5, 7)).to(dtype)
    last = channels_last(image)
    assert torch.equal(last, image) and last.dtype == dtype
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert channels_last(last) is last


def test_parameters_stay_the_same_objects_and_only_kernels_are_converted():
    model = Volume()
    before, values = list(model.parameters()), copy.deepcopy(model.state_dict())
    lay_out(model, Exchange(model))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.is_contiguous() for p in model.parameters() if p.ndim < 4)


def test_a_model_that_is_wrapped_or_sharded_is_left_as_it_is():
    model = small_net()
    wide = nn.Sequential(nn.Conv2d(4, 8, 3))
    sharded = types.SimpleNamespace(is_sharded=True, is_shared=True)
    wrapped = types.SimpleNamespace(is_sharded=False, is_shared=True)
    with pytest.raises(ValueError, match="channels_last=True does not work with fully_shard"):
        lay_out(model, sharded)
    with pytest.raises(ValueError, match="too late .* before: model.to.memory_format="):
        lay_out(wide, wrapped)
    assert wide[0].weight.is_contiguous()
    lay_out(wide.to(memory_format=torch.channels_last), wrapped)  # converted in time


def test_only_inputs_with_the_dimensions_of_a_kernel_are_converted():
    image, series = torch.rand(2, 4, 8, 8), torch.rand(2, 6, 4, 8, 8)
    named = {"image": image, "more": (series, torch.arange(2), "EPSG:32633", None)}
    found = make_passes(small_net(), channels_last=True).arrange(named)
    assert found["image"].is_contiguous(memory_format=torch.channels_last)
    assert found["more"][0] is series and found["more"][1] is named["more"][1]
    assert found["more"][2:] == ("EPSG:32633", None)
    found = make_passes(nn.Conv3d(6, 2, 3), channels_last=True).arrange(named)
    assert found["image"] is image
    assert found["more"][0].is_contiguous(memory_format=torch.channels_last_3d)
    for passes in (make_passes(small_net()), make_passes(nn.Linear(2, 2), channels_last=True)):
        assert passes.arrange(named) is named


def test_only_errors_of_the_format_get_a_hint():
    view = RuntimeError("view size is not compatible with input tensor's size and stride")
    passes = make_passes(small_net(), channels_last=True)
    assert "reshape in place of view" in passes.hint_for(view)
    assert passes.hint_for(RuntimeError("other")) == make_passes(small_net()).hint_for(view) == ""


# Compiled models.


def test_the_forward_is_put_back_also_after_an_error_and_one_of_its_own():
    model, image = small_net(), torch.zeros(1, 4, 2, 2)

    def interrupted():
        with forward_replaced(model, lambda x: 1):
            with forward_replaced(model, lambda x: 2):
                assert model(image) == 2
            assert model(image) == 1
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert "forward" not in vars(model) and model(image).shape == (1, 3, 2, 2)
    model.forward = own = lambda x: "own"
    with forward_replaced(model, lambda x: 1):
        assert model(image) == 1
    assert model.forward is own


def test_hooks_run_and_the_names_stay():
    calls, model = [], small_net()
    names = list(model.state_dict())
    model.register_forward_hook(lambda *details: calls.append(1))
    forward = CompiledForward(model.forward, backend="eager")
    with forward_replaced(model, forward):
        model(torch.zeros(2, 4, 4, 4))
        assert list(model.state_dict()) == names
    assert calls == [1]


def failing(graph, inputs):
    raise RuntimeError("No working C++ compiler found.\n\nMore about it.")


def test_a_failed_compilation_is_told_from_an_input_that_does_not_fit():
    forward = CompiledForward(small_net().forward, backend=failing)
    message = (
        r"could not be compiled \(.*No working C\+\+ compiler found\). It works as it is: pass"
    )
    with pytest.raises(CompilationFailed, match=message) as caught:
        forward(torch.zeros(2, 4, 4, 4))
    assert "No working" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3") as caught:
        forward(torch.zeros(2, 3, 4, 4))
    assert "Dynamo" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("a"), torch.OutOfMemoryError("full")])
def test_errors_of_the_model_itself_pass(error):
    calls = []

    def forward(x):
        calls.append(x)
        raise error

    with pytest.raises(type(error)) as caught:
        CompiledForward(torch.compiler.disable(forward), backend="eager")(1)
    assert caught.value is error and calls == [1]


def test_a_model_that_is_compiled_already_is_refused():
    whole = torch.compile(small_net(), backend="eager")
    part = nn.Sequential(torch.compile(small_net(), backend="eager"))
    for model in (whole, part):
        with pytest.raises(ValueError, match="is compiled already. Leave compile=True out"):
            compile_forward(model)
    with pytest.raises(ValueError, match="does not work with DataParallel"):
        compile_forward(nn.Sequential(nn.DataParallel(small_net())))


def test_without_the_settings_nothing_is_done():
    model = small_net()
    passes = make_passes(model)
    with passes.compiled():
        assert "forward" not in vars(model)
    assert all(p.is_contiguous() for p in model.parameters())
