"""What was measured, and tables of it."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
from pathlib import Path
from typing import NamedTuple

from .contenders import CONTENDERS, HAND

ROOT = Path(__file__).resolve().parents[2]


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


def spread(values: list[float]) -> Spread:
    """Return the quartiles of a list."""
    if len(values) == 1:
        return Spread(*values * 3)
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def version_of(distribution: str) -> str | None:
    """Return the version that is installed, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest(*folders: Path) -> str:
    """Return a short checksum of all code in the folders."""
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def facts(threads: int) -> dict:
    """Return what the numbers depend on. Rounds are joined only if all of this is the same."""
    wanted = {c.distribution for c in CONTENDERS.values() if c.distribution}
    return {
        "torch": version_of("torch"),
        "python": platform.python_version(),
        "threads": threads,
        "cpus": os.cpu_count(),
        "versions": {name: version_of(name) for name in sorted(wanted)},
        "code": digest(ROOT / "ununennium", ROOT / "benchmarks" / "peers"),
    }


def as_text(content: dict) -> str:
    """Return JSON with a line for each round."""

    def lines(rounds: list[dict]) -> str:
        return ",\n  ".join(json.dumps(r, ensure_ascii=False) for r in rounds)

    head = json.dumps({key: content[key] for key in ("date", "facts")}, indent=1)
    workloads = ",\n ".join(
        f"{json.dumps(name, ensure_ascii=False)}: [\n  {lines(rounds)}\n ]"
        for name, rounds in content["rounds"].items()
    )
    return head.rstrip("\n} ") + '\n },\n "rounds": {\n ' + workloads + "\n }\n}\n"


class Results:
    """The rounds of all workloads, in a file that grows while they are run.

    `rounds[workload]` is a list of dictionaries: contender → times and what became of the
    parameters. Until all rounds are there, the file has the name of the final one and `.part`.
    """

    def __init__(self, path: Path, facts: dict) -> None:
        self.path, self.part, self.facts = path, Path(f"{path}.part"), facts
        self.rounds: dict[str, list[dict]] = {}

    def load(self) -> None:
        """Take over the rounds of an earlier run of the same code and versions."""
        for path in (self.part, self.path):
            if path.exists() and (old := json.loads(path.read_text()))["facts"] == self.facts:
                self.rounds = old["rounds"]
                return

    def save(self, path: Path) -> None:
        """Write a file that `load` can read."""
        content = {"date": datetime.date.today().isoformat(), "facts": self.facts}
        content["rounds"] = self.rounds
        path.write_text(as_text(content))

    def finish(self) -> None:
        """Give the file its final name."""
        self.save(self.part)
        self.part.replace(self.path)


def ratios(rounds: list[dict], contender: str) -> list[float]:
    """Return contender / by hand of every round in which both were trained."""
    return [
        r[contender]["train"] / r[HAND]["train"]
        for r in rounds
        if "train" in r.get(contender, {}) and "train" in r.get(HAND, {})
    ]


def imports(all_rounds: dict[str, list[dict]], contender: str) -> list[float]:
    """Return how long a contender's library took to import after PyTorch, in seconds."""
    runs = [r.get(contender, {}) for rounds in all_rounds.values() for r in rounds]
    return [run["import"] for run in runs if "import" in run]


def cell(rounds: list[dict], contender: str) -> str:
    """Return a table's cell: median and quartiles, or why there are none."""
    if values := ratios(rounds, contender):
        return str(spread(values))
    runs = [r[contender] for r in rounds if contender in r]
    return runs[-1].get("failed", "") if runs else ""


def table(content: dict) -> str:
    """Return a Markdown table: a line for each contender, a column for each workload."""
    all_rounds, versions = content["rounds"], content["facts"]["versions"]
    lines = [
        "| × by hand | " + " | ".join(all_rounds) + " | import |",
        "| --- |" + " --- |" * (len(all_rounds) + 1),
    ]
    for name, contender in CONTENDERS.items():
        cells = [cell(rounds, name) for rounds in all_rounds.values()]
        seconds = imports(all_rounds, name)
        if name == HAND:
            by_hand = [spread([r[HAND]["train"] for r in rounds]) for rounds in all_rounds.values()]
            cells = [f"{seconds.median:.2f} s" for seconds in by_hand]
        elif contender.distribution and not versions[contender.distribution]:
            cells = ["not installed"] * len(cells)
        elif not any(cells):
            continue
        is_library = contender.distribution and seconds
        cells.append(f"{statistics.median(seconds):.2f} s" if is_library else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(content: dict) -> str:
    """Return a list of whose final parameters differ from the hand-written loop's, and how."""
    found: dict[str, list[str]] = {}
    for workload, rounds in content["rounds"].items():
        for name in CONTENDERS:
            notes = {r[name].get("parameters", "bitwise equal") for r in rounds if name in r}
            if note := ", or ".join(sorted(notes - {"bitwise equal"})):
                found.setdefault(name, []).append(f"{note} ({workload})")
    lines = [f"- {name}: {'; '.join(notes)}" for name, notes in found.items()]
    return "\n".join(lines or ["- nobody's"])
