"""The trainer against the same loop written by hand and against other libraries.

    make bench
    python -m benchmarks.peers [--rounds 7] [--only WORKLOAD/CONTENDER] [--out results.json]

Everybody does the same work: forward, cross-entropy, backward, clipping to norm 1, AdamW, zeroing
gradients, a mean of the loss without reading it in between, and a validation pass with a confusion
matrix. The model, the data and their order are the same, too.

Every run has a process of its own, on one thread. A round trains each workload once with every
contender, so whatever else the machine does hits all of them. A ratio is that of a contender's time
to the hand-written loop's in the same round; the table has their median and, in brackets, the
quartiles. The control is the hand-written loop once more: what is noise. The last column is the
time to import a library when PyTorch has been imported. A list says whose final parameters are not
bitwise those of the hand-written loop.

The results grow round by round in a file. Start the command again to go on where it was stopped, or
to add rounds. If the code or a version has changed, all rounds are run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from .contenders import CONTENDERS, HAND, TAILS
from .results import ROOT, Results, differences, facts, table, version_of
from .workloads import WORKLOADS


def train_once(contender: str, workload: str, threads: int) -> tuple[dict, Tensor | None]:
    """Train in a new process; return the times, or the failure, and the final parameters."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers.once", contender, workload, folder],
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return {"failed": f"failed: {lines[-1]}"}, None
        times = json.loads((Path(folder) / "times.json").read_text())
        return times, torch.load(Path(folder) / "parameters.pt")


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest parameter."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(found: Tensor, expected: Tensor, tails: dict[str, Tensor]) -> str:
    """Say in a few words how parameters differ from the hand-written loop's."""
    loops = {"": expected} | tails
    nearest = min(loops, key=lambda name: distance(found, loops[name]))
    if torch.equal(found, loops[nearest]):
        return nearest or "bitwise equal"
    difference = f"differs by {distance(found, loops[nearest]):.0e}"
    return f"{nearest}, {difference}" if nearest else difference


@functools.cache
def train_tails(workload: str, threads: int) -> dict[str, Tensor]:
    """Return what the hand-written loop gives if it treats the tail as others do."""
    found = {name: train_once(name, workload, threads)[1] for name in TAILS}
    return {name: parameters for name, parameters in found.items() if parameters is not None}


def train_round(number: int, workload: str, names: list[str], threads: int) -> dict[str, dict]:
    """Train a workload with every contender. The order changes from round to round."""
    turn = number % len(names) if names else 0
    times, expected = train_once(HAND, workload, threads)
    tails = train_tails(workload, threads) if WORKLOADS[workload].has_tail else {}
    found = {HAND: times}
    for name in names[turn:] + names[:turn]:
        found[name], parameters = train_once(name, workload, threads)
        if parameters is not None and expected is not None:
            found[name]["parameters"] = compare(parameters, expected, tails)
    return found


def who_trains(workload: str, only: list[str]) -> list[str]:
    """Return the contenders of a workload that are installed, able and asked for."""

    def is_asked_for(name: str) -> bool:
        parts = [text.partition("/") for text in only]
        return any(first in workload and last in name for first, _, last in parts)

    return [
        name
        for name, contender in CONTENDERS.items()
        if name != HAND
        and workload not in contender.cannot
        and (contender.distribution is None or version_of(contender.distribution))
        and is_asked_for(name)
    ]


def run(results: Results, rounds: int, only: list[str], threads: int) -> None:
    """Run the rounds that are missing."""
    for number in range(rounds):
        for workload in WORKLOADS:
            names, done = who_trains(workload, only), results.rounds.get(workload, [])
            if not names or (len(done) > number and done[number].keys() >= set(names)):
                continue
            start = time.perf_counter()
            found = train_round(number, workload, names, threads)
            results.rounds.setdefault(workload, [])[number : number + 1] = [found]
            results.save(results.part)
            seconds = time.perf_counter() - start
            print(f"round {number + 1} of {rounds}, {workload}: {seconds:.0f} s", flush=True)


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORKLOAD/CONTENDER",
        help="parts of names, such as 'U-Net/Lightning', 'tiny' or '/ununennium'; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, help="results.json beside this folder; with --only, some.json"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="take over no earlier rounds")
    options = parser.parse_args()
    out = options.out or ROOT / "benchmarks" / ("some.json" if options.only else "results.json")
    results = Results(out.resolve(), facts(options.threads))
    if not options.fresh:
        results.load()
    run(results, options.rounds, options.only or ["/"], options.threads)
    results.finish()
    content = json.loads(results.path.read_text())
    print(f"{table(content)}\n\nParameters that are not bitwise equal:\n{differences(content)}")
    if missing := [name for name, version in results.facts["versions"].items() if not version]:
        print(f"\nNot installed: {', '.join(missing)}.")


if __name__ == "__main__":
    main()
