"""Windows of batches whose steps are skipped or taken, and a count of them by plain loops."""

import math

import torch
from hypothesis import strategies as st

from ununennium.training.batches import MicroBatch
from ununennium.training.finite import CHECKED


def make_batch(number=0, raw=None, inputs=None, **checks):
    """A batch with these checks; what spoils the input spoils the output, unless that is given."""
    if math.isnan(checks.get("input", 0.0)):
        checks.setdefault("output", math.nan)
    values = {name: torch.tensor(value) for name, value in ({"loss": 0.5} | checks).items()}
    return MicroBatch(
        raw, inputs, None, 1.0, number, losses={"loss": values["loss"]}, checks=values
    )


def plain_culprit(batch):
    bad = {name for name in batch.checks if not math.isfinite(batch.checks[name])}
    if "output" in bad:
        return "input" if "input" in bad else "output"
    if "loss" in bad:
        return "target" if "target" in bad else "loss"
    return None


def plain_count(windows, outcomes):
    """Count as the definition says, with nothing but Python's own loops."""
    first, run, longest = None, 0, 0
    for window, stepped in zip(windows, outcomes, strict=True):
        run = 0 if stepped else run + 1
        longest = max(longest, run)
        if not stepped and first is None:
            bad = [(batch.number, name) for batch in window if (name := plain_culprit(batch))]
            first = bad[0] if bad else (window[0].number, "gradient")
    return {
        "count": outcomes.count(False), "first": first, "in_a_row": run, "longest": longest,
        "taken": outcomes.count(True),
    }  # fmt: skip


@st.composite
def runs(draw, most=40):
    """Windows and whether their steps were taken; bad checks only where they were not."""
    outcomes = draw(st.lists(st.booleans(), min_size=1, max_size=most))
    size, number, windows = draw(st.integers(1, 3)), 0, []
    for stepped in outcomes:
        window = []
        for _ in range(size):
            bad = set() if stepped else draw(st.sets(st.sampled_from(CHECKED)))
            checks = {name: 1.0 for name in CHECKED if name != "target" or draw(st.booleans())}
            window.append(make_batch(number, **(checks | dict.fromkeys(bad, math.nan))))
            number += 1
        windows.append(window)
    return windows, outcomes
