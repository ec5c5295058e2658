"""One contender, one workload, in a process of its own.

    python -m benchmarks.peers.once CONTENDER WORKLOAD FOLDER

The clock runs from the call with a ready model, optimizer and data to its end. PyTorch has been
used before, the contender's library has only been imported. Writes the times to `times.json` and
the final parameters to `parameters.pt`.
"""

import importlib
import json
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from .contenders import CONTENDERS, TAILS
from .contenders.by_hand import train as train_by_hand
from .workloads import WORKLOADS, Workload, make_job


def warm_up(workload: Workload) -> None:
    """Let PyTorch do the same once, so that nobody pays for its first time."""
    few = replace(workload, train_batches=2 * workload.accumulation, val_batches=1, workers=0)
    train_by_hand(make_job(few))


def main(name: str, workload_name: str, folder: str) -> None:
    """Import, warm up, train, write."""
    contender, workload = (CONTENDERS | TAILS)[name], WORKLOADS[workload_name]
    start = time.perf_counter()
    train = importlib.import_module(f".contenders.{contender.file}", __package__).train
    times = {"import": time.perf_counter() - start}
    warm_up(workload)
    job = make_job(workload)
    os.chdir(folder)  # for libraries that write files
    start = time.perf_counter()
    train(job, **contender.options)
    times["train"] = time.perf_counter() - start
    parameters = torch.nn.utils.parameters_to_vector(job.model.parameters()).detach()
    torch.save(parameters, "parameters.pt")
    Path("times.json").write_text(json.dumps({name: round(t, 6) for name, t in times.items()}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main(*sys.argv[1:])
