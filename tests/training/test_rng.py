"""Random generators are found wherever they are held, read, and put back."""

import contextlib
import functools
import random

import numpy as np
import pytest
import torch

from ununennium.training.checkpoint import load_file, save_file
from ununennium.training.rng import (
    generators_in,
    parts_of,
    random_state,
    random_state_kept,
    seed_all,
    set_random_state,
)

GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(2),
    "numpy, old": lambda: np.random.RandomState(3),
    "python": lambda: random.Random(4),
}


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.rand(3, generator=generator).tolist()
    return [generator.random() for _ in range(3)]


def draw_globally():
    return torch.rand(1).item(), np.random.rand(), random.random()


class Slots:
    __slots__ = ("generator",)

    def __init__(self, generator):
        self.generator = generator

    def sample(self):
        return draw(self.generator)


HOLDERS = {
    "itself": lambda g: g,
    "list": lambda g: [0, [g]],
    "dictionary": lambda g: {"a": {"b": g}},
    "partial": lambda g: functools.partial(print, g),
    "slots": Slots,
    "method": lambda g: Slots(g).sample,
    "attribute": lambda g: type("Owner", (), {"__init__": lambda s: setattr(s, "g", g)})(),
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_generators_are_found_in_whatever_holds_them(kind, holder):
    generator = GENERATORS[kind]()
    assert generators_in(HOLDERS[holder](generator)) == [generator]


def test_each_generator_is_found_once_and_in_order():
    one, two = random.Random(1), np.random.default_rng(2)
    cycle = {"two": two, "one": one}
    cycle["itself"] = cycle
    assert generators_in([one, two, one], cycle) == [one, two]
    assert generators_in("text", 5, None, torch.rand(3), random) == []
    assert generators_in(list(range(5000)), one) == [one]  # long lists hold data, not generators
    assert generators_in([[[[one]]]], most=2) == []


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_generator_repeats_what_it_drew(tmp_path, kind, through_a_file):
    generator = GENERATORS[kind]()
    draw(generator)
    state = random_state([generator])
    expected = draw(generator), draw_globally()
    if through_a_file:
        state = load_file(save_file({"model": {}, "random": state}, tmp_path / "a.pt"))["random"]
    set_random_state(state, [generator])
    assert (draw(generator), draw_globally()) == expected


def test_a_generator_of_another_kind_is_left_alone():
    numpy, python = np.random.default_rng(1), random.Random(1)
    state = random_state(numpy)
    before = python.getstate()
    set_random_state(state, python)
    assert python.getstate() == before


def test_a_seed_sets_every_global_generator():
    seed_all(3)
    expected = draw_globally()
    draw_globally()
    seed_all(3)
    assert draw_globally() == expected


def test_random_states_are_kept_even_if_the_block_fails():
    own = random.Random(5)
    state = own.getstate()
    seed_all(1)
    expected = draw_globally()
    seed_all(1)
    with contextlib.suppress(ZeroDivisionError), random_state_kept(own):
        draw_globally()
        own.random()
        raise ZeroDivisionError
    assert draw_globally() == expected and own.getstate() == state


def test_a_subclass_of_list_is_not_iterated():
    class Strange(list):
        def __iter__(self):
            raise AssertionError("this may read a whole data set")

    own = random.Random(0)
    assert parts_of(Strange([own])) == [own]
