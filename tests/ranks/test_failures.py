"""Whatever happens on one rank, all end soon, with the right words and with whole files."""

import itertools
import os

import pytest

from ranks.launch import run
from ununennium.training.checkpoint import load_file

OTHERS = "Rank 0 cannot continue without it, and stops too."
# What each event leaves: the exit code, and what ranks 0 and 1 say.
EVENTS = {
    "stop": (0, "enough (rank 1)", "enough (rank 1)"),
    "interrupt": (0, "interrupted (rank 0)", "interrupted (rank 0)"),
    "terminate": (1, ": asked to terminate", ""),
    "callback": (1, "Rank 1 failed: ValueError: a bad callback.", "ValueError: a bad callback"),
    "worker": (
        1,
        "Rank 1 failed: OSError: the archive is gone (in",
        "OSError: the archive is gone",
    ),
    "loss": (1, "Rank 1 failed: ValueError: a bad loss.", "ValueError: a bad loss"),
    "kill": (1, "Another rank has ended and left no message", ""),
}
PHASES = ("training", "validation", "checkpointing")
# All 21 with ALL_FAILURES=1, as `make failures` does; one phase of each event otherwise.
CASES = [
    (event, phase)
    for number, (event, phase) in enumerate(itertools.product(EVENTS, PHASES))
    if os.environ.get("ALL_FAILURES") or number // 3 % 3 == number % 3
]


@pytest.mark.parametrize(("event", "phase"), CASES)
def test_all_ranks_end(event, phase, tmp_path):
    code, first, second = EVENTS[event]
    ended = run(tmp_path, event, phase, 0 if event == "interrupt" else 1)
    assert (ended.code, ended.orphans) == (code, [])
    assert ended.seconds < 30
    assert first in ended.texts[0] and second in ended.texts[1]
    if code and event != "terminate":
        assert OTHERS in ended.texts[0]
    assert ended.files and all(name.endswith(".pt") for name in ended.files)
    for name in ended.files:
        load_file(tmp_path / "runs" / name)


def test_a_checkpoint_of_one_rank_ends_all(tmp_path):
    ended = run(tmp_path, "save", "training", 0)
    assert (ended.code, ended.orphans) == (1, []) and ended.seconds < 30
    for text in ended.texts:
        assert "rank 0 is in save_checkpoint and rank 1 is in fit" in text
    assert not (tmp_path / "mine.pt").exists()
