"""torchrun starts killed workers again, and the run continues as if nothing had happened."""

import pytest
import torch

from ranks.launch import run

# Otherwise the new workers read the addresses of the old ones, also without this package.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def restarts(count):
    return {
        "options": ("--standalone", "--nproc-per-node=2", f"--max-restarts={count}"),
        **OWN_STORE,
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    assert run(folder, "none", "training", 0).code == 0
    return torch.load(folder / "result")


@pytest.mark.parametrize(
    ("event", "phase", "rank"), [("kill", "training", 1), ("worker", "validation", 1)]
)
def test_a_restart_is_exact(straight, event, phase, rank, tmp_path):
    ended = run(tmp_path, event, phase, rank, **restarts(2))
    assert ended.code == 0 and not ended.orphans
    result = torch.load(tmp_path / "result")
    assert result["history"] == straight["history"]
    for name, value in straight["model"].items():
        assert torch.equal(result["model"][name], value), name
