"""Channels last and compiled models, on several ranks: each gives the steps of one process."""

import functools

import pytest
import torch
import torch.distributed as dist

from processes import on_ranks
from ranks import test_sharded as fsdp
from ranks.test_ddp import (
    LOSS,
    NETS,
    TRAIN,
    VAL,
    VARIANTS,
    Net,
    Outer,
    by_hand,
    each,
    plain,
    sgd,
)  # fmt: skip
from ununennium import Trainer, TrainerConfig


def parts():
    """A model of which each layer is wrapped by itself."""
    net = Net()
    net.first, net.second, net.head = map(plain, (net.first, net.second, net.head))
    return net


WRAPPED = {
    **{name: VARIANTS[name] for name in ("plain", "static", "unused", "view")},
    "outer": lambda: Outer(plain(Net())),
    "parts": parts,
}


def make_trainer(model, callbacks=(), **settings):
    config = TrainerConfig(
        device="cpu", progress="none", accumulation_steps=2, gradient_clip=0, **settings
    )
    loaders = TRAIN[dist.get_rank()], VAL[dist.get_rank()]
    return Trainer(model, sgd(model), LOSS, *loaders, callbacks=callbacks, config=config)


class Compiler:
    """Lets PyTorch trace models and run them as they are, and counts how often."""

    def __init__(self):
        self.count, self.original = 0, torch.compile

    def backend(self, graph, inputs):
        self.count += 1
        return graph

    def __enter__(self):
        torch.compiler.reset()
        torch.compile = lambda forward, backend: self.original(forward, backend=self.backend)
        return self

    def __exit__(self, *error):
        torch.compile = self.original


def train_compiled(name):
    vectors = fsdp.Vectors()
    with Compiler() as compiler:
        if name == "sharded":
            trainer = fsdp.make_trainer(fsdp.shard(Net()), [vectors], compile=True)
        else:
            trainer = make_trainer(WRAPPED[name](), [vectors], compile=True)
        trainer.fit(1)
        count = compiler.count
        trainer.fit(1)
    return trainer.history, vectors.kept, count, compiler.count


@functools.cache
def all_compiled():
    return on_ranks(2, each, train_compiled, [*WRAPPED, "sharded"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRAPPED, "sharded"])
def test_compiled_ranks_take_the_steps_of_one_process(name):
    wanted = fsdp.train_by_hand(2)[1] if name == "sharded" else by_hand(NETS.get(name, Net))
    results = [result[name] for result in all_compiled()]
    for history, vectors, first, both in results:
        tolerance = 1e-6 if name == "sharded" else 1e-10
        for own, other in zip(vectors, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=tolerance)
        assert repr(history) == repr(results[0][0])
        assert first and (first == both or name == "unused")  # which takes another way each time


def train_last(name):
    options = {"gradient_as_bucket_view": True} if name == "view" else {}
    net = Net().to(memory_format=torch.channels_last)
    late = late_error(name)
    vectors, model = fsdp.Vectors(), plain(net, **options)
    trainer = make_trainer(model, [vectors], channels_last=True)
    trainer.fit(2)
    kernel = net.first.weight
    gradient_like = trainer.optimizer.state[kernel]["momentum_buffer"].stride()
    return vectors.kept, kernel.stride(), gradient_like, late


def late_error(name):
    """Return what is said of a model that was wrapped, or sharded, in the usual format."""
    model = fsdp.shard(Net()) if name == "sharded" else plain(Net())
    try:
        make_trainer(model, channels_last=True)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["plain", "view"])
def test_a_model_in_channels_last_takes_the_steps_of_one_process(name):
    for vectors, stride, state, late in on_ranks(2, train_last, name):
        assert stride == state == (36, 1, 12, 4)
        assert "Convert it before: model.to(memory_format=torch.channels_last)" in late
        for own, other in zip(vectors, by_hand(Net), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


def test_a_sharded_model_in_channels_last_is_refused():
    for message in on_ranks(2, late_error, "sharded"):
        assert message.startswith("channels_last=True does not work with fully_shard")
