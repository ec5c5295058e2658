"""torchrun starts killed workers again, and the run continues as if nothing had happened."""

import socket

import pytest
import torch

from ranks.launch import run, torchrun

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


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_agents_with_folders_of_their_own_train_one_model(straight, tmp_path):
    """As on two machines, one process each; only that of rank 0 has the files."""
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=7")
    options = ("--nnodes=2", "--nproc-per-node=1", *rendezvous, "--local-addr=127.0.0.1")
    machines = [tmp_path / name for name in ("one", "two")]
    for machine in machines:
        machine.mkdir()
    agents = [torchrun(x, "none", "training", 0, options=options, cwd=x) for x in machines]
    assert [agent.wait(60) for agent in agents] == [0, 0]
    (folder,) = [machine for machine in machines if (machine / "result").exists()]
    result = torch.load(folder / "result")
    assert result["history"] == straight["history"]
    assert sorted(len(list(machine.glob("runs/*.pt"))) for machine in machines) == [0, 3]
