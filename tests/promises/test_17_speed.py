"""17 · Speed changes only the last digits.

Most tests let PyTorch trace the model and then run it as it is, which takes a tenth of a second.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from small import At, HostReads, make_batches, make_trainer, same_history, stop
from ununennium import Callback, CheckpointCallback, Trainer


def kernels(bands=4, seed=0):
    """A small model whose kernels have more than one pixel."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(bands, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1),
    )  # fmt: skip


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, fused=True)


def ragged(count=14):
    """A loader whose last batch is smaller."""
    return DataLoader([(x[0], y[0]) for x, y in make_batches(count, size=1)], batch_size=4)


def is_last(tensor):
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def assert_close(one, other):
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=1e-4)
    for name, values in one.history.items():
        assert values == pytest.approx(other.history[name], abs=1e-3, nan_ok=True), name


@pytest.fixture
def graphs(monkeypatch):
    """Count what PyTorch compiles; run it as it is."""
    found, original = [], torch.compile

    def backend(graph, inputs):
        found.append(inputs)
        return graph

    def compile(function, **options):
        return original(function, **options | {"backend": backend})

    monkeypatch.setattr(torch, "compile", compile)
    torch.compiler.reset()
    yield found
    torch.compiler.reset()


# Channels last.


@pytest.mark.parametrize("accumulation", [1, 2])
def test_channels_last_takes_the_same_steps(accumulation):
    settings = {"val": ragged(6), "optimizer": fused, "accumulation_steps": accumulation}
    plain, last = (
        make_trainer(ragged(), model=kernels(), channels_last=x, **settings) for x in (False, True)
    )
    kernel = last.model[0].weight
    plain.fit(3), last.fit(3)
    assert_close(plain, last)
    assert last.model[0].weight is kernel and is_last(kernel)
    assert all(is_last(last.optimizer.state[kernel][name]) for name in ("exp_avg", "exp_avg_sq"))
    assert not is_last(plain.model[0].weight)


class Seen(Callback):
    """Keeps the inputs that a model gets."""

    def __init__(self):
        self.inputs = []

    def on_train_start(self, trainer):
        trainer.model.register_forward_pre_hook(lambda model, args: self.inputs.extend(args))


class Raw(nn.Module):
    """A model that takes digital numbers of 13 bands, or sensors and a date."""

    def __init__(self):
        super().__init__()
        self.net = kernels(13)

    def forward(self, image, day=None):
        return self.net(image.float() / 255)


def test_uint8_images_of_13_bands():
    images = torch.randint(0, 256, (8, 13, 8, 8), dtype=torch.uint8)
    batches = [(x, (x[:, 0] > 99).to(torch.uint8)) for x in images.split(4)]
    plain, last = (
        make_trainer(batches, batches, model=Raw(), channels_last=x, callbacks=[Seen()])
        for x in (False, True)
    )
    plain.fit(2), last.fit(2)
    assert_close(plain, last)
    seen = last.callbacks[0].inputs
    assert len(seen) == 8 and all(x.dtype == torch.uint8 and is_last(x) for x in seen)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_inputs_beside_the_image_are_left_alone(kind):
    class Dated(Trainer):
        def unpack(self, batch):
            image, mask = batch
            day, series = torch.arange(len(image)), image[:, None]
            both = {"image": image, "day": day, "series": series}
            return (both if kind is dict else tuple(both.values())), mask

        def run_model(self, inputs):
            image, day, series = inputs.values() if kind is dict else inputs
            seen.append((is_last(image), day.dtype, series.is_contiguous()))
            return self.model(image)

    seen, like = [], make_trainer(model=kernels(), channels_last=True)
    parts = like.model, like.optimizer, like.loss_fn, like.train_loader, make_batches(2)
    Dated(*parts, config=like.config).fit(1)
    assert set(seen) == {(True, torch.int64, True)} and len(seen) == 8


def test_a_model_that_needs_the_usual_order_is_told_from_others():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 8, 3), nn.Linear(8 * 36, 3)

        def forward(self, image):
            features = self.first(image)
            return self.second(features.view(len(features), -1))

    batches = [(x, y[:, 0, 0] % 3) for x, y in make_batches(2)]
    make_trainer(batches, model=Flat()).fit(1)
    trainer = make_trainer(batches, model=Flat(), channels_last=True)
    with pytest.raises(RuntimeError, match="view size is not .*\nWith channels_last=True a model"):
        trainer.fit(1)


SETTINGS = {
    "plain": {},
    "last": {"channels_last": True},
    "compiled": {"compile": True},
    "both": {"channels_last": True, "compile": True},
}
PAIRS = [("plain", "last"), ("last", "plain"), ("compiled", "plain"), ("plain", "both"),
         ("both", "compiled")]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_run_is_resumed_with_other_settings(one, other, tmp_path, graphs):
    """With a fused optimizer, which reads parameter and momentum as they lie in memory."""
    make = lambda name, *callbacks, seed=0: make_trainer(
        ragged(), ragged(6), model=kernels(seed=seed), optimizer=fused, callbacks=callbacks,
        epochs=3, **SETTINGS[name],
    )  # fmt: skip
    straight, first = make("plain"), make(one, At("on_batch_end", 6, stop))
    straight.fit()
    first.fit()
    path = first.save_checkpoint(tmp_path / "a.pt")
    assert list(torch.load(path, weights_only=True)["model"]) == list(kernels().state_dict())
    again = make(other, seed=1)
    again.load_checkpoint(path)
    again.fit()
    assert again.global_step == straight.global_step
    assert_close(again, straight)


def test_an_optimizer_that_was_used_before_follows_the_format():
    straight = make_trainer(model=kernels(), optimizer=fused)
    straight.fit(2)
    first = make_trainer(model=kernels(), optimizer=fused)
    first.fit(1)
    rest = first.loss_fn, first.train_loader
    config = make_trainer(channels_last=True).config
    again = Trainer(first.model, first.optimizer, *rest, config=config)
    again.fit(1)
    torch.testing.assert_close(again.model.state_dict(), straight.model.state_dict())


# A compiled model.


def test_a_compiled_model_takes_the_same_steps_and_is_compiled_once(graphs):
    settings = {"val": ragged(6), "accumulation_steps": 2, "optimizer": fused}
    plain, trainer = (
        make_trainer(ragged(), model=kernels(), compile=x, **settings) for x in (False, True)
    )
    plain.fit(1), trainer.fit(1)
    count = len(graphs)
    assert 2 <= count <= 4  # training and validation, and a last batch of another size
    plain.fit(2), trainer.fit(2), trainer.validate()
    assert len(graphs) == count
    assert same_history(plain.history, trainer.history)
    assert trainer.check() == [] and len(graphs) == count


def test_the_model_stays_what_it_was(graphs, tmp_path):
    model, checks = kernels(), []

    class Watch(Callback):
        def on_batch_end(self, trainer, batch, logs):
            checks.append(trainer.model is model and "forward" not in vars(model))

    callbacks = [Watch(), CheckpointCallback(tmp_path, monitor="train_loss")]
    trainer = make_trainer(model=model, callbacks=callbacks, compile=True)
    trainer.fit(1)
    assert checks and all(checks) and "Sequential" in repr(trainer)
    names = list(kernels().state_dict())
    assert list(model.state_dict()) == names
    assert list(torch.load(tmp_path / "last.pt", weights_only=True)["model"]) == names
    count = len(graphs)
    for size in (5, 6, 7):
        model(torch.zeros(2, 4, size, size))  # a call of one's own
    assert len(graphs) == count
    copy.deepcopy(model).load_state_dict(model.state_dict())


def test_a_predict_of_ones_own_calls_the_compiled_model(graphs):
    calls = []

    class Own(Trainer):
        def run_model(self, inputs):
            calls.append(len(inputs))
            return self.model(inputs)

    like = make_trainer(model=kernels(), compile=True)
    rest = like.model, like.optimizer, like.loss_fn, like.train_loader, make_batches(2)
    Own(*rest, config=like.config).fit(2)
    assert len(calls) == 16 and 2 <= len(graphs) <= 3


def test_a_model_that_you_compiled_yourself_works_and_is_not_compiled_again(graphs):
    model = torch.compile(kernels())
    trainer = make_trainer(val=make_batches(2), model=model)
    plain = make_trainer(val=make_batches(2), model=kernels())
    trainer.fit(1), plain.fit(1)
    assert graphs and trainer.model is model and same_history(trainer.history, plain.history)
    with pytest.raises(ValueError, match="The model is compiled already. Leave compile=True out"):
        make_trainer(model=model, compile=True)


def test_a_model_that_cannot_be_compiled(monkeypatch):
    original = torch.compile

    def failing(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda f, backend: original(f, backend=failing))
    torch.compiler.reset()
    trainer = make_trainer(model=kernels(), compile=True)
    with pytest.raises(Exception, match=r"no compiler here\). It works as it is: pass compile=Fal"):
        trainer.fit(1)
    with pytest.raises(Exception, match="could not be compiled"):
        trainer.check()
    wide = [(torch.rand(2, 6, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long))]
    with pytest.raises(ValueError, match="The image has 6 channels and the model takes 4"):
        make_trainer(wide, model=trainer.model, compile=True).fit(1)
    plain = make_trainer(model=trainer.model)
    plain.fit(1)
    assert plain.global_step == 6
    torch.compiler.reset()


def test_neither_setting_costs_a_read_in_a_step(graphs):
    def reads(**settings):
        trainer = make_trainer(model=kernels(), optimizer=fused, **settings)
        trainer.fit(1)
        with HostReads() as found:
            trainer.fit(1)
        return found.count

    assert reads() == reads(channels_last=True) == reads(channels_last=True, compile=True)


@pytest.mark.slow
def test_compiled_for_this_machine(tmp_path):
    """With PyTorch's own compiler: both settings together, and resumed in the middle."""
    torch.compiler.reset()

    def make(callbacks=(), **settings):
        torch.manual_seed(0)
        return make_trainer(ragged(), ragged(6), model=kernels(), callbacks=callbacks, **settings)

    both = {"channels_last": True, "compile": True}
    plain, trainer, first = make(), make(**both), make([At("on_batch_end", 6, stop)], **both)
    plain.fit(3), trainer.fit(3)
    assert_close(plain, trainer)
    first.fit(3)
    again = make(**both)
    again.load_checkpoint(first.save_checkpoint(tmp_path / "a.pt"))
    again.fit(2)
    assert_close(again, trainer)  # not to the bit: other code may fit a batch too
