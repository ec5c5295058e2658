"""Files are written whole or not at all, read without running code, and refused if changed."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from small import Hostile
from ununennium.training.checkpoint import (
    CheckpointError,
    checksum,
    copy_file,
    copy_to_host,
    finish_writing,
    load_file,
    newest_first,
    plain,
    remove_leftovers,
    save_file,
    save_in_background,
    write_atomically,
)


def state(epoch=0):
    return {"model": {"weight": torch.full((3,), float(epoch))}, "epoch": epoch}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Replacing a file.


def test_the_old_file_stays_until_the_new_one_takes_its_place(tmp_path, monkeypatch):
    path = save_file(state(0), tmp_path / "a.pt")
    before = path.read_bytes()

    def refuse(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        assert torch.load(source)["epoch"] == 1  # the new file is complete
        raise OSError("a crash, just before the rename")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="just before the rename"):
        save_file(state(1), path)
    assert path.read_bytes() == before and names(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing_behind(tmp_path, error):
    path = save_file(state(0), tmp_path / "a.pt")

    def fail(file):
        file.write(b"half")
        raise error

    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write_atomically(path, fail)
    assert names(tmp_path) == ["a.pt"] and load_file(path)["epoch"] == 0


@pytest.mark.parametrize("has_links", [True, False])
def test_the_replaced_file_is_kept(tmp_path, monkeypatch, has_links):
    def no_links(source, target):
        raise OSError("this file system has no links")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for epoch in range(3):
        save_file(state(epoch), path, previous)
    assert (load_file(path)["epoch"], load_file(previous)["epoch"]) == (2, 1)
    assert names(tmp_path) == ["last.pt", "previous.pt"]


def test_a_folder_is_no_checkpoint(tmp_path):
    save_file(state(), tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="is a folder. Pass the name of a file"):
        save_file(state(), tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint file at .* has last.pt"):
        load_file(tmp_path)


def test_leftovers_are_removed_unless_they_are_recent(tmp_path):
    for name, age in ((".last.pt.1.tmp", 1000), (".last.pt.2.tmp", 0), ("last.pt", 1000)):
        (tmp_path / name).write_bytes(b"half")
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".last.pt.2.tmp", "last.pt"]


def test_a_copy_is_never_newer_than_the_original(tmp_path):
    path = save_file(state(), tmp_path / "a.pt")
    os.utime(path, (1000, 1000))
    assert copy_file(path, tmp_path / "new" / "b.pt").stat().st_mtime == 1000


# Plain values.


def test_numpy_in_the_state_can_be_saved_and_read(tmp_path):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5 * (1 + np.cos(np.pi * epoch / 10)))
    assert type(optimizer.param_groups[0]["lr"]) is not float
    memory = {"seen": np.arange(3), "best": np.float32(2.5), "where": tmp_path}
    content = state() | {"optimizer": optimizer.state_dict(), "memory": memory}
    read = load_file(save_file(content, tmp_path / "a.pt"))
    assert type(read["optimizer"]["param_groups"][0]["lr"]) is float
    assert read["memory"]["best"] == 2.5 and read["memory"]["seen"].tolist() == [0, 1, 2]
    assert read["memory"]["where"] == str(tmp_path)


def test_what_no_file_can_hold_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"state\['callbacks'\]\[1\]\['f'\] is a function"):
        plain({"callbacks": [{}, {"f": lambda: 0}]})


def test_a_checksum_sees_every_part():
    base = {"a": torch.zeros(4), "b": [1, 2.0, "x", None]}
    others = [
        {"a": torch.zeros(4)},
        base | {"a": torch.zeros(2, 2)},
        base | {"a": torch.zeros(4, dtype=torch.int32)},
        base | {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        base | {"b": [1, 2.0, "x", 0]},
        base | {"b": [1, [2.0, "x"], None]},
        base | {"b": [True, 2.0, "x", None]},
        {"b": base["b"], "a": base["a"]},
    ]
    assert checksum(copy_to_host(base)) == checksum(base)
    assert len({checksum(content) for content in [base, *others]}) == len(others) + 1


# Reading.


def test_a_hostile_file_runs_nothing(tmp_path):
    path = save_file(state(), tmp_path / "a.pt")
    torch.save(torch.load(path) | {"progress": Hostile(tmp_path / "owned")}, path)
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        load_file(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epoch": 1}, "has changed since it was saved"),
        ({"checksum": "1"}, "has changed since it was saved"),
        ({"model": 5}, "is not a checkpoint of this package: .* found"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, change, message):
    path = save_file(state(), tmp_path / "a.pt")
    torch.save(torch.load(path) | change, path)
    with pytest.raises(CheckpointError, match=message):
        load_file(path)


def test_a_file_of_another_program_needs_no_checksum(tmp_path):
    torch.save(state(2), tmp_path / "a.pt")
    assert load_file(tmp_path / "a.pt")["epoch"] == 2


def test_newest_first(tmp_path):
    assert newest_first(tmp_path / "missing") == []
    times = {"last.pt": 30, "epoch=3.pt": 30, "previous.pt": 20, "a.pt": 40, "last-old1.pt": 99}
    for name, seconds in times.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    (tmp_path / "folder.pt").mkdir()
    expected = ["a.pt", "last.pt", "epoch=3.pt", "previous.pt", "last-old1.pt"]
    assert [path.name for path in newest_first(tmp_path)] == expected


# In the background.


def test_the_state_is_that_of_the_call_and_one_file_follows_another(tmp_path):
    content, gate, threads = state(), threading.Event(), []

    def wait(path: Path):
        threads.append(threading.current_thread().name)
        assert path.is_file() and gate.wait(10)

    first = save_in_background(content, tmp_path / "last.pt", then=wait)
    content["model"]["weight"] += 1
    assert not first.done()
    gate.set()
    second = save_in_background(content, tmp_path / "last.pt", tmp_path / "previous.pt", wait)
    assert first.done()
    finish_writing()
    assert second.result() == tmp_path / "last.pt"
    for name, total in (("last.pt", 3), ("previous.pt", 0)):
        assert load_file(tmp_path / name)["model"]["weight"].sum() == total
    assert all(name.startswith("checkpoint") for name in threads)


def test_errors_in_the_background_wait_in_the_result(tmp_path):
    shutil.rmtree(tmp_path)
    tmp_path.write_text("not a folder")
    saving = save_in_background(state(), tmp_path / "last.pt")
    finish_writing()
    with pytest.raises(CheckpointError, match="could not be written"):
        saving.result()


# What to do with a file that is not a checkpoint.


def message_of(path):
    with pytest.raises(CheckpointError) as caught:
        load_file(path)
    return str(caught.value)


@pytest.mark.parametrize("key", [None, "state_dict", "net"])
def test_a_file_of_weights_is_refused_with_a_line_that_loads_them(tmp_path, key):
    weights = torch.nn.Linear(2, 1).state_dict()
    path = tmp_path / "weights.pt"
    torch.save(weights if key is None else {"epoch": 3, key: weights}, path)
    text = message_of(path)
    line = text.partition("For the weights alone: ")[2].removesuffix(".")
    model = torch.nn.Linear(2, 1)
    eval(line, {"torch": torch, "model": model, "path": path})
    assert torch.equal(model.weight, weights["weight"]) and "Nothing was loaded" in text


def test_a_file_without_weights_is_refused_with_what_to_pass(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert message_of(tmp_path / "tensor.pt").endswith(
        "found Tensor. Nothing was loaded. Use a file of Trainer.save_checkpoint or of a "
        "CheckpointCallback."
    )


def test_a_damaged_last_file_is_refused_with_the_name_of_another_one(tmp_path):
    for name in ("weights.pt", "previous.pt", "last.pt"):
        save_file(state(), tmp_path / name)
    (tmp_path / "last.pt").write_bytes(b"")
    assert message_of(tmp_path / "last.pt").endswith("use another file, such as previous.pt.")
    os.remove(tmp_path / "previous.pt")
    assert message_of(tmp_path / "last.pt").endswith("Nothing was loaded; use another file.")


def test_a_file_with_a_whole_model_is_refused_in_a_sentence(tmp_path):
    torch.save(torch.nn.Linear(2, 1), tmp_path / "model.pt")
    assert "it holds objects, and reading them would run code" in message_of(tmp_path / "model.pt")


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    """PyTorch says "inline_container.cc: unexpected pos 64 vs 0"."""

    def save(content, file):
        raise RuntimeError("[enforce fail at inline_container.cc:666] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointError, match="the disk seems to be full .* MB are free") as told:
        save_file({"model": {}}, tmp_path / "last.pt")
    assert "inline_container" not in str(told.value)
