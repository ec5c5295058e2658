"""Start a script under torchrun, and see how it ends."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

JOB = Path(__file__).with_name("job.py")
ROOT = JOB.parents[2]


@dataclass
class Ended:
    """What is left of a run: its exit code, what each rank wrote, and how long it took to end."""

    code: int | None
    texts: list[str]
    seconds: float
    orphans: list[int]
    files: list[str]


def processes_of(mark):
    """Return the processes, except zombies, that have this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                state = re.search(r"\) (\w)", (entry / "stat").read_text())
                found += [int(entry.name)] if state and state[1] != "Z" else []
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def torchrun(folder, *job, options=("--standalone", "--nproc-per-node=2"), cwd=None, **environ):
    """Return the process of an agent that runs the job; each rank writes files of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--redirects=3"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "RANKS_TEST": str(folder), **environ}
    environ["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        [*command, f"--log-dir={folder / 'logs'}", str(JOB), str(folder), *map(str, job)],
        env=environ, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def time_of(path):
    return float(path.read_text() or 0) if path.exists() else None


def send_to(processes, number):
    """Send a signal to processes, of which some may have ended."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def show_stacks(mark):
    """Let the job's ranks and workers write where they are into their logs; see `job.py`."""
    commands = {p: Path(f"/proc/{p}/cmdline").read_bytes() for p in processes_of(mark)}
    send_to([p for p, words in commands.items() if b"distributed.run" not in words], signal.SIGUSR1)
    time.sleep(1)


def run(folder, event, phase, rank, limit=60, **options):
    """Run the job to its end, within `limit` seconds; return what is left of it.

    Once in some hundred runs a job hangs before the event, for a reason that is not known: workers
    are forked beside Gloo's threads. That tells nothing about the event, so it is tried once more,
    with a warning that shows where the processes were.
    """
    ended = run_once(folder, event, phase, rank, limit, **options)
    if ended.code is None and not (folder / "happened").exists():
        warnings.warn(f"The job hung before {event}: {ended.texts}", stacklevel=2)
        for name in ("runs", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
        ended = run_once(folder, event, phase, rank, limit, **options)
    return ended


def run_once(folder, event, phase, rank, limit, **options):
    """Run the job; see `run`."""
    agent, mark, sent = torchrun(folder, event, phase, rank, **options), str(folder).encode(), None
    deadline = time.time() + limit
    while (agent.poll() is None or processes_of(mark)) and time.time() < deadline:
        if event == "terminate" and sent is None and (folder / "please").exists():
            sent = time.time()
            agent.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    orphans = processes_of(mark)
    if orphans:
        show_stacks(mark)
    send_to(orphans, signal.SIGKILL)
    began = sent or time_of(folder / "happened") or time.time()
    logs = sorted((folder / "logs").rglob("stdout.log"), key=lambda path: path.parent.name)
    texts = [path.read_text() + path.with_name("stderr.log").read_text() for path in logs]
    runs = folder / "runs"
    files = sorted(path.name for path in runs.iterdir()) if runs.exists() else []
    return Ended(agent.poll(), texts, time.time() - began, orphans, files)
