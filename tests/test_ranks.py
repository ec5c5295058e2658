"""Ranks agree on numbers and objects, and know why another one does not come."""

import threading
import time
import warnings

import pytest
import torch.distributed as dist

from processes import on_ranks
from ununennium import TrainingWarning
from ununennium import ranks as module
from ununennium.ranks import (
    Failures,
    RankFailed,
    Ranks,
    agreed,
    await_arrival,
    find_ranks,
    is_lost_connection,
    require_same_place,
    summary,
)


def talk():
    ranks = find_ranks()
    assert find_ranks() is ranks  # one group, however many trainers there are
    found = (
        ranks.sum([1.0, ranks.rank, 2.0**60]),
        ranks.gather(ranks.rank),
        ranks.from_main(ranks.rank),
    )
    return ranks.rank, ranks.size, ranks.is_main, *found


def test_numbers_and_objects_reach_all():
    results = on_ranks(3, talk)
    assert [result[:3] for result in results] == [(0, 3, True), (1, 3, False), (2, 3, False)]
    assert all(result[3:] == ([3.0, 3.0, 3 * 2.0**60], [0, 1, 2], 0) for result in results)


def test_a_group_of_one_is_no_group():
    assert on_ranks(1, find_ranks) == [Ranks()]


def test_the_first_failure_is_explained():
    store = dist.HashStore()
    one, two, alone = Failures(store, 1), Failures(store, 2), Failures(None, 0)
    assert one.first() == "" and "ended and left no message" in str(two.explanation())
    one.report(ValueError("bad.\nmore"))
    two.report(OSError("later"))
    assert one.first() == two.first() == "Rank 1 failed: ValueError: bad."
    assert "Rank 2 cannot continue without it" in str(two.explanation())
    two.begin()
    assert two.first() == ""
    two.report(KeyboardInterrupt())
    assert two.first() == "Rank 2 failed: KeyboardInterrupt."
    alone.report(OSError())
    assert alone.first() == ""


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistNetworkError("the socket has timed out"), True),
        (RuntimeError("shapes differ"), False),
        (OSError("gloo"), False),
        (RankFailed("gloo"), False),
    ],
)
def test_lost_connections(error, is_lost):
    assert is_lost_connection(error) == is_lost


def wait_in_vain():
    ranks = find_ranks()
    if ranks.rank == 1:
        ranks.failures.report(OSError("the archive is gone"))
        time.sleep(4)  # its process lives on
        return None
    found = []
    for exchange in (lambda: ranks.gather(1), lambda: ranks.sum([1])):
        try:
            exchange()
        except RankFailed as error:
            found.append(str(error))
    return found


def test_nobody_waits_for_a_rank_that_has_failed():
    found = on_ranks(2, wait_in_vain)[0]
    assert len(found) == 2 and all("Rank 1 failed: OSError: the archive" in text for text in found)


def wait_long():
    """Rank 1 comes late."""
    module.PATIENCE = 1
    ranks = find_ranks()
    if ranks.rank == 1:
        time.sleep(2.5)
    with warnings.catch_warnings(record=True) as caught, ranks.within("resume"):
        warnings.simplefilter("always")
        ranks.sum([1.0])
    module.PATIENCE = 60
    return [(warning.category, str(warning.message)) for warning in caught]


def test_a_rank_that_waits_long_says_so_once():
    first, second = on_ranks(2, wait_long)
    [(category, text)] = first
    assert category is TrainingWarning and not second
    assert "Rank 0 has waited in resume for 1 seconds" in text and "load_checkpoint" in text


def test_a_rank_that_builds_its_trainer_alone_says_so(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    store = dist.HashStore()
    late = threading.Timer(0.3, store.add, ("ununennium/arrived", 1))
    late.start()
    with pytest.warns(TrainingWarning, match="has waited in Trainer"):
        await_arrival(store, rank=0, size=2)
    late.join()


WORKER = """Caught OSError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 349, in _worker_loop
OSError: the archive is gone
hint: a second line"""


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ValueError("bad.\nmore"), "ValueError: bad."),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (OSError(WORKER), "OSError: the archive is gone (in DataLoader worker process 0)"),
        (
            RuntimeError(
                WORKER.replace("OSError", "OutOfMemoryError").replace("\nOut", "\ntorch.Out")
            ),
            "OutOfMemoryError: the archive is gone (in DataLoader worker process 0)",
        ),
    ],
)
def test_an_error_in_one_line(error, wanted):
    assert summary(error) == wanted


def test_an_agreed_error_is_marked():
    assert agreed(ValueError("no batch")).is_agreed and not hasattr(ValueError(), "is_agreed")


def test_places_are_named():
    call = module.CALLS.index
    require_same_place([(call("fit"), 1), (call("fit"), 1)])
    with pytest.raises(
        RuntimeError, match="rank 0 is in save_checkpoint and ranks 1 and 2 are in fit"
    ):
        require_same_place([(call("save_checkpoint"), 1), (call("fit"), 1), (call("fit"), 1)])
    with pytest.raises(RuntimeError, match="at different points of fit"):
        require_same_place([(call("fit"), 1), (call("fit"), 2)])


def part(first, second):
    """Make one kind of exchange on rank 0 and another on rank 1; return what both raise."""
    ranks = find_ranks()
    call, kind = (first, second)[ranks.rank]
    exchanges = {
        "meet": ranks.meet,
        "sum": lambda: ranks.sum([1.0, 2.0]),
        "max": lambda: ranks.max(1.0),
        "gather": lambda: ranks.gather("a" * 1000),
        "from_main": lambda: ranks.from_main("a" * 1000),
    }
    with ranks.within(call):
        try:
            exchanges[kind]()
        except RuntimeError as error:
            return str(error)


PARTINGS = [
    (("save_checkpoint", "gather"), ("fit", "sum")),
    (("fit", "gather"), ("fit", "from_main")),
    (("resume", "from_main"), ("validate", "meet")),
    (("check", "max"), ("any_rank", "sum")),
]


@pytest.mark.parametrize(("first", "second"), PARTINGS)
def test_ranks_that_part_are_told_where_the_others_are(first, second):
    one, two = on_ranks(2, part, first, second)
    assert one == two and one.startswith("The ranks have parted")
    if first[0] == second[0]:
        assert f"at different points of {first[0]}" in one
    else:
        assert f"rank 0 is in {first[0]} and rank 1 is in {second[0]}" in one


def test_a_known_failure_hides_the_closed_connection():
    failures, closed = Failures(dist.HashStore(), 1), RuntimeError("gloo: closed")
    assert failures.cause(closed) is closed
    failures.report(OSError("gone"))
    assert failures.cause(closed) is None
