"""Checkpoints in parts: what one process can tell of them; the ranks are in tests/ranks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.api import CheckpointException

from ununennium import CheckpointError
from ununennium.ranks import Ranks
from ununennium.training.checkpoint import save_file
from ununennium.training.shards import Shards, by_number, read_shards, remove_unnamed, tensors_of


def make_parts(width=2, steps=1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def write(folder):
    model, optimizer = make_parts()
    save(tensors_of(model, optimizer), checkpoint_id=folder, no_dist=True)
    return model, optimizer


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parts_are_read_without_touching_model_and_optimizer(tmp_path):
    model, optimizer = write(tmp_path / "a.shards")
    other, fresh = make_parts(steps=0)
    nn.init.zeros_(other[0].weight)
    found = read_shards(Ranks(), other, fresh, tmp_path / "a.shards")
    assert not other[0].weight.any() and not fresh.state
    for name, value in model.state_dict().items():
        assert torch.equal(found["model"][name], value)
    wanted = optimizer.state_dict()["state"]
    assert found["optimizer"].keys() == wanted.keys()
    for number, entry in wanted.items():
        for name, value in entry.items():
            assert torch.equal(found["optimizer"][number][name], value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parts_of_another_model_are_refused(tmp_path):
    write(tmp_path / "a.shards")
    for model in (nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))):
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(CheckpointError, match="holds the state of another model or optimizer"):
            read_shards(Ranks(), model, optimizer, tmp_path / "a.shards")
        assert not optimizer.state


def test_parameters_are_counted_as_the_optimizer_does():
    model, _ = make_parts()
    optimizer = torch.optim.SGD([*model[1].parameters(), *model[0].parameters()], 0.1)
    names = by_number(model, optimizer, {name: name for name, _ in model.named_parameters()})
    assert names == {0: "1.weight", 1: "1.bias", 2: "0.weight", 3: "0.bias"}
    compiled = torch.compile(model, backend="eager")
    assert by_number(compiled, optimizer, {"0.bias": 1}) == {3: 1}


@pytest.mark.parametrize("error", [OSError("full."), CheckpointException("ranks", {})])
def test_a_failure_to_write_is_a_checkpoint_error(tmp_path, error):
    def fail():
        raise error

    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(CheckpointError, match="could not be written"),
    ):
        Shards(tmp_path, pool.submit(fail)).wait()


def test_only_own_shards_that_no_file_names_are_removed(tmp_path):
    for name in ("step=1-aa-1.shards", "step=2-aa-2.shards", "step=1-bb-1.shards"):
        (tmp_path / name).mkdir()
    save_file({"model": {}, "shards": "step=2-aa-2.shards"}, tmp_path / "last.pt")
    save_file({"model": {}}, tmp_path / "whole.pt")
    (tmp_path / "damaged.pt").write_bytes(b"half")
    remove_unnamed(tmp_path, "aa")
    assert len(list(tmp_path.glob("*.shards"))) == 3  # the damaged file might name one
    (tmp_path / "damaged.pt").unlink()
    remove_unnamed(tmp_path, "aa")
    left = {path.name for path in tmp_path.glob("*.shards")}
    assert left == {"step=2-aa-2.shards", "step=1-bb-1.shards"}
