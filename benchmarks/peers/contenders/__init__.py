"""Who trains: one file each. A file has a function `train(job, **options)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A file of this folder, and how to call its `train`."""

    file: str
    distribution: str | None = None  # what has to be installed
    options: dict[str, Any] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)  # workloads to leave out, and why


def trainer(callbacks: tuple[str, ...] = (), **settings) -> Contender:
    """Return the trainer with callbacks, by name, and settings of its `TrainerConfig`."""
    return Contender("trainer", "ununennium", {"callbacks": callbacks, "settings": settings})


NO_FUSED = {"tiny MLP, fused AdamW": "Keras has its own optimizers and no fused one"}
HAND = "by hand"
CONTENDERS = {
    HAND: Contender("by_hand"),
    "control": Contender("by_hand"),  # the same once more: what is noise
    "ununennium": trainer(),
    "ununennium, checkpoint per epoch": trainer(callbacks=("checkpoint",)),
    "ignite": Contender("ignite", "pytorch-ignite"),
    "skorch": Contender("skorch", "skorch"),
    "accelerate": Contender("accelerate", "accelerate"),
    "transformers Trainer": Contender("transformers", "transformers"),
    "fastai": Contender("fastai", "fastai"),
    "Lightning, bare": Contender("lightning", "lightning", {"bare": True}),
    "Lightning, defaults": Contender("lightning", "lightning", {"bare": False}),
    "Keras": Contender("keras", "keras", cannot=NO_FUSED),
}
# How others treat a last accumulation window that is too short. They are compared to these loops.
TAILS = {
    "drops the tail": Contender("by_hand", options={"tail": "dropped"}),
    "treats the tail as a full window": Contender("by_hand", options={"tail": "as a full window"}),
}
