"""Bad samples are found, taken out of a batch where it is known what belongs to them, and named."""

import math
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from small import make_batches, small_net
from ununennium import TrainerConfig
from ununennium.ranks import Ranks
from ununennium.training.dropping import (
    bad_samples,
    check_samples,
    close_dropped,
    emptied_batch,
    names_of,
    preparer,
    quote_pairs,
    samples_of,
)
from ununennium.training.loader import ResumableLoader
from ununennium.training.task import Task

Sensors = namedtuple("Sensors", "s1 s2")


# Found.


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sets(st.integers(0, 5)),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    kind=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    shape=st.sampled_from([(6,), (6, 3), (6, 2, 4, 4)]),
)
def test_bad_samples_are_those_with_a_number_that_is_not_finite(rows, value, kind, shape):
    images = torch.full(shape, 60_000.0).to(kind)  # whose sum overflows in float16
    for row in rows:
        images[(row, *(-1,) * (len(shape) - 1))] = value
    assert bad_samples(images) == sorted(rows)
    assert bad_samples({"a": torch.zeros(6, 2), "b": [images], "name": "x"}) == sorted(rows)


def test_both_infinities_in_one_sample_do_not_cancel_out():
    assert bad_samples(torch.tensor([[math.inf, -math.inf], [0.0, 0.0]])) == [0]


def test_large_numbers_and_integers_are_finite():
    assert bad_samples(torch.full((2, 9), 3e38)) == []
    assert bad_samples(torch.full((2, 9), 255, dtype=torch.uint8)) == []
    assert bad_samples(torch.zeros(0, 3)) == [] == bad_samples("no tensor")


def test_both_parts_of_a_complex_number_count():
    radar = torch.zeros(3, 2, 2, dtype=torch.complex64)
    radar[1, 0, 1] = complex(0.0, math.nan)
    radar[2, 1, 0] = complex(-math.inf, 0.0)
    assert bad_samples(radar) == [1, 2]


def test_a_number_for_the_whole_batch_belongs_to_no_sample():
    assert bad_samples({"image": torch.zeros(2, 3), "scale": torch.tensor(math.nan)}) == []
    assert not check_samples({"image": IMAGES, "scale": torch.tensor(2.0)}, torch.zeros(3))


# Taken out.


def test_samples_are_taken_out_at_any_depth():
    part = {
        "s": Sensors(torch.arange(4), (torch.arange(8).reshape(4, 2),)),
        "name": ["a", "b", "c", "d"], "crs": "EPSG:32633", "scale": torch.tensor(2.0),
        "bounds": ["w", "e"],
    }  # fmt: skip
    found = samples_of(part, [3, 1], 4)
    assert found["s"].s1.tolist() == [3, 1] and found["s"].s2[0].tolist() == [[6, 7], [2, 3]]
    assert found["name"] == ["d", "b"] and found["bounds"] == ["w", "e"]
    assert found["crs"] == "EPSG:32633" and found["scale"] == 2.0
    assert samples_of(part, None, 4)["s"].s1 is part["s"].s1


IMAGES = torch.zeros(3, 3, 8, 8)
BOXES = [{"boxes": torch.zeros(n, 4)} for n in (3, 3, 3)]


@pytest.mark.parametrize(
    ("inputs", "target", "is_listed"),
    [
        (IMAGES, torch.zeros(3, 8, 8), False),
        (IMAGES, BOXES, True),
        (IMAGES, tuple(BOXES), True),
        (IMAGES, {"mask": torch.zeros(3, 8), "area": torch.zeros(3)}, False),
        (IMAGES, [torch.zeros(3), torch.zeros(3)], False),
        (IMAGES, None, False),
        ([IMAGES, torch.zeros(3, 2), torch.zeros(3)], torch.zeros(3), False),
    ],
)
def test_what_belongs_to_a_sample_is_known(inputs, target, is_listed):
    assert check_samples(inputs, target) == is_listed


@pytest.mark.parametrize(
    ("inputs", "target", "message"),
    [
        ([torch.zeros(3, 8, 8)] * 3, BOXES, "cannot tell whether the input, a list of 3, is of 3"),
        ((IMAGES, IMAGES[:2]), None, r"one N in the model's input, and found \(3, 3, 8, 8\), \(2"),
        ("a.tif", None, "and found none"),
        (IMAGES, torch.zeros(192, 4), r"batch of 3 that has a tensor of shape \(192, 4\) in it"),
        (IMAGES, [*BOXES[:2], torch.zeros(4)], r"tensor of shape \(4,\) in it. Leave it off, or"),
    ],
)
def test_what_cannot_be_told_is_refused(inputs, target, message):
    with pytest.raises(ValueError, match=message):
        check_samples(inputs, target)


# Prepared.


def make(loss=None, model=None, locate=None, **config):
    config = TrainerConfig(device="cpu", drop_bad_samples=True, **config)
    task = Task(
        model or small_net(norm=False), loss or nn.CrossEntropyLoss(ignore_index=255), config
    )
    noted = {}
    return preparer(task, noted, locate), noted


def test_without_the_setting_nothing_is_looked_at():
    task = Task(small_net(), nn.CrossEntropyLoss(), TrainerConfig(device="cpu"))
    assert preparer(task, {}) == task.prepare


def test_a_batch_is_prepared_as_if_the_sample_had_never_been_in_it():
    prepare, noted = make()
    image, mask = make_batches(1, size=4)[0]
    image[2, 0, 0, 0] = math.nan
    batch = prepare((image, mask), 5)
    expected = prepare((image[[0, 1, 3]], mask[[0, 1, 3]]), 6)
    assert torch.equal(batch.inputs, expected.inputs) and torch.equal(batch.target, expected.target)
    assert batch.weight == expected.weight and batch.number == 5
    assert batch.raw[0] is image and noted == {5: [["batch index 5, sample", "2"]]}
    assert batch.labels.high == expected.labels.high


def test_boxes_of_a_bad_image_go_with_it():
    prepare, _ = make(loss=lambda output, boxes: output.mean())
    images = torch.zeros(4, 4, 8, 8)
    images[0, 0, 0, 0] = math.inf
    boxes = [{"boxes": torch.full((n, 4), float(n))} for n in range(4)]
    batch = prepare((images, boxes), 0)
    assert [len(each["boxes"]) for each in batch.target] == [1, 2, 3] and batch.weight == 3


def test_the_first_batch_decides_how_all_are_read():
    """Two dictionaries for two samples are parts of the target, as they were in the first batch."""
    prepare, _ = make(loss=lambda output, target: output.mean())
    for size in (3, 2):
        images = torch.zeros(size, 4, 8, 8)
        images[0, 0, 0, 0] = math.nan if size == 2 else 0.0
        target = [{"mask": torch.arange(size)}, {"area": torch.arange(size)}]
        batch = prepare((images, target), 0)
    assert [each.popitem()[1].tolist() for each in batch.target] == [[1], [1]]


def test_a_later_batch_of_another_length_is_not_read_as_a_list_of_samples():
    """The first batch has two dictionaries for two samples, the second one two for three."""
    prepare, _ = make(loss=lambda output, target: output.mean())
    for size in (2, 3):
        images = torch.zeros(size, 4, 8, 8)
        images[0, 0, 0, 0] = math.nan if size == 3 else 0.0
        target = [{"mask": torch.arange(size)}, {"area": torch.arange(size)}]
        batch = prepare((images, target), 0)
    assert [each.popitem()[1].tolist() for each in batch.target] == [[1, 2], [1, 2]]


@pytest.mark.parametrize(("norm", "is_empty"), [(True, True), (False, False)])
def test_one_sample_is_too_few_for_a_batch_norm(norm, is_empty):
    prepare, noted = make(model=small_net(norm=norm).train())
    image, mask = make_batches(1, size=2)[0]
    image[0, 0, 0, 0] = math.nan
    batch = prepare((image, mask), 0)
    assert batch.is_empty == is_empty and len(noted[0]) == 1 + is_empty
    place, left = noted[0][-1]
    assert place == "batch index 0, sample"
    assert left == ("1 (the only one left of its batch)" if is_empty else "0")
    alone = prepare((image[1:], mask[1:]), 1)  # as the loader gives it
    assert not alone.is_empty and 1 not in noted


def test_two_samples_are_enough_for_a_batch_norm():
    prepare, noted = make(model=small_net().train())
    image, mask = make_batches(1, size=3)[0]
    image[1, 0, 0, 0] = math.nan
    batch = prepare((image, mask), 0)
    assert torch.equal(batch.inputs, image[[0, 2]]) and len(noted[0]) == 1


def test_frozen_norms_need_no_company():
    model = small_net()
    model[1].eval()
    prepare, _ = make(model=model)
    image, mask = make_batches(1, size=2)[0]
    image[0, 0, 0, 0] = math.nan
    assert not prepare((image, mask), 0).is_empty


def test_a_batch_of_bad_samples_is_empty_and_can_be_computed():
    prepare, noted = make()
    image, mask = make_batches(1)[0]
    batch = prepare((image * math.nan, mask), 0)
    assert batch.is_empty and batch.weight == 0.0 and len(noted[0]) == 2
    assert torch.equal(batch.inputs, torch.zeros_like(image))
    assert emptied_batch(batch).target is mask


def test_a_batch_that_is_read_again_counts_once():
    prepare, noted = make()
    image, mask = make_batches(1)[0]
    for pixel in (math.nan, math.nan, 0.0):
        before = dict(noted)
        image[0, 0, 0, 0] = pixel
        prepare((image, mask), 0)
    assert len(before) == 1 and noted == {}  # a new augmentation may be fine


# Named.


def test_names_are_those_of_files_then_indices_then_places():
    files = {"filename": ["a.tif", "b.tif"]}
    assert names_of(files, 3, [1], [8, 9]) == [["filename", "b.tif"]]
    assert names_of(None, 3, [1], [8, 9]) == [["dataset index", "9"]]
    assert names_of({"id": torch.zeros(2, device="meta")}, 3, [1]) == [
        ["batch index 3, sample", "1"]
    ]
    unread = {"id": torch.zeros(2, device="meta")}
    assert names_of(unread, 3, [1], [8, 9]) == [["dataset index", "9"]]
    assert names_of({"filename": ["all.tif"]}, 3, [0, 1]) == [
        ["filename", "all.tif"], ["batch index 3, sample", "1"],
    ]  # fmt: skip


def test_a_sample_without_a_name_has_its_index_in_the_data_set():
    prepare, noted = make(locate=lambda number: [100 * number + row for row in (7, 8, 9)])
    image, mask = make_batches(1, size=3)[0]
    image[1, 0, 0, 0] = math.nan
    prepare((image, mask), 2)
    assert noted == {2: [["dataset index", "208"]]}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("max_ahead", [0, 2])
def test_a_resumable_loader_knows_the_indices_of_its_latest_batches(workers, max_ahead):
    data = TensorDataset(torch.arange(14))
    loader = ResumableLoader(DataLoader(data, 3, shuffle=True, num_workers=workers), max_ahead)
    last = None
    for number, (batch,) in enumerate(loader):
        assert loader.indices_of(number) == batch.tolist()
        if max_ahead and number:
            assert loader.indices_of(number - 1) == last
        last = batch.tolist()
    assert loader.indices_of(99) is None and loader.indices_of(-1) is None
    assert ResumableLoader([1]).indices_of(0) is None


def test_names_are_quoted_once_and_in_order():
    pairs = [["filename", "t10.tif"], ["filename", "t9.tif"], ["filename", "t9.tif"]]
    assert quote_pairs(pairs) == "filename t9.tif, t10.tif"
    assert quote_pairs([["a", str(n)] for n in range(23)]).endswith(", 19 and 3 more")
    assert quote_pairs([["a", str(n)] for n in range(20)]).endswith(", 18, 19")


def test_only_batches_that_were_used_are_told_of():
    noted = {n: [["filename", f"{n}.tif"]] for n in range(4)}
    with pytest.warns(UserWarning, match=r"^2 samples of train_loader were left out, because their "
                      r"input is not finite: filename 0.tif, 1.tif\.$"):  # fmt: skip
        assert close_dropped(Ranks(), noted, "train_loader", 2) == 2
    with pytest.warns(UserWarning, match="^1 sample of it was left out, because its input is not"):
        close_dropped(Ranks(), {0: noted[0]}, "it")
