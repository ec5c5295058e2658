"""Synthetic scenes: the properties that examples and other tests rely on."""

import functools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ununennium.data import CLOUD, SyntheticScenes, remap_labels, true_colour


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in ("image", "mask"))


def test_a_scene_depends_on_seed_and_index_alone():
    scenes = SyntheticScenes(5, size=24, seed=3)
    expected = [scenes[index] for index in range(5)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for index in (4, 0, 2):
        assert equal(SyntheticScenes(9, size=24, seed=3)[index], expected[index])
        assert equal(pickle.loads(pickle.dumps(scenes))[index], expected[index])
    assert torch.equal(torch.get_rng_state(), before)  # the user's random numbers are untouched
    assert not any(equal(expected[0], other) for other in expected[1:])
    assert not equal(SyntheticScenes(5, size=24, seed=4)[0], expected[0])
    assert expected[2]["name"] == "scene-3-0002"


def test_batches_have_the_keys_and_types_that_the_trainer_reads():
    batch = next(iter(DataLoader(SyntheticScenes(4, size=20), batch_size=4)))
    assert batch["image"].shape == (4, 6, 20, 20) and batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (4, 20, 20) and batch["mask"].dtype == torch.int64
    assert len(SyntheticScenes.band_names) == 6


def test_labels_cover_the_classes_and_the_last_is_rare():
    masks = torch.stack([scene["mask"] for scene in SyntheticScenes(30, size=48)])
    labels = masks[masks != SyntheticScenes.ignore_index]
    share = labels.bincount(minlength=5) / labels.numel()
    assert len(share) == len(SyntheticScenes.class_names) == 5
    assert (share[:4] > 0.05).all() and 0.005 < share[4] < 0.03


def test_zeros_beyond_the_swath_are_nodata_and_only_there():
    for scene in SyntheticScenes(6, size=32, nodata=1.0, cloud_cover=0.0):
        outside = (scene["image"] == 0).all(0)
        assert torch.equal(outside, scene["mask"] == 255)
        assert scene["image"].max() <= 1 and scene["image"].min() >= 0
    clear = [scene["mask"] for scene in SyntheticScenes(6, size=32, nodata=0.0, cloud_cover=0.0)]
    assert not (torch.stack(clear) == 255).any()


def test_clouds_are_bright_and_hide_labels():
    scenes = list(SyntheticScenes(20, size=32, nodata=0.0, cloud_cover=0.25))
    hidden = torch.stack([scene["mask"] == 255 for scene in scenes])
    assert 0.15 < hidden.float().mean() < 0.35  # 0.25 in the mean
    blue = torch.stack([scene["image"][0] for scene in scenes])
    assert blue[hidden].mean() > 0.7 * CLOUD[0] > 2 * blue[~hidden].mean()


def test_a_series_shows_one_landscape_and_is_nodata_only_where_always_hidden():
    settings = {"size": 32, "nodata": 0.0, "cloud_cover": 0.25}
    single = torch.stack([s["mask"] for s in SyntheticScenes(8, **settings)])
    samples = list(SyntheticScenes(8, time_steps=4, **settings))
    series = torch.stack([s["mask"] for s in samples])
    assert samples[0]["image"].shape == (4, 6, 32, 32)
    assert SyntheticScenes(1, time_steps=1)[0]["image"].shape == (1, 6, 64, 64)
    both = (single != 255) & (series != 255)
    assert torch.equal(single[both], series[both])
    assert (series == 255).sum() < (single == 255).sum() / 2


def test_bad_sizes_and_indices():
    for settings in ({"length": 0}, {"size": 15}):
        with pytest.raises(ValueError, match="too small. Pass a length of at least 1"):
            SyntheticScenes(**settings)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"no scene {index}: the data set has 3"):
            SyntheticScenes(3)[index]


@pytest.mark.parametrize("scale", [1.0, 10_000.0])
def test_true_colour_fits_every_scale_and_greys_nodata(scale):
    image = SyntheticScenes(1, size=32, nodata=1.0)[0]["image"]
    image[2, 0, 0] = float("nan")
    picture = true_colour(image * scale)
    nodata = (image == 0).all(0)
    nodata[0, 0] = True
    assert picture.shape == (32, 32, 3) and picture.min() == 0 and picture.max() == 1
    assert (picture[nodata] == 0.5).all()
    assert torch.allclose(picture, true_colour(image), atol=1e-3)


def test_true_colour_keeps_land_visible_beside_clouds():
    """One pixel in five is a cloud; without a limit the land would end up almost black."""
    image = torch.linspace(0.02, 0.1, 100).expand(3, 10, 100).clone()
    image[:, :2] = 0.65
    land = true_colour(image)[2:]
    assert land.max() > 0.4 and land.mean() > 0.2


def test_true_colour_takes_bands_by_number_or_grey():
    image = torch.rand(6, 8, 8)
    assert torch.equal(true_colour(image, (0, 1, 2)), true_colour(image).flip(-1))
    grey = true_colour(image[:2])
    assert torch.equal(grey[..., 0], grey[..., 1]) and torch.equal(grey[..., 0], grey[..., 2])


# Labels with gaps.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_ids_with_gaps_become_classes(dtype):
    ids = torch.tensor([0, 10, 20, 95, 255])
    labels = ids[torch.randint(5, (2, 8, 8))].to(dtype)
    new = remap_labels(labels, [95, 10, 20], nodata=[0])
    assert new.dtype == dtype and new.shape == labels.shape
    for label, number in {95: 0, 10: 1, 20: 2, 0: 255, 255: 255}.items():
        assert (new[labels == label] == number).all()
    assert labels.unique().tolist() == ids.tolist()  # as they were
    array = remap_labels(labels.numpy(), [95, 10, 20], nodata=[0])
    assert array.dtype == labels.numpy().dtype and np.array_equal(array, new.numpy())


def test_ids_are_merged_by_a_dictionary():
    labels = torch.tensor([11, 12, 21, -1])
    new = remap_labels(labels, {11: 0, 12: 0, 21: 1}, nodata=[-1], ignore_index=9)
    assert new.tolist() == [0, 0, 1, 9]


def test_a_type_that_is_too_small_is_widened():
    labels = torch.tensor([10, 20, 0], dtype=torch.int8)
    assert remap_labels(labels, [10, 20], nodata=[0]).tolist() == [0, 1, 255]


def test_samples_keep_what_is_no_label():
    image, labels = torch.zeros(4, 2, 2), torch.tensor([[10, 20], [20, 10]])
    transform = pickle.loads(pickle.dumps(functools.partial(remap_labels, ids=[20, 10])))
    pair, named = transform((image, labels)), transform({"image": image, "mask": labels})
    assert pair[0] is image and named["image"] is image
    assert pair[1].tolist() == named["mask"].tolist() == [[1, 0], [0, 1]]
    assert transform({"label": torch.tensor(10)})["label"].item() == 1
    with pytest.raises(ValueError, match=r"no 'mask' and no 'label', but \['image'\]"):
        transform({"image": image})


def test_a_label_that_was_forgotten_is_no_class():
    labels = torch.tensor([10, 30, 30, 40])
    with pytest.raises(ValueError, match=r"nor in nodata: 30 \(2 times\), 40 \(1 time\). Add"):
        remap_labels(labels, [10, 20])
    with pytest.raises(ValueError, match=r"ids=\[10, 10\] has an id twice"):
        remap_labels(labels, [10, 10])
    with pytest.raises(TypeError, match=r"labels are float32; .* mask.long\(\)"):
        remap_labels(labels.float(), [10])
