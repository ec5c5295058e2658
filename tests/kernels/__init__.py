"""Kernels of several ipykernel versions, all run by the interpreter that runs the tests."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("6.17.1", "6.31.0", "7.0.0", "7.3.0", "7.4.0")
FORGETFUL = ("7.0.0", "7.3.0")  # ipykernel issue 1554, see nbs/notebook/10_kernel.ipynb

# What these versions require and an environment with a newer ipykernel may lack.
EXTRA = ("nest-asyncio==1.6.0", "nest-asyncio2==1.7.4", "psutil==7.2.2")


def cache() -> Path:
    """Return the folder of the overlays: one per Python version, since psutil is compiled."""
    python = f"{sys.implementation.cache_tag}-{sys.platform}"
    return ROOT / ".pytest_cache" / "kernels" / python


def overlay(version: str) -> Path:
    """Return a folder that, put first on PYTHONPATH, makes this interpreter run that ipykernel."""
    folder = cache() / version
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed once complete, so that an interrupted run leaves nothing that looks finished.
    made = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=folder.parent))
    try:
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(made)]
        pip += ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
        done = subprocess.run(
            [*pip, f"ipykernel=={version}", *EXTRA],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"pip could not install ipykernel {version}:\n{done.stdout}")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run may have finished first
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def environment(version: str) -> dict[str, str]:
    """Return the variables that a kernel of that version needs."""
    paths = [str(overlay(version)), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # no debugger warning in the outputs
    }


def kernelspecs(folder: Path) -> None:
    """Write a kernelspec for every version into `folder`, which belongs on JUPYTER_PATH."""
    for version in VERSIONS:
        # The version's own kernelspec, since front ends read from it what the kernel supports.
        own = overlay(version) / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
        spec = json.loads(own.read_text(encoding="utf-8"))
        spec["argv"] = [sys.executable, *spec["argv"][1:]]
        spec["display_name"] = f"ipykernel {version}"
        spec["env"] = environment(version)
        file = folder / "kernels" / f"ipykernel-{version}" / "kernel.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(spec, indent=1), encoding="utf-8")


# A model whose batches take as long as we like.
TRAINING = """
import time, torch
from torch import nn
from ununennium import Callback, Dashboard, Trainer, TrainerConfig
torch.set_num_threads(1)
pause = {"train": 0.02, "validate": 0.02}
class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
    def forward(self, image):
        time.sleep(pause["train" if self.training else "validate"])
        return self.conv(image)
class Times(Callback):
    def on_batch_end(self, trainer, batch, logs):
        self.step = time.time()
    def on_train_end(self, trainer):
        self.end = time.time()
images = torch.randn(6, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
batches = [(image, image.argmax(1)) for image in images]
times = Times()
def make_trainer(*callbacks, **settings):
    torch.manual_seed(0)
    model = Slow()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = TrainerConfig(**({"epochs": 1000, "device": "cpu"} | settings))
    return Trainer(model, optimizer, nn.CrossEntropyLoss(), batches, batches[:3],
                   callbacks=[times, *callbacks], config=config)
trainer = make_trainer()
def train(**slow):
    pause.update({"train": 0.02, "validate": 0.02}, **slow)
    trainer.fit()
    print(f"returned {times.end} {trainer.stop_reason} steps {trainer.global_step}")
print("ready")
"""
