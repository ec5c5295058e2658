"""Models sharded by FSDP2 take the same steps, and share files with plain ones."""

import contextlib
import io
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from processes import on_ranks
from ranks.test_ddp import ACCUMULATION, LOSS, TRAIN, VAL, Net, batches_of, weight_of
from ununennium import Callback, CheckpointCallback, CheckpointError, Trainer, TrainerConfig
from ununennium.distributed import whole
from ununennium.training.checkpoint import load_file

CLIP = 0.3


class Vectors(Callback):
    """Keeps the whole parameters after each step."""

    def __init__(self):
        self.kept = []

    def on_safepoint(self, trainer, phase):
        if phase == "train":
            self.kept.append(vector(trainer.model))


def vector(model):
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters()]).clone()


def shard(net, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net.first, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)


def make_trainer(model, callbacks=(), loaders=None, **settings):
    rank = dist.get_rank() if dist.is_initialized() else 0
    config = TrainerConfig(
        device="cpu", progress="none", accumulation_steps=ACCUMULATION, gradient_clip=CLIP,
        **settings,
    )  # fmt: skip
    train, val = loaders or (TRAIN[rank], VAL[rank])
    return Trainer(model, adam(model), LOSS, train, val, callbacks=list(callbacks), config=config)


def train_by_hand(size, epochs=2):
    """One process takes the windows of all ranks together."""
    model, vectors = Net(), []
    optimizer = adam(model)
    for _ in range(epochs):
        for start in range(0, 11, ACCUMULATION):
            window = [pair for each in TRAIN[:size] for pair in each[start : start + ACCUMULATION]]
            total = sum(weight_of(mask) for _, mask in window)
            model.zero_grad()
            for image, mask in window:
                if weight_of(mask):
                    (LOSS(model(image), mask) * weight_of(mask) / total).backward()
            if nn.utils.clip_grad_norm_(model.parameters(), CLIP).isfinite():
                optimizer.step()
            vectors.append(vector(model))
    return model, vectors


def train_ranks():
    vectors = Vectors()
    trainer = make_trainer(shard(Net()), [vectors])
    return dict(trainer.fit(2)), vectors.kept


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_ranks_take_the_steps_of_one_process(size):
    """Nodata on one rank only, a NaN, loaders and validation of any length, clipping."""
    model, wanted = train_by_hand(size)
    results = on_ranks(size, train_ranks)
    for history, vectors in results:
        for own, other in zip(vectors, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-6)  # the norm is in float32
        assert repr(history) == repr(results[0][0])
        assert history["train_skipped_steps"] == [1.0, 1.0]
    pairs = [pair for each in VAL[:size] if each for pair in each]
    with torch.no_grad():
        losses = [LOSS(model(image), mask).item() * weight_of(mask) for image, mask in pairs]
    loss = sum(losses) / sum(weight_of(mask) for _, mask in pairs)
    assert results[0][0]["val_loss"][-1] == pytest.approx(loss, rel=1e-5)


class Stop(Callback):
    def on_safepoint(self, trainer, phase):
        if trainer.global_step == 3:
            trainer.request_stop("enough")


def save(path):
    trainer = make_trainer(shard(Net()), [Stop()])
    trainer.fit(2)
    trainer.save_checkpoint(path)
    return vector(trainer.model)


def resume_and_finish(path):
    straight, again = make_trainer(shard(Net())), make_trainer(shard(Net()))
    straight.fit(2)
    again.load_checkpoint(path)
    again.fit(1)
    again.fit(1)
    state = again.optimizer.state_dict()["state"][0]
    return (
        torch.equal(vector(straight.model), vector(again.model)),
        straight.history == again.history,
        type(state["exp_avg"]).__name__,
    )


def load_and_step(path, is_sharded):
    """Continue on the same batches on all ranks; return the parameters before and after."""
    trainer = make_trainer(shard(Net()) if is_sharded else Net(), loaders=(batches_of(0, 4), None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.load_checkpoint(path)
    loaded = vector(trainer.model)
    trainer.fit(1)
    return loaded, vector(trainer.model)


def test_a_sharded_run_resumes_exactly(tmp_path):
    on_ranks(2, save, tmp_path / "run.pt")
    assert on_ranks(2, resume_and_finish, tmp_path / "run.pt") == [(True, True, "DTensor")] * 2


def save_epoch(path, is_sharded):
    model = shard(Net()) if is_sharded else Net()
    trainer = make_trainer(model, loaders=(batches_of(3, 6), None))
    trainer.fit(1)
    trainer.save_checkpoint(path)
    return vector(trainer.model)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_files_go_from_plain_to_sharded_models_and_back(tmp_path, is_sharded):
    path = tmp_path / "run.pt"
    saved = on_ranks(2, save_epoch, path, True)[0] if is_sharded else save_epoch(path, False)
    loaded, wanted = load_and_step(path, False)
    assert torch.equal(loaded, saved)
    for size in (2, 4):
        for found, after in on_ranks(size, load_and_step, path, True):
            assert torch.equal(found, saved)
            torch.testing.assert_close(after, wanted, rtol=0, atol=1e-6)


def by_torch(path):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = shard(Net())
    set_model_state_dict(model, torch.load(path)["model"], options=options)
    return vector(model), get_model_state_dict(model, options=options)


def test_pytorch_reads_the_model_of_a_file_into_a_sharded_one(tmp_path):
    saved = on_ranks(2, save, tmp_path / "run.pt")[0]
    (found, state), _ = on_ranks(2, by_torch, tmp_path / "run.pt")
    assert torch.equal(found, saved) and list(state) == list(Net().state_dict())
    Net().load_state_dict(torch.load(tmp_path / "run.pt")["model"])


def train_mixed():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    batches = [(image.float(), mask) for image, mask in batches_of(dist.get_rank(), 6)]
    model = shard(Net().float(), mp_policy=policy)
    config = TrainerConfig(device="cpu", progress="none", accumulation_steps=3)
    loss = nn.CrossEntropyLoss(ignore_index=255)
    trainer = Trainer(model, adam(model), loss, batches, batches, config=config)
    history = trainer.fit(4)
    return history["train_loss"], {p.dtype for p in model.parameters()}


def test_a_policy_of_mixed_precision(tmp_path):
    first, second = on_ranks(2, train_mixed)
    assert first == second and first[1] == {torch.float32}
    assert first[0][-1] < first[0][0]


# Files of which each rank writes a part.


def make_saving(folder, steps=None):
    stop = [StopAfter(steps)] if steps else []
    keep = CheckpointCallback(folder, "val_loss", save_top_k=1, every_n_steps=2)
    return make_trainer(shard(Net()), [*stop, keep], sharded_checkpoints=True)


class StopAfter(Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_safepoint(self, trainer, phase):
        if trainer.global_step == self.steps:
            trainer.request_stop("enough")


def write_parts(folder, steps):
    trainer = make_saving(folder, steps)
    trainer.fit(2)
    return vector(trainer.model)


def resume_parts(folder):
    straight, again = make_trainer(shard(Net())), make_saving(folder)
    straight.fit(2)
    path = again.resume(folder)
    where = again.global_step
    while again.epoch < 2:
        again.fit(1)
    is_same = torch.equal(vector(straight.model), vector(again.model))
    return path.name, where, is_same and straight.history == again.history


def named_shards(folder):
    return {load_file(path)["shards"] for path in folder.glob("*.pt")}


def test_ranks_write_their_parts_and_resume_exactly(tmp_path):
    on_ranks(2, write_parts, tmp_path, 7)
    there = {path.name for path in tmp_path.glob("*.shards")}
    assert there == named_shards(tmp_path) and len(there) == 3  # last, previous and best
    assert all(path.stat().st_size < 300_000 for path in tmp_path.glob("*.pt"))
    assert on_ranks(2, resume_parts, tmp_path) == [("last.pt", 8, True)] * 2
    assert {path.name for path in tmp_path.glob("*.shards")} == named_shards(tmp_path)


def test_parts_are_read_by_another_number_of_ranks_and_by_a_plain_model(tmp_path):
    saved = on_ranks(2, write_parts, tmp_path, 5)[0]
    loaded, wanted = load_and_step(tmp_path / "last.pt", False)
    assert torch.equal(loaded, saved)
    for found, after in on_ranks(4, load_and_step, tmp_path / "last.pt", True):
        assert torch.equal(found, saved)
        torch.testing.assert_close(after, wanted, rtol=0, atol=1e-6)


def test_missing_parts_are_noticed_and_the_file_before_is_used(tmp_path):
    on_ranks(2, write_parts, tmp_path, 5)
    folder = tmp_path / load_file(tmp_path / "last.pt")["shards"]
    (part, *_) = sorted(folder.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-10])
    trainer = make_trainer(Net(), loaders=(TRAIN[0], None))
    before = vector(trainer.model)
    with pytest.raises(CheckpointError, match="is missing or cut off"):
        trainer.load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(vector(trainer.model), before) and not trainer.optimizer.state
    with pytest.warns(UserWarning, match="last.pt is left out"):
        assert trainer.resume(tmp_path).name == "previous.pt"
    assert trainer.global_step == 4


def check_first():
    """Rank 1 begins with a batch of nodata, and has no loader to validate."""
    rank = dist.get_rank()
    train = TRAIN[rank][1:] if rank == 1 else TRAIN[rank]
    trainer = make_trainer(shard(Net()), loaders=(train, None if rank else VAL[0]))
    before = vector(trainer.model)
    problems = trainer.check()
    trainer.fit(1)
    return problems, torch.equal(before, vector(trainer.model))


def test_a_check_waits_for_no_rank():
    first, second = on_ranks(2, check_first)
    assert first == second and not first[1]
    assert any(text.startswith("Rank 1: The batch has no label") for text in first[0])


def print_check(build):
    """Both ranks have the same batch, so the gradient is that of one process."""
    trainer = make_trainer(shard(Net()) if build else Net(), loaders=(TRAIN[0], None))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer.check()
    return printed.getvalue()


def test_a_check_finds_the_gradient_of_all_parts():
    wanted = next(line for line in print_check(False).splitlines() if "gradient norm" in line)
    assert wanted in on_ranks(2, print_check, True)[0]
