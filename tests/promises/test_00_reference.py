"""0 · The reference: on real chips, the trainer repeats a plain PyTorch run."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from small import SHARED_DATA
from ununennium import Callback, Trainer, TrainerConfig, class_weights

FOLDER = SHARED_DATA / "csm5"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "train.npz").is_file(), reason=f"the imagery is not at {FOLDER}"
)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "weighted"])
def expected(request, tmp_path_factory):
    """What the reference's own script prints on this machine, and what it printed on its author's.

    The two differ: an AdamW step has the sign of a gradient where the gradient is near zero, so the
    last bit of a convolution, which depends on the processor, is visible after the first step.
    """
    folder = tmp_path_factory.mktemp("reference")
    for name in ("ref_train.py", "meta.json", "train.npz", "val.npz"):
        shutil.copy(FOLDER / name, folder)
    options = ["--weighted"] if request.param else []
    command = [sys.executable, str(folder / "ref_train.py"), "--epochs", "3", *options]
    subprocess.run(command, check=True, capture_output=True)
    name = f"ref_seed0{'_weighted' if request.param else ''}.json"
    return json.loads((folder / name).read_text()), json.loads((FOLDER / name).read_text())


class StepLosses(Callback):
    def __init__(self):
        self.losses = []

    def on_batch_end(self, trainer, batch, logs):
        if trainer.epoch == 0:
            self.losses.append(float(logs["train_loss"]))


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("ref_train", FOLDER / "ref_train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(reference, epochs, weights=None, loss_fn=None):
    """The reference's model, order and hyper-parameters, for seed 0, through the public API."""
    torch.manual_seed(0)
    classes = reference.META["classes"]
    model = reference.TinyUNet(6, len(classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    steps = StepLosses()
    trainer = Trainer(
        model,
        optimizer,
        loss_fn or nn.CrossEntropyLoss(weights),
        DataLoader(reference.load("train"), 4, shuffle=True, generator=generator, drop_last=True),
        DataLoader(reference.load("val"), 4),
        callbacks=[steps],
        config=TrainerConfig(
            device="cpu", gradient_clip=None, progress="none", class_names=classes
        ),
    )
    return trainer.fit(epochs), steps.losses


def test_repeats_the_reference_step_by_step(reference, expected):
    here, recorded = expected
    weights = None
    if here["weighted"]:  # the script's own arithmetic, to the last bit; ours agrees to rounding
        pixels = torch.tensor(reference.META["train_pixels"], dtype=torch.float32)
        inverse = (pixels.sum() / pixels.clamp(min=1)).sqrt()
        weights = torch.where(pixels > 0, inverse, torch.zeros(5))
        weights = weights / weights[pixels > 0].mean()
        assert torch.allclose(class_weights(pixels.long()), weights)
    history, losses = train(reference, 3, weights)
    assert len(losses) == 9
    assert losses == pytest.approx(here["first_epoch_step_loss"], abs=1e-6)
    assert losses[0] == pytest.approx(recorded["first_epoch_step_loss"][0], abs=1e-6)
    for epoch, scores in enumerate(here["history"]):
        assert history["val_IoU"][epoch] == pytest.approx(scores["miou"], abs=1e-5)
        assert history["val_accuracy"][epoch] == pytest.approx(scores["oa"], abs=1e-5)
        for name, value in zip(reference.META["classes"], scores["iou"], strict=True):
            found = history[f"val_IoU/{name}"][epoch]
            assert math.isnan(found) if value is None else found == pytest.approx(value, abs=1e-5)
        if weights is None:  # with weights, the script takes means of means
            assert history["train_loss"][epoch] == pytest.approx(scores["train_loss"], abs=1e-5)
            assert history["val_loss"][epoch] == pytest.approx(scores["val_loss"], abs=1e-5)


@pytest.mark.slow
def test_class_weights_bring_the_rare_class_back(reference):
    """The weighted reference: mean IoU 0.665 after 40 epochs, water 0.24 instead of 0."""
    weights = class_weights(torch.tensor(reference.META["train_pixels"]))
    history, _ = train(reference, 40, weights)
    print(f"mean IoU {history['val_IoU'][-1]:.4f}, water {history['val_IoU/water'][-1]:.4f}")
    assert history["val_IoU"][-1] == pytest.approx(0.665, abs=0.03)
    assert history["val_IoU/water"][-1] > 0.15


def test_a_time_series_with_cloudy_dates_and_gaps_in_the_labels():
    """68 dates of one scene, a mask in halves, label 0 without data, class numbers with gaps."""
    import numpy as np

    folder = SHARED_DATA / "eopatch68"
    if not folder.is_dir():
        pytest.skip(f"the series is not at {folder}")
    with np.load(folder / "series.npz") as file:
        ndvi = torch.from_numpy(file["ndvi"]).float().nan_to_num()
        cloud = torch.from_numpy(file["cloud"]).bool()
        mask = torch.from_numpy(file["lulc"])  # 0 means no data; 5 to 7 never occur
    series = ndvi.masked_fill(cloud, 0.0)[None, :, None]  # (N, T, C, H, W)
    halves = [(series[..., :50], mask[None, :, :50]), (series[..., 50:], mask[None, :, 50:])]

    class OverTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(68, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 9, 1)
            )

        def forward(self, x):
            return self.net(x[:, :, 0])

    torch.manual_seed(0)
    model = OverTime()
    trainer = Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        nn.CrossEntropyLoss(ignore_index=0),
        halves[:1],
        halves[1:],
        config=TrainerConfig(device="cpu", progress="none"),
    )
    history = trainer.fit(40)
    assert history["train_loss"][-1] < 0.6 * history["train_loss"][0]
    assert history["val_accuracy"][-1] > 0.7  # three quarters are forest
    assert math.isnan(history["val_IoU/6"][-1])
    valid = int((halves[1][1] != 0).sum())
    assert trainer.batch_weight(halves[1][1]) == valid
