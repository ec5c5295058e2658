"""The small U-Net: shapes, skip connections, and wrong input."""

import pytest
import torch

from ununennium.models import UNet


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_scores_have_the_size_of_the_image(depth):
    unet = UNet(6, 5, width=4, depth=depth)
    for size in ((2 ** (depth - 1), 8), (17, 30), (32, 9)):
        assert unet(torch.zeros(2, 6, *size)).shape == (2, 5, *size)
    assert UNet(6, 1, width=4, depth=depth)(torch.zeros(2, 6, 8, 8)).shape == (2, 1, 8, 8)


def test_every_parameter_has_a_part_in_the_scores():
    unet = UNet(4, 3, width=4)
    unet(torch.randn(2, 4, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in unet.parameters())


def test_skip_connections_carry_the_image_past_the_levels_below():
    unet = UNet(1, 1, width=4, depth=2).eval()
    with torch.no_grad():
        for parameter in unet.encoder[1].parameters():
            parameter.zero_()
    first, second = unet(torch.rand(2, 1, 8, 8))
    assert (first != second).any()


@pytest.mark.parametrize("name", ["in_channels", "num_classes", "width", "depth"])
def test_sizes_below_one_are_refused(name):
    sizes = {"in_channels": 4, "num_classes": 3, "width": 4, "depth": 2} | {name: 0}
    with pytest.raises(ValueError, match=rf"{name}=0.* below 1. Pass at least 1"):
        UNet(**sizes)
