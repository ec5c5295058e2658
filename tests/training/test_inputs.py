"""What does not fit into the model is explained in terms of the image."""

import pytest
import torch
from torch import nn

from small import make_batches, make_trainer
from ununennium.training.inputs import explain_input


class OfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 3, 1)

    def forward(self, optical, radar):
        return self.layer(optical + radar)


def test_a_model_of_two_arguments_is_told_where_to_unpack_them():
    """It was `forward() missing 1 required positional argument: 'radar'`, and no more."""
    batches = [((image, image), mask) for image, mask in make_batches(2)]
    with pytest.raises(TypeError, match="Override Trainer.run_model") as told:
        make_trainer(batches, model=OfTwo()).fit(1)
    assert "the batch's input is one tuple" in str(told.value) and "radar" in str(told.value)


def test_other_errors_of_the_model_are_left_alone():
    assert explain_input(TypeError("no such thing"), torch.zeros(1, 4, 2, 2), OfTwo()) is None


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (torch.zeros(1, 3, 8, 8), "has 3 channels and the model takes 4"),
        (torch.zeros(1, 8, 8, 4), "channels last"),
        (torch.zeros(1, 4, 8, 8).numpy(), "torch.from_numpy"),
        (torch.zeros(1, 4, 8, 8).to(torch.uint8), "image.float()"),
    ],
)
def test_images_that_do_not_fit(image, said):
    layer = nn.Conv2d(4, 3, 1)
    with pytest.raises((RuntimeError, TypeError)) as raised:
        layer(image)
    assert said in str(explain_input(raised.value, image, layer))
