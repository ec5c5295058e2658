"""What DistributedDataParallel can be combined with: each gives the steps of one process."""

import contextlib
import copy
import functools
import io
import itertools
import warnings
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from processes import on_ranks
from ununennium import Callback, Trainer, TrainerConfig
from ununennium.distributed import Exchange
from ununennium.ranks import find_ranks
from ununennium.training.batches import MicroBatch, set_shares
from ununennium.training.lockstep import Lockstep, next_window
from ununennium.training.precision import LOCAL_RANKS, cuda_device

ACCUMULATION = 2
LOSS = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), ignore_index=255)


def batches_of(rank, count):
    """Batches of unequal sizes with nodata."""
    generator, batches = torch.Generator().manual_seed(rank), []
    for _ in range(count):
        size = int(torch.randint(1, 4, (), generator=generator))
        image = torch.randn(size, 4, 5, 5, generator=generator, dtype=torch.float64)
        mask = image[:, :3].argmax(1)
        mask[torch.rand(mask.shape, generator=generator) < 0.3] = 255
        batches.append((image, mask))
    return batches


def make_loaders():
    """Rank 1: a nodata batch, a window of nodata, a NaN, and a loader that ends early."""
    loaders = [batches_of(rank, count) for rank, count in enumerate((11, 8, 5, 1))]
    for number in (1, 2, 3):
        loaders[1][number][1][:] = 255
    loaders[1][6][0][0, 0, 0, 0] = torch.nan
    return loaders


TRAIN = make_loaders()
VAL = [batches_of(5, 3), batches_of(6, 1), None, None]


class Net(nn.Module):
    """Two layers, and a third one of which the subclasses choose the use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.head = nn.Conv2d(6, 3, 1)
        self.double()

    def middle(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        return self.head(torch.tanh(self.middle(x)))


class Branching(Net):
    """The second layer is used only for inputs whose sum is positive: not for zeros."""

    def middle(self, x):
        x = torch.tanh(self.first(x))
        return self.second(x) if x.sum() > 0 else x


class Checkpointed(Net):
    use_reentrant = False

    def forward(self, x):
        if self.use_reentrant:
            x = x.detach().requires_grad_()
        return self.head(torch.tanh(checkpoint(self.middle, x, use_reentrant=self.use_reentrant)))


class Reentrant(Checkpointed):
    use_reentrant = True


def plain(net, **options):
    return DistributedDataParallel(net, **options)


def hooked(net, hook):
    model = DistributedDataParallel(net)
    model.register_comm_hook(None, hook)
    return model


VARIANTS = {
    "plain": lambda: plain(Net()),
    "static": lambda: plain(Net(), static_graph=True),
    "static, view": lambda: plain(Net(), static_graph=True, gradient_as_bucket_view=True),
    "unused": lambda: plain(Branching(), find_unused_parameters=True),
    "unused, view": lambda: plain(
        Branching(), find_unused_parameters=True, gradient_as_bucket_view=True
    ),
    "checkpoint": lambda: plain(Checkpointed()),
    "checkpoint, static": lambda: plain(Checkpointed(), static_graph=True),
    "reentrant": lambda: plain(Reentrant()),
    "reentrant, static": lambda: plain(Reentrant(), static_graph=True),
    "compiled outside": lambda: torch.compile(plain(Net()), backend="eager"),
    "compiled inside": lambda: plain(torch.compile(Net(), backend="eager")),
    "aot inside": lambda: plain(torch.compile(Net(), backend="aot_eager")),
    "view": lambda: plain(Net(), gradient_as_bucket_view=True),
    "buckets": lambda: plain(Net(), bucket_cap_mb=1e-4),
    "fp16": lambda: hooked(Net(), default_hooks.fp16_compress_hook),
}


class Vectors(Callback):
    """Keeps the parameters after each step."""

    def __init__(self):
        self.kept = []

    def on_safepoint(self, trainer, phase):
        if phase == "train":
            self.kept.append(vector(trainer.model))


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def sharded(model):
    """An optimizer that keeps its state in parts, one on each rank."""
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.5)


def make_trainer(
    model, callbacks=(), optimizer=None, metrics=None, rank=None, accumulation=2, loader=None
):
    rank = dist.get_rank() if rank is None else rank
    config = TrainerConfig(
        device="cpu", progress="none", accumulation_steps=accumulation, gradient_clip=0
    )
    loaders = loader or TRAIN[rank], VAL[rank]
    rest = {"callbacks": callbacks, "config": config, "metrics": metrics}
    return Trainer(model, optimizer or sgd(model), LOSS, *loaders, **rest)


def train_ranks(name):
    vectors = Vectors()
    trainer = make_trainer(VARIANTS[name](), [vectors])
    return dict(trainer.fit(2)), vectors.kept


def each(function, cases, *details):
    """Call a function for each case, in the processes of one group; name the case that fails."""
    results = {}
    for case in cases:
        try:
            results[case] = function(case, *details)
        except Exception as error:
            error.add_note(f"This is {case}.")
            raise
    return results


@functools.cache
def all_variants():
    return on_ranks(2, each, train_ranks, list(VARIANTS))


def weight_of(mask):
    return LOSS.weight[mask[mask != 255]].sum().item()


def train_by_hand(model, epochs=2, size=2):
    """One process takes the windows of all ranks together."""
    vectors = []
    optimizer = sgd(model)
    for _ in range(epochs):
        for start in range(0, 11, ACCUMULATION):
            window = [pair for each in TRAIN[:size] for pair in each[start : start + ACCUMULATION]]
            total = sum(weight_of(mask) for _, mask in window)
            model.zero_grad()
            for image, mask in window:
                if weight_of(mask):
                    (LOSS(model(image), mask) * weight_of(mask) / total).backward()
            if all(p.grad.isfinite().all() for p in model.parameters()):
                optimizer.step()
            vectors.append(vector(model))
    return vectors


class Reduced(torch.autograd.Function):
    """The sum over ranks, forward and backward."""

    @staticmethod
    def forward(ctx, value):
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class HostSyncBatchNorm(nn.BatchNorm2d):
    """PyTorch's own refuses the CPU; a batch of no samples takes part with a count of zero."""

    process_group = None

    def forward(self, x):
        if not self.training:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        assert x.shape[0] or not x.numel()
        count = torch.full_like(self.running_mean, x.numel() // x.shape[1])
        sums = Reduced.apply(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count]))
        mean, n = sums[0] / sums[2], sums[2].detach()
        var = sums[1] / sums[2] - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * n / (n - 1), 0.1)
            self.num_batches_tracked += 1
        x = (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class Normed(Net):
    norm = nn.BatchNorm2d

    def __init__(self):
        super().__init__()
        self.second = nn.Sequential(self.second, self.norm(6)).double()


class SyncNormed(Normed):
    norm = HostSyncBatchNorm


def train_norm_by_hand():
    """The batches that ranks take at the same time go through the model together."""
    model, vectors = Normed(), []
    optimizer = sgd(model)
    for _ in range(2):
        for start in range(0, 11, ACCUMULATION):
            windows = [each[start : start + ACCUMULATION] for each in TRAIN[:2]]
            used = [[pair for pair in window if weight_of(pair[1])] for window in windows]
            total = sum(weight_of(mask) for window in used for _, mask in window)
            model.zero_grad()
            before = copy.deepcopy(model.state_dict())
            for together in itertools.zip_longest(*used):
                image, mask = (
                    torch.cat(part) for part in zip(*filter(None, together), strict=True)
                )
                (LOSS(model(image), mask) * weight_of(mask) / total).backward()
            if all(p.grad.isfinite().all() for p in model.parameters()):
                optimizer.step()
            else:
                model.load_state_dict(before)
            vectors.append(vector(model))
    return vectors, model.state_dict()


NORMS = {
    "plain": {},
    "static": {"static_graph": True},
    "apart": {"broadcast_buffers": False},
    "unused": {"find_unused_parameters": True},
}


def train_norm(case):
    """Ranks may change their roles: the one with idle windows is then the one that is saved."""
    (name, swap), vectors, model = case, Vectors(), SyncNormed()
    rank = 1 - dist.get_rank() if swap else dist.get_rank()
    trainer = make_trainer(plain(model, **NORMS[name]), [vectors], rank=rank)
    return dict(trainer.fit(2)), vectors.kept, model.state_dict()


def refused_on_the_host():
    norm = nn.SyncBatchNorm(2)
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        norm(torch.randn(3, 2))
    with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
        plain(norm)
    return True


# The steps are those of one process.

NETS = {"unused": Branching, "unused, view": Branching}
HALF = {"fp16": 1e-3}


@functools.cache
def by_hand(net, size=2):
    return train_by_hand(net(), size=size)


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_take_the_steps_of_one_process(name):
    wanted = by_hand(NETS.get(name, Net))
    results = [result[name] for result in all_variants()]
    for _, vectors in results:
        for own, other in zip(vectors, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=HALF.get(name, 1e-10))
    assert repr(results[0][0]) == repr(results[1][0])
    assert results[0][0]["train_skipped_steps"] == [1.0, 1.0]


def test_four_ranks_of_which_two_do_not_validate():
    names = ["plain", "static", "unused", "buckets"]
    results = on_ranks(4, each, train_ranks, names)
    for name, result in itertools.product(names, results):
        for own, other in zip(result[name][1], by_hand(NETS.get(name, Net), 4), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-10)
        assert repr(result[name][0]) == repr(results[0][name][0])


@functools.cache
def all_norms():
    cases = list(itertools.product(NORMS, (False, True)))
    return train_norm_by_hand(), on_ranks(2, each, train_norm, cases)


@pytest.mark.parametrize("case", list(itertools.product(NORMS, (False, True))))
def test_a_synchronised_norm_sees_what_ranks_take_at_the_same_time(case):
    (wanted, state), results = all_norms()
    results = [result[case] for result in results]
    for _, vectors, own_state in results:
        for own, other in zip(vectors, wanted, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-10)
        torch.testing.assert_close(own_state, state, rtol=0, atol=1e-10)
    assert repr(results[0][0]) == repr(results[1][0])


def test_pytorch_refuses_its_own_on_the_host():
    assert on_ranks(2, refused_on_the_host) == [True, True]


# Wrapped, compiled, saved and resumed.


def wrapped_late():
    """An optimizer that was built before the model was wrapped, or from what is inside."""
    finals = []
    for early in (True, False):
        net, vectors = Net(), Vectors()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5) if early else None
        model = plain(net)
        trainer = make_trainer(model, [vectors], optimizer=optimizer or sgd(model.module))
        trainer.fit(2)
        finals.append(vectors.kept[-1])
    return finals


def test_the_optimizer_may_be_built_before_or_from_what_is_inside():
    for finals in on_ranks(2, wrapped_late):
        for final in finals:
            torch.testing.assert_close(final, by_hand(Net)[-1], rtol=0, atol=1e-10)


def check_then_train(name):
    """Rank 1 begins with a batch of nodata, and rank 2 has no loader to validate."""
    loader, vectors = copy.deepcopy(TRAIN[dist.get_rank()]), Vectors()
    loader[0], loader[1] = loader[1], loader[0]
    trainer = make_trainer(VARIANTS[name](), [vectors], loader=loader)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        problems = trainer.check()
    trainer.fit(2)
    return vectors.kept[-1], printed.getvalue(), problems


@pytest.mark.parametrize("name", ["plain", "static"])
def test_a_check_exchanges_no_gradient_and_only_rank_0_prints(name):
    lasts, printed, problems = zip(*on_ranks(3, check_then_train, name), strict=True)
    for last in lasts:
        torch.testing.assert_close(last, by_hand(Net, 3)[-1], rtol=0, atol=1e-10)
    assert "val_IoU" in printed[0] and printed[1:] == ("", "")
    assert problems[0] == problems[1] == problems[2]
    assert any(text.startswith("Rank 1: The batch has no label") for text in problems[0])


class Unfreeze(Callback):
    """Trains the head in the second epoch only."""

    def on_epoch_start(self, trainer, epoch):
        trainer.model.module.head.requires_grad_(epoch > 0)


def unfreeze(is_frozen_first):
    net, vectors = Net(), Vectors()
    net.head.requires_grad_(not is_frozen_first)
    model = plain(net, find_unused_parameters=True)
    net.head.requires_grad_(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(model, [Unfreeze(), vectors]).fit(2)
    texts = [text for each in caught if "the same model" in (text := str(each.message))]
    return texts, vectors.kept[-1]


def test_a_layer_that_is_frozen_before_the_model_is_wrapped_is_named():
    (first, one), (second, two) = on_ranks(2, unfreeze, True)
    assert len(first) == 1 and "head.weight differs between them" in first[0] and not second
    assert not torch.allclose(one, two)


def test_a_layer_that_is_frozen_afterwards_is_trained_alike():
    (first, one), (_, two) = on_ranks(2, unfreeze, False)
    assert not first and torch.equal(one, two)


class Outer(nn.Module):
    """A module of your own around the wrapped one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Stop(Callback):
    def __init__(self, number):
        self.number = number

    def on_safepoint(self, trainer, phase):
        self.number -= phase == "train"
        if self.number == 0:
            trainer.request_stop("enough")


RESUMED = {
    "compiled outside": VARIANTS["compiled outside"],
    "compiled inside": VARIANTS["compiled inside"],
    "static": VARIANTS["static"],
    "outer": lambda: Outer(plain(Net())),
    "norm": lambda: plain(Normed()),
    "norm, apart": lambda: plain(Normed(), broadcast_buffers=False),
    "sharded": lambda: plain(Net()),
}


def save_and_resume(name, folder):
    build = sharded if name == "sharded" else sgd
    make = lambda *callbacks: make_trainer(
        model := RESUMED[name](), callbacks, optimizer=build(model)
    )
    path, vectors = f"{folder}/{name}.pt", Vectors()
    straight = make(vectors)
    straight.fit(2)
    first = make(Stop(3))
    first.fit(2)
    first.save_checkpoint(path)
    second = make()
    second.load_checkpoint(path)
    assert second.global_step == 3
    second.fit(1)
    second.fit(1)
    return {
        "names": list(torch.load(path, weights_only=True)["model"]),
        "last": vectors.kept[-1],
        "resumed": vector(second.model),
        "straight": straight.history,
        "history": second.history,
        "state": {k: v for k, v in second.model.state_dict().items()},
    }


@pytest.fixture(scope="module")
def all_resumed(tmp_path_factory):
    return on_ranks(2, each, save_and_resume, list(RESUMED), str(tmp_path_factory.mktemp("files")))


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_saved_under_bare_names_and_resumed(name, all_resumed):
    results = [result[name] for result in all_resumed]
    norm = name.startswith("norm")
    names = list(Normed().state_dict() if norm else Net().state_dict())
    names = [f"inner.{each}" for each in names] if name == "outer" else names
    for result in results:
        assert result["names"] == names
        if name == "static":  # DDP adds up its first window in another order; see the chapter
            torch.testing.assert_close(result["resumed"], result["last"], rtol=0, atol=1e-14)
        else:
            assert torch.equal(result["resumed"], result["last"])
            assert result["history"] == result["straight"]
        torch.testing.assert_close(result["state"], results[0]["state"], rtol=0, atol=0)
        if not norm:
            torch.testing.assert_close(result["last"], by_hand(Net)[-1], rtol=0, atol=1e-10)


def parts_outside():
    """Models of which a part would differ between ranks."""
    head, learnt, found = nn.Conv2d(3, 3, 1).double(), nn.Parameter(torch.ones(1)), []
    for model, extra in [
        (nn.Sequential(plain(Net()), head), []),
        (plain(Net()), [learnt]),
        (nn.Sequential(plain(Net()), plain(head)), []),
    ]:
        optimizer = torch.optim.SGD([*model.parameters(), *extra], lr=0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(model, optimizer=optimizer)
        found.append([str(each.message) for each in caught])
    return found


def test_rank_0_warns_of_parameters_that_are_not_exchanged():
    first, second = on_ranks(2, parts_outside)
    assert second == [[], [], []] and first[2] == []
    assert "2 of the trained parameters, the first of shape (3, 3, 1, 1), are" in first[0][0]
    assert "1 of the trained parameters, the first of shape (1,), are outside" in first[1][0]


# Where a process computes.


@pytest.mark.parametrize(
    ("count", "variables", "wanted"),
    [
        (4, {"LOCAL_RANK": "3"}, 3),
        (1, {"LOCAL_RANK": "3"}, 0),  # each process sees only its own GPU
        (4, {"SLURM_LOCALID": "2"}, 2),
        (4, {"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 1),  # torchrun, started by SLURM
        (4, {"OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1),
        (4, {"MV2_COMM_WORLD_LOCAL_RANK": "1"}, 1),
        (4, {}, 0),
    ],
)
def test_a_process_takes_the_gpu_of_its_number(count, variables, wanted, monkeypatch):
    for name in LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert cuda_device(None) == torch.device("cuda", wanted)


def placed():
    config = TrainerConfig(device="cuda", progress="none")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = torch.compile(plain(Net()), backend="eager")
        trainer = Trainer(model, sgd(model), LOSS, TRAIN[0], config=config)
    return trainer.device.type, [str(each.message) for each in caught if "GPU" in str(each.message)]


def test_a_wrapped_model_says_where_to_compute():
    assert on_ranks(2, placed) == [("cpu", [])] * 2


# Buffers that ranks do not share.


def validate_apart():
    trainer = make_trainer(plain(Normed(), broadcast_buffers=False))
    trainer.fit(1)
    scores = trainer.history
    return scores, dict(trainer.model.module.named_buffers())


def test_ranks_that_do_not_share_buffers_validate_the_same_model():
    (history, buffers), (other_history, other_buffers) = on_ranks(2, validate_apart)
    assert history == other_history
    torch.testing.assert_close(buffers, other_buffers, rtol=0, atol=0)


# Weights, and metrics that ranks cannot merge.


@dataclass
class Epoch:
    """Windows of batches with these weights, tensors as they are on a device."""

    weights: list
    window: list = field(default_factory=list)
    example: object = None

    def read_window(self):
        if not self.window and self.weights:
            image, mask = torch.ones(1, 1), torch.zeros(1)
            weights = self.weights.pop(0)
            self.window = [MicroBatch(None, image, mask, w, n) for n, w in enumerate(weights)]
            set_shares(self.window)
        return self.window


def weights_on_a_device(weights):
    ranks = find_ranks()
    lockstep, seen = Lockstep(ranks), []
    epoch = Epoch([[torch.tensor(w) for w in window] for window in weights[ranks.rank]])
    while window := next_window(lockstep, epoch):
        seen.append([(not b.is_empty and b.share, b.is_idle) for b in window])
        epoch.window = []
    return seen


def test_weights_on_a_device_are_compared_as_numbers():
    windows = [[[3.0, 0.0], [0.0]], [[1.0]]]
    first, second = on_ranks(2, weights_on_a_device, windows)
    assert first == [[(1.5, False), (False, False)], [(False, False)]]
    assert second == [[(0.5, False)], [(False, False)]]  # the last one is made up: no step


class Plain:
    """A metric without `merge_state`."""

    def update(self, output, target):
        pass

    def compute(self):
        return 1.0

    reset = compute


def score(kind):
    metrics = {
        "plain": lambda: {"plain": Plain()},
        "accuracy": lambda: {"accuracy": accuracy()},
        "collection": lambda: {"all": torchmetrics.MetricCollection({"accuracy": accuracy()})},
    }[kind]()
    try:
        trainer = make_trainer(plain(Net()), metrics=metrics)
    except TypeError as error:
        return str(error)
    return [trainer.fit(1)["val_accuracy"][-1], vector(trainer.model)]


def accuracy():
    return torchmetrics.classification.MulticlassAccuracy(
        num_classes=3, ignore_index=255, average="micro"
    )


@pytest.mark.parametrize("kind", ["accuracy", "collection"])
def test_torchmetrics_score_all_ranks(kind):
    results, net, metric = on_ranks(2, score, kind), Net(), accuracy()
    nn.utils.vector_to_parameters(results[0][1], net.parameters())
    for image, mask in [*VAL[0], *VAL[1]]:
        metric.update(net(image), mask)
    assert results[0][0] == results[1][0] == pytest.approx(metric.compute().item())


def score_lists():
    """Rank 1 has nothing to validate; the metrics of rank 0 keep lists of predictions."""
    curve = torchmetrics.classification.MulticlassAUROC(3, thresholds=None, ignore_index=255)
    both = torchmetrics.MetricCollection({"curve": curve, "accuracy": accuracy()})
    model, val = plain(Net()), None if dist.get_rank() else VAL[0]
    config = TrainerConfig(device="cpu", progress="none")
    metrics = {"curve": curve.clone(), "both": both}
    trainer = Trainer(model, sgd(model), LOSS, TRAIN[0], val, metrics=metrics, config=config)
    return trainer.fit(1), vector(model)


def test_a_rank_without_a_batch_leaves_the_curves_of_torchmetrics_to_the_others():
    results, net = on_ranks(2, score_lists), Net()
    nn.utils.vector_to_parameters(results[0][1], net.parameters())
    curve = torchmetrics.classification.MulticlassAUROC(3, thresholds=None, ignore_index=255)
    for image, mask in VAL[0]:
        curve.update(net(image).float(), mask)
    for history, _ in results:
        assert history["val_curve"] == [pytest.approx(curve.compute().item())]
        assert history["val_both_curve"] == history["val_curve"]


def test_a_metric_that_ranks_cannot_merge_is_refused():
    for message in on_ranks(2, score, "plain"):
        assert "metrics['plain']" in message and "has no merge_state" in message


# How much is exchanged.


class Counter(Callback):
    """Counts the collectives of a group, those of DDP included, between safepoints.

    A group numbers its collectives itself, whoever starts them.
    """

    def __init__(self, model):
        self.model, self.buckets, self.kept = Exchange(model).ddps[0], 0, []
        self.model.register_comm_hook(self, Counter.count_bucket)

    @staticmethod
    def count_bucket(self, bucket):
        self.buckets += 1
        return default_hooks.allreduce_hook(None, bucket)

    def read(self):
        groups = find_ranks().group, dist.group.WORLD
        return [self.buckets, *(group._get_sequence_number_for_group() for group in groups)]

    def note(self, name):
        self.kept.append((name, self.read()))

    def on_safepoint(self, trainer, phase):
        self.note(phase)

    def on_epoch_start(self, trainer, epoch):
        self.note("epoch starts")

    def on_epoch_end(self, trainer, epoch, scores):
        self.note("epoch ends")

    def differences(self):
        """Return what happened, and since the line before: buckets, notes, all in the group."""
        pairs = itertools.pairwise(self.kept)
        return [(name, *(b - a for a, b in zip(x, y, strict=True))) for (_, x), (name, y) in pairs]


COUNTS = list(itertools.product((1, 3), (25, 1e-4), ("Net", "Normed"), (False, True)))


def count(case):
    accumulation, bucket_mb, net, static = case
    model = plain(globals()[net](), bucket_cap_mb=bucket_mb, static_graph=static)
    counter, loader = Counter(model), BATCHES[dist.get_rank()]
    trainer = make_trainer(model, [counter], accumulation=accumulation, loader=loader)
    trainer.fit(3)
    return counter.differences()


@functools.cache
def all_counts():
    return on_ranks(2, each, count, COUNTS)


BATCHES = [batches_of(rank, 12) for rank in (0, 1)]


@pytest.mark.parametrize("case", COUNTS)
def test_exchanges_are_as_many_whatever_is_accumulated(case):
    """A step: each bucket once, the buffers once for each dtype, one note."""
    accumulation, bucket_mb, net, _ = case
    first, second = (result[case] for result in all_counts())
    assert first == second
    steps, start = 12 // accumulation, [name for name, *_ in first].index("epoch starts")
    epoch, third = first[start + 1 :][: steps + 5], first[start + 1 :][steps + 6 :]
    assert epoch == third  # nothing grows, and nothing is exchanged in the first epoch only
    buckets, dtypes = (1 if bucket_mb == 25 else epoch[0][1]), (2 if net == "Normed" else 0)
    assert buckets > 1 or bucket_mb == 25
    assert epoch[:steps] == [("train", buckets, 1, buckets + dtypes)] * steps
    assert epoch[steps:] == [
        ("validate", 0, 8, dtypes),  # a note, sums, norms of the parameters; shared buffers
        ("validate", 0, 1, 0),
        ("validate", 0, 1, 0),
        ("validate", 0, 1, 0),  # rank 1 has one batch, rank 0 three
        ("epoch ends", 0, 9, 0),
    ]
    assert [names[0] for names in first].count("epoch starts") == 2
