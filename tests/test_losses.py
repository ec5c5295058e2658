"""`MaskedLoss` on its own, and class weights from counts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset

from ununennium import MaskedLoss, class_weights, count_classes


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss, nn.MSELoss, nn.SmoothL1Loss])
@pytest.mark.parametrize("ignore", [255, -1, None])
def test_masked_loss_is_the_loss_of_the_valid_elements(loss, ignore):
    """Value and gradient alike; nodata gets no gradient at all."""
    output = torch.randn(4, 1, 8, 8, requires_grad=True)
    target = (torch.rand(output.shape) > 0.5).float()
    valid = torch.rand(output.shape) > 0.4
    target[~valid] = float("nan") if ignore is None else float(ignore)
    expected = loss()(output[valid], target[valid])
    masked = MaskedLoss(loss(reduction="none"), ignore)
    got = masked(output, target if ignore is None else target.to(torch.int16))
    assert torch.allclose(got, expected)
    (expected_gradient,) = torch.autograd.grad(expected, output)
    (gradient,) = torch.autograd.grad(got, output)
    assert torch.allclose(gradient, expected_gradient) and not gradient[~valid].any()
    assert masked.batch_weight(target) == valid.sum()


def test_masked_loss_of_no_valid_element_is_zero_and_so_is_its_gradient():
    output = torch.randn(2, 4, requires_grad=True)
    loss = MaskedLoss(nn.MSELoss(reduction="none"))(output, torch.full((2, 4), float("inf")))
    loss.backward()
    assert loss == 0 and not output.grad.any()


def test_masked_loss_wants_the_loss_of_each_element():
    for reduction in ("mean", "sum"):
        with pytest.raises(ValueError, match=f"MSELoss has reduction='{reduction}'. Pass"):
            MaskedLoss(nn.MSELoss(reduction=reduction))
    with pytest.raises(ValueError, match=r"Pass nn\.NLLLoss\(ignore_index=7\)"):
        MaskedLoss(nn.NLLLoss(reduction="none"), 7)
    own = MaskedLoss(lambda output, target: (output - target).abs())
    assert own(torch.tensor([1.0, 2.0]), torch.tensor([2.0, float("nan")])) == 1


def test_counting_takes_batches_and_samples_of_every_kind():
    mask = torch.tensor([[0, 1, 1], [255, 2, 2]], dtype=torch.uint8)
    kinds = [(None, mask), [None, mask.numpy()], {"image": None, "mask": mask}]
    for batch in kinds:
        assert count_classes([batch], 4, ignore_index=255).tolist() == [1, 2, 2, 0]
    assert count_classes(kinds, 4, ignore_index=255).tolist() == [3, 6, 6, 0]
    assert count_classes([{"label": 2}, {"label": 0}], 3).tolist() == [1, 0, 1]
    assert count_classes([], 2).tolist() == [0, 0]


@pytest.mark.parametrize("label", [-1, 3, 255])
def test_counting_refuses_labels_that_belong_to_no_class(label):
    with pytest.raises(ValueError, match=rf"Labels run from .*{label}.* there are 3 classes"):
        count_classes([(None, torch.tensor([0, 2, label]))], 3)


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 10**12), min_size=1, max_size=8).filter(any),
    scheme=st.sampled_from(["inverse", "inverse_sqrt"]),
)
def test_weights_fall_with_the_count_and_have_mean_one(counts, scheme):
    counts = torch.tensor(counts)
    weights, present = class_weights(counts, scheme), counts > 0
    assert weights.dtype == torch.float32 and not weights[~present].any()
    assert weights[present].mean().item() == pytest.approx(1, rel=1e-5)
    power = 1 if scheme == "inverse" else 0.5
    balanced = weights.double() * counts.double() ** power
    assert torch.allclose(balanced[present], balanced[present][0], rtol=1e-5)


def test_weights_say_what_they_cannot_do():
    with pytest.raises(ValueError, match="scheme='median' is unknown. Pass one of .*inverse_sqrt"):
        class_weights(torch.tensor([1, 2]), "median")
    with pytest.raises(ValueError, match="All class counts are zero"):
        class_weights(torch.zeros(3))


class Endless(Dataset):
    """A data set as most are: it has a length, and no `IndexError`."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.zeros(3), torch.tensor(index % 5 % 2)


def test_classes_of_a_data_set_are_counted_once():
    assert count_classes(Endless(), 2).tolist() == [3, 2]
