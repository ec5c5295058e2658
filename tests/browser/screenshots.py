"""Take pictures of the dashboard, to be looked at: `python -m pytest tests/browser/screenshots.py`.

They are written to `_screenshots`; the README's is `running.png`, copied to `nbs/dashboard.png`.
"""

import re
import time

from browser.test_dashboard import click, notebook, wait_state  # noqa: F401
from conftest import ROOT

FOLDER = ROOT / "_screenshots"
SETUP = """
import torch
from torch.utils.data import DataLoader
from ununennium import CheckpointCallback, Trainer, TrainerConfig, class_weights, count_classes
from ununennium.data import SyntheticScenes
from ununennium.models import UNet
torch.manual_seed(0)
train, val = SyntheticScenes(64, seed=1), SyntheticScenes(16, seed=2)
weights = class_weights(count_classes(train, num_classes=5, ignore_index=255))
model = UNet(in_channels=6, num_classes=5)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 8, 0.3)
trainer = Trainer(
    model, optimizer, torch.nn.CrossEntropyLoss(weights, ignore_index=255),
    DataLoader(train, batch_size=8, shuffle=True), DataLoader(val, batch_size=8), scheduler,
    callbacks=[CheckpointCallback("checkpoints", monitor="val_IoU", mode="max")],
    config=TrainerConfig(epochs=25, device="cpu", class_names=train.class_names, seed=0),
)
print("ready")
"""

BAD = """
from ununennium import Callback
class Bad(Callback):
    def on_epoch_end(self, trainer, epoch, logs):
        if epoch == 2:
            raise OSError("the disk is full")
trainer.callbacks.insert(0, Bad())
trainer.fit()
"""


def shoot(page, i, name):
    page.page.wait_for_timeout(800)
    page.cell(i).scroll_into_view_if_needed()
    page.cell(i).screenshot(path=FOLDER / f"{name}.png")


def reopen(page, text):
    """Open the saved notebook without a kernel, and wait until its first cell shows this text."""
    page.save()
    page.shutdown_kernel()
    page.open(kernel=False)
    page.wait_output(1, text)


def test_screenshots(notebook):  # noqa: F811
    FOLDER.mkdir(exist_ok=True)
    page = notebook("lab", "history = trainer.fit()", setup=SETUP, viewport=(1500, 1400))
    page.queue(1)
    wait_state(page, 1, "running")
    page.wait(
        lambda: re.search("epoch (1[5-9]|2.) of", page.output(1).inner_text()), "15 epochs", 120
    )
    shoot(page, 1, "running")
    click(page, 1, "Pause")
    wait_state(page, 1, "paused")
    click(page, 1, "Checkpoint")
    shoot(page, 1, "paused")
    click(page, 1, "Resume")
    time.sleep(0.5)
    click(page, 1, "Stop")
    wait_state(page, 1, "stopped")
    shoot(page, 1, "stopped")

    cells = ("history = trainer.fit(20)", "1 / 0")
    page = notebook("lab", *cells, setup=SETUP, viewport=(1000, 1400), theme="dark")
    page.queue(1)
    page.wait(lambda: "epoch 6 of" in page.output(1).inner_text(), "it is the 6th epoch", 120)
    shoot(page, 1, "dark-narrow-running")
    wait_state(page, 1, "done", timeout=180)
    shoot(page, 1, "dark-narrow-done")
    reopen(page, "History of 20 epochs")
    shoot(page, 1, "dark-without-kernel")

    page = notebook("notebook", BAD, setup=SETUP, viewport=(1300, 1400))
    page.queue(1)
    wait_state(page, 1, "failed", timeout=120)
    shoot(page, 1, "exception")
    reopen(page, "History of 3 epochs")
    shoot(page, 1, "exception-without-kernel")
