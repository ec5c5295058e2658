"""1 · One weight drives everything: gradients and losses, however the samples are split."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from small import make_batches, make_trainer, small_net, vector
from ununennium import MaskedLoss, Trainer

CLASS_WEIGHT = torch.tensor([0.2, 1.0, 5.0])


LOSSES = {
    "plain": nn.CrossEntropyLoss(ignore_index=255),
    "weighted": nn.CrossEntropyLoss(CLASS_WEIGHT, ignore_index=255),
    "smoothed": nn.CrossEntropyLoss(CLASS_WEIGHT, ignore_index=255, label_smoothing=0.1),
    "partial": functools.partial(F.cross_entropy, weight=CLASS_WEIGHT, ignore_index=255),
}


SIDE = 16


def tiles(valid, seed=0, classes=3):
    """Images and masks, one of each for each number of valid pixels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(valid), 4, SIDE, SIDE, generator=generator)
    masks = torch.randint(classes, (len(valid), SIDE, SIDE), generator=generator)
    for mask, count in zip(masks, valid, strict=True):
        mask.view(-1)[count:] = 255
    return images, masks


def gradient_of_one_batch(images, masks, loss):
    model = small_net(norm=False, classes=1 if masks.is_floating_point() else 3)
    value = loss(model(images), masks)
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), value.item()


def gradient_of_trainer(images, masks, sizes, loss, norm=False):
    """The change of the parameters by one plain step of rate 1 over the given split."""
    model = small_net(norm=norm, classes=1 if masks.is_floating_point() else 3)
    before = vector(model)
    batches = list(zip(images.split(sizes), masks.split(sizes), strict=True))
    trainer = make_trainer(
        batches,
        model=model,
        loss=loss,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        accumulation_steps=len(sizes),
        gradient_clip=None,
    )
    trainer.fit(1)
    return before - vector(model), trainer


def close(one, other):
    return (one - other).norm() <= 1e-5 * other.norm() + 1e-7


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [[4], [2, 2], [1, 3], [1, 1, 1, 1]])
def test_accumulation_is_exact_from_0_to_98_percent_nodata(name, sizes):
    images, masks = tiles([256, 256, 128, 5])
    expected, value = gradient_of_one_batch(images, masks, LOSSES[name])
    found, trainer = gradient_of_trainer(images, masks, sizes, LOSSES[name])
    assert close(found, expected)
    assert trainer.history["train_loss"][0] == pytest.approx(value, rel=1e-6)


def test_the_mean_of_means_would_be_far_off():
    """What the trainer does not do: it shows that the test above can fail."""
    images, masks = tiles([256, 256, 128, 5])
    for loss in (LOSSES["plain"], LOSSES["weighted"]):
        expected, _ = gradient_of_one_batch(images, masks, loss)
        pairs = zip(images.split(1), masks.split(1), strict=True)
        naive = sum(gradient_of_one_batch(*pair, loss)[0] for pair in pairs) / 4
        assert (naive - expected).norm() > 0.1 * expected.norm()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_split_gives_the_same_gradient(data):
    valid = data.draw(st.lists(st.integers(0, SIDE * SIDE), min_size=1, max_size=7), label="valid")
    name = data.draw(st.sampled_from(sorted(LOSSES)), label="loss")
    images, masks = tiles(valid, seed=data.draw(st.integers(0, 1000), label="seed"))
    sizes, left = [], len(valid)
    while left:
        sizes.append(data.draw(st.integers(1, left), label="size"))
        left -= sizes[-1]
    found, trainer = gradient_of_trainer(images, masks, sizes, LOSSES[name])
    if not sum(valid):
        assert trainer.global_step == 0 and not found.any()
        return
    expected, value = gradient_of_one_batch(images, masks, LOSSES[name])
    assert close(found, expected)
    assert trainer.history["train_loss"][0] == pytest.approx(value, rel=1e-5)


def test_masked_loss_is_exact_too():
    images, masks = tiles([256, 200, 128, 5], classes=2)
    masks = masks[:, None].float()
    loss = MaskedLoss(nn.BCEWithLogitsLoss(reduction="none"), ignore_index=255)
    expected, value = gradient_of_one_batch(images, masks, loss)
    found, trainer = gradient_of_trainer(images, masks, [1, 2, 1], loss)
    assert close(found, expected)
    assert trainer.history["train_loss"][0] == pytest.approx(value, rel=1e-6)


def test_short_last_window_is_stepped_and_divided_by_what_it_holds():
    batches = make_batches(5)
    trainer = make_trainer(
        batches, model=small_net(norm=False), accumulation_steps=2, gradient_clip=None,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    trainer.fit(1)
    assert trainer.global_step == 3
    model, loss = small_net(norm=False), nn.CrossEntropyLoss(ignore_index=255)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for part in (batches[:2], batches[2:4], batches[4:]):
        optimizer.zero_grad()
        loss(model(torch.cat([b[0] for b in part])), torch.cat([b[1] for b in part])).backward()
        optimizer.step()
    assert torch.allclose(vector(model), vector(trainer.model), rtol=1e-5, atol=1e-6)


def test_no_gradient_leaks_into_or_out_of_a_fit():
    clean, dirty = make_trainer(), make_trainer()
    for parameter in dirty.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    clean.fit(1)
    dirty.fit(1)
    assert torch.equal(vector(clean.model), vector(dirty.model))
    assert all(parameter.grad is None for parameter in dirty.model.parameters())


@pytest.mark.parametrize("position", [0, 3, 6])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_without_valid_pixels_adds_nothing_and_is_counted(position, accumulation):
    batches = make_batches(6)
    empty = (torch.full_like(batches[0][0], 1e4), torch.full_like(batches[0][1], 255))
    with_empty = [*batches[:position], empty, *batches[position:]]
    plain = make_trainer(batches, accumulation_steps=1).fit(2)
    trainer = make_trainer(with_empty, batches, accumulation_steps=accumulation)
    history = trainer.fit(2)
    assert history["train_empty_batches"] == [1.0, 1.0]
    assert all(math.isfinite(value) for value in history["train_loss"] + history["val_loss"])
    if accumulation == 1:
        assert history["train_loss"] == plain["train_loss"]


def test_val_loss_is_a_mean_over_pixels():
    images, masks = tiles([256, 40, 3, 0])
    batches = list(zip(images.split(1), masks.split(1), strict=True))
    for loss in LOSSES.values():
        trainer = make_trainer(batches, loss=loss, model=small_net(norm=False))
        with torch.no_grad():
            expected = loss(trainer.model(images), masks).item()
        assert trainer.validate(batches)["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_own_weight_of_a_loss_and_of_a_trainer():
    class Strange(nn.Module):
        def batch_weight(self, target):
            return float(target.sum())

        def forward(self, output, target):
            return (output.mean((1, 2, 3)) * target).sum() / target.sum()

    batches = [(torch.randn(2, 4, 8, 8), torch.tensor(t)) for t in ([1.0, 2.0], [30.0, 4.0])]
    trainer = make_trainer(batches, loss=Strange(), model=small_net(norm=False))
    whole = [tuple(torch.cat(part) for part in zip(*batches, strict=True))]
    assert trainer.validate(batches)["val_loss"] == pytest.approx(
        trainer.validate(whole)["val_loss"], rel=1e-5
    )


def test_targets_in_containers_weigh_by_samples():
    def run(size, accumulation):
        (image, mask), = make_batches(1, size=10, nodata=0.0)  # fmt: skip
        parts = zip(image.split(size), mask.split(size), strict=True)
        batches = [(x, {"mask": y, "area": y.float()}) for x, y in parts]
        loss = lambda output, target: nn.functional.cross_entropy(output, target["mask"])
        trainer = make_trainer(
            batches, loss=loss, model=small_net(norm=False), accumulation_steps=accumulation,
            metrics={}, optimizer=lambda p: torch.optim.SGD(p, lr=1.0), gradient_clip=None,
        )  # fmt: skip
        trainer.fit(1)
        return vector(trainer.model)

    assert torch.allclose(run(10, 1), run(4, 3), atol=1e-6)


def test_a_weight_of_your_own_may_be_a_tensor_of_zero():
    class Own(Trainer):
        def batch_weight(self, target):
            return (target != 255).sum()

    base = make_trainer([(image, torch.full_like(mask, 255)) for image, mask in make_batches(3)])
    trainer = Own(base.model, base.optimizer, base.loss_fn, base.train_loader, config=base.config)
    before = vector(trainer.model)
    assert trainer.fit(1)["train_empty_batches"] == [3.0]
    assert torch.equal(vector(trainer.model), before) and trainer.global_step == 0


def test_data_without_any_valid_pixel_is_reported():
    nothing = [(image, torch.full_like(mask, 255)) for image, mask in make_batches(2)]
    with pytest.warns(UserWarning, match="No batch of train_loader has a valid pixel in epoch 1"):
        make_trainer(nothing).fit(1)
    with pytest.warns(
        UserWarning, match="No batch of the validation loader .* ignore_index is 255"
    ):
        make_trainer().validate(nothing)
