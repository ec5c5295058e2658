"""Compare two versions of the package bit by bit: parameters, history, files, exact resume.

`python tools/golden.py --against REVISION` runs 49 small configurations on a revision and then
on the working tree, on the same machine, and lists those whose results differ.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = (("AdamW", False), ("AdamW", True), ("SGD", False), ("SGD", True))
SCHEDULES = ("none", "StepLR", "ReduceLROnPlateau")


def cases() -> list[dict]:
    """Return a quarter of the 192 combinations, and one case with worker processes."""
    names = ("optimizer", "accumulation", "validates", "schedule", "is_spoiled", "dropout")
    product = itertools.product(
        OPTIMIZERS, (1, 3), (True, False), SCHEDULES, (False, True), (0.0, 0.2)
    )
    chosen = [
        dict(zip(names, case, strict=True)) | {"workers": 0}
        for number, case in enumerate(product)
        if number % 4 == number // 4 % 4
    ]
    return [*chosen, dict(chosen[5], accumulation=2, workers=2, dropout=0.2)]


def make_trainer(case: dict, callbacks: tuple = ()):  # noqa: ANN201
    """Build one case's trainer, with the package that Python finds first."""
    import torch
    from torch import nn
    from torch.optim import lr_scheduler
    from torch.utils.data import DataLoader

    from ununennium import Trainer, TrainerConfig
    from ununennium.data import SyntheticScenes

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(case["dropout"]),
        nn.Conv2d(8, 5, 1),
    )
    name, fused = case["optimizer"]
    extra = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.02, fused=fused, **extra)
    scheduler = {
        "none": lambda: None,
        "StepLR": lambda: lr_scheduler.StepLR(optimizer, 1, 0.5),
        "ReduceLROnPlateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    }[case["schedule"]]()
    train, val = list(SyntheticScenes(10, size=16, seed=1)), SyntheticScenes(6, size=16, seed=2)
    if case["is_spoiled"]:
        train[3] = train[3] | {"image": train[3]["image"].clone()}
        train[3]["image"][0, 0, 0] = math.nan
        train[5] = train[5] | {"mask": torch.full_like(train[5]["mask"], 255)}
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]), ignore_index=255)
    settings = TrainerConfig(
        epochs=3,
        device="cpu",
        progress="none",
        accumulation_steps=case["accumulation"],
        seed=7,
    )
    return Trainer(
        model,
        optimizer,
        loss,
        DataLoader(train, 2, shuffle=True, num_workers=case["workers"]),
        DataLoader(val, 3) if case["validates"] else None,
        scheduler,
        callbacks=list(callbacks),
        config=settings,
    )


def stop_at(step: int):  # noqa: ANN201
    """Return a callback that stops a run once, after the given optimizer step."""
    from ununennium import Callback

    class StopAt(Callback):
        is_done = False

        def on_safepoint(self, trainer, phase) -> None:  # noqa: ANN001
            if trainer.global_step == step and not self.is_done:
                self.is_done = True
                trainer.request_stop("golden")

    return StopAt()


def describe(case: dict) -> tuple[str, bool]:
    """Run a case once straight and once stopped and resumed; return a hash, and whether both agree.

    The hash covers parameters, buffers, history, step count, and the content of a file saved after
    the fourth step.
    """
    import torch

    from ununennium.training.checkpoint import checksum, load_file

    def tensors(trainer) -> list:  # noqa: ANN001
        return list(trainer.model.state_dict().values())

    straight = make_trainer(case)
    history = straight.fit()
    digest = hashlib.sha256()
    for tensor in tensors(straight):
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(f"{dict(history)} {straight.global_step}".encode())
    stopped, resumed = make_trainer(case, (stop_at(4),)), make_trainer(case)
    stopped.fit()
    with tempfile.TemporaryDirectory() as folder:
        path = stopped.save_checkpoint(Path(folder) / "stopped.pt")
        saved = load_file(path)
        content = {name: saved[name] for name in saved if name not in ("checksum", "callbacks")}
        digest.update(str(checksum(content)).encode())
        resumed.load_checkpoint(path)
    resumed.fit()
    same = all(map(torch.equal, tensors(resumed), tensors(straight)))
    return digest.hexdigest(), same and str(resumed.history) == str(history)


def write(path: Path) -> None:
    """Run all cases with the package at hand, and write the results to a file."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path.write_text(json.dumps({json.dumps(case): describe(case) for case in cases()}, indent=1))


def results(tree: Path) -> dict[str, tuple[str, bool]]:
    """Return the results of the package in a folder, from a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.json"
        command = [sys.executable, __file__, "--write", str(path)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tree)}, cwd=tree)
        return json.loads(path.read_text())


def compare(revision: str) -> int:
    """Compare the working tree with a revision; return how many cases fail."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "-q", "--detach", tree, revision], check=True)
        try:
            before = results(tree)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)
    after = results(ROOT)
    differ = [case for case in before if before[case][0] != after[case][0]]
    inexact = [case for case in after if not after[case][1]]
    for what, found in (("differs from " + revision, differ), ("is not resumed exactly", inexact)):
        for case in found:
            print(f"{what}: {case}")
    print(f"{len(before) - len(differ)} of {len(before)} cases have the bits of {revision};")
    print(f"{len(after) - len(inexact)} of {len(after)} are resumed exactly.")
    return len(differ) + len(inexact)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", metavar="REVISION", default="HEAD")
    parser.add_argument("--write", type=Path, help="only run the package at hand")
    options = parser.parse_args()
    sys.exit(write(options.write) if options.write else compare(options.against))
