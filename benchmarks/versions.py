"""Two versions of the package against each other: the ratio of their times, in one run.

    python benchmarks/versions.py --against REVISION [--rounds 9] [--fused]

Each version runs in a process of its own, which stays alive. The rounds alternate between the two,
so that whatever else the machine does hits both. A ratio is the median over rounds of new / old in
the same round; the old version runs before and after. The first column is the old version against
itself: what is noise. The workloads are those of `loop.py`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def serve(fused: bool) -> None:
    """Time the workloads whose names come in, one per line."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch
    from loop import WORKLOADS, by_trainer, timed

    torch.set_num_threads(1)
    for line in sys.stdin:
        seconds, _ = timed(by_trainer, WORKLOADS[line.strip()], "cpu", fused)
        print(seconds, flush=True)


class Version:
    """A process that has imported the package from a folder."""

    def __init__(self, tree: Path, fused: bool) -> None:
        command = [sys.executable, __file__, "--serve", *(["--fused"] if fused else [])]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=tree, env=environment
        )

    def time(self, workload: str) -> float:
        """Return the seconds of one run."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(workload + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def compare(revision: str, rounds: int, fused: bool) -> None:
    """Print a line for each workload."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from loop import WORKLOADS

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "-q", "--detach", tree, revision], check=True)
        try:
            old, new = Version(tree, fused), Version(ROOT, fused)
            print(f"{'workload':42s} {'control':>8s} {'new/old':>8s}")
            for name in WORKLOADS:
                old.time(name), new.time(name)  # the first run imports and compiles
                control, ratio = [], []
                for _ in range(rounds):
                    before, now, after = old.time(name), new.time(name), old.time(name)
                    control.append(after / before)
                    ratio.append(2 * now / (before + after))
                medians = f"{statistics.median(control):8.3f} {statistics.median(ratio):8.3f}"
                print(f"{name:42s} {medians}", flush=True)
            for version in (old, new):
                version.process.kill()
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", metavar="REVISION", default="HEAD")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.fused)
    else:
        compare(options.against, options.rounds, options.fused)
