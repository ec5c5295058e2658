"""Predictions are those of a loop by hand, in the loader's order, and leave no trace."""

import functools
import subprocess
import sys
import warnings
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tqdm.auto
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from device import on_device
from processes import on_ranks
from small import NamedOutput, make_batches, make_trainer, same_state, small_net
from ununennium import (
    Callback,
    MaskedLoss,
    Trainer,
    TrainerConfig,
    predict,
)  # fmt: skip
from ununennium.training.messages import TrainingWarning

CPU = TrainerConfig(device="cpu", progress="none")
CHIPS = torch.randn(11, 4, 8, 8, generator=torch.Generator().manual_seed(1))
LOADER = DataLoader(TensorDataset(CHIPS), batch_size=4)


def by_hand(model, chips=CHIPS, size=4):
    """Predict as one would write it."""
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(chips[i : i + size]) for i in range(0, len(chips), size)])
    model.train()
    return outputs


def test_every_output_is_that_of_a_loop_by_hand():
    trainer = make_trainer()
    trainer.fit(1)
    outputs = by_hand(trainer.model)
    assert np.array_equal(trainer.predict(LOADER, "raw"), outputs.numpy())
    assert np.array_equal(trainer.predict(LOADER, "probabilities"), outputs.softmax(1).numpy())
    classes = trainer.predict(LOADER)
    assert classes.dtype == np.uint8 and np.array_equal(classes, outputs.argmax(1).numpy())
    assert np.array_equal(predict(trainer.model, LOADER, config=CPU), classes)


def test_a_prediction_between_two_fits_changes_nothing():
    plain, trainer = make_trainer(), make_trainer()
    plain.fit(2)
    trainer.model[1].eval()
    trainer.fit(1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    modes = [module.training for module in trainer.model.modules()]
    state = torch.get_rng_state()
    trainer.predict(LOADER)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert modes == [module.training for module in trainer.model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_a_run_may_predict_at_every_epoch():
    class Look(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            trainer.predict(LOADER)

    plain, looking = make_trainer(), make_trainer(callbacks=[Look()])
    assert looking.fit(2) == plain.fit(2)
    assert same_state(plain, looking)


BATCHES = {
    "input": lambda x: x,
    "list of one": lambda x: [x],
    "pair": lambda x: (x, torch.zeros(len(x))),
    "dictionary": lambda x: {"image": x, "transform": [1, 2]},
    "object": lambda x: SimpleNamespace(images=x, boxes=None),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_need_not_have_a_target(kind):
    model = small_net()
    loader = [BATCHES[kind](CHIPS[:6]), BATCHES[kind](CHIPS[6:])]
    expected = by_hand(model).argmax(1).numpy()
    assert np.array_equal(predict(model, loader, config=CPU), expected)
    assert np.array_equal(predict(model, iter(loader), config=CPU), expected)  # of no length


class Sum(nn.Module):
    """A model of several inputs, in a container."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, parts):
        return self.net(sum(parts.values() if isinstance(parts, dict) else parts))


Dates = namedtuple("Dates", "early late")
CONTAINERS = {
    "dictionary without an image": lambda *parts: dict(zip("abc", parts, strict=False)),
    "three": lambda *parts: parts,
    "named pair": lambda early, late, more: Dates(early + more, late),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_is_no_pair_goes_to_the_model_as_it_is(kind):
    model = Sum()
    batch = CONTAINERS[kind](CHIPS, 2 * CHIPS, CHIPS - 1)
    expected = by_hand(model.net, 4 * CHIPS - 1, 11)
    assert np.allclose(predict(model, [batch], "raw", config=CPU), expected, atol=1e-5)


def test_many_batches_of_an_unknown_number_are_in_order():
    parts = (torch.full((3, 1, 2, 2), float(number)) for number in range(100))
    found = predict(nn.Identity(), parts, "raw", config=CPU)
    assert found.shape == (300, 2, 2) and found[:, 0, 0].tolist() == [n // 3 for n in range(300)]


def test_what_is_predicted_follows_the_loss():
    one, three = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 3, 1)

    def make(model, loss):
        return Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loss, LOADER, config=CPU)

    logits = by_hand(one)[:, 0]
    binary = make(one, nn.BCEWithLogitsLoss())
    assert np.array_equal(binary.predict(LOADER), (logits > 0).numpy())
    assert np.allclose(binary.predict(LOADER, "probabilities"), logits.sigmoid())
    masked = make(one, MaskedLoss(nn.L1Loss(reduction="none")))
    assert np.array_equal(masked.predict(LOADER), logits.numpy())
    labels = make(three, nn.BCEWithLogitsLoss()).predict(LOADER)
    assert labels.shape == (11, 3, 8, 8) and np.array_equal(labels, (by_hand(three) > 0).numpy())
    own = lambda output, target: output.mean()
    assert make(three, own).predict(LOADER).shape == (11, 8, 8)
    with pytest.raises(ValueError, match="Pass output='classes' for a logit, or output='raw'"):
        make(one, own).predict(LOADER)
    assert make(one, own).predict(LOADER, "raw").dtype == np.float32


@pytest.mark.parametrize("classes", [3, 256, 257])
def test_classes_take_as_little_memory_as_they_can(classes):
    found = predict(nn.Conv2d(4, classes, 1), LOADER, config=CPU)
    assert found.dtype == (np.uint8 if classes <= 256 else np.int32)


@pytest.mark.parametrize("has_channel", [True, False])
def test_one_number_per_sample_has_no_channel(has_channel):
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 1))
    model = model if has_channel else nn.Sequential(*model, nn.Flatten(0))
    expected = by_hand(model).flatten().numpy()
    assert np.array_equal(predict(model, LOADER, "raw", config=CPU), expected)
    assert np.array_equal(predict(model, LOADER, "classes", config=CPU), expected > 0)


def test_labels_that_do_not_exclude_each_other_are_predicted_without_a_trainer():
    model = small_net()
    outputs = by_hand(model)
    found = predict(model, LOADER, is_multilabel=True, config=CPU)
    assert found.dtype == np.uint8 and np.array_equal(found, outputs.numpy() > 0)
    shares = predict(model, LOADER, "probabilities", is_multilabel=True, config=CPU)
    assert np.array_equal(shares, outputs.sigmoid().numpy())


def test_outputs_in_half_precision_become_float32_and_are_not_taken_for_infinite():
    model = nn.Sequential(nn.Conv2d(4, 3, 1)).half()
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, 60_000.0)  # whose sum overflows in float16
    chips = [CHIPS.half()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = predict(model, chips, "raw", config=CPU)
        rounded = predict(model.bfloat16(), [CHIPS.bfloat16()], "raw", config=CPU)
    assert found.dtype == rounded.dtype == np.float32 and (found == 60_000).all()


def test_a_prediction_is_in_the_precision_that_is_asked_for():
    model = small_net(norm=False)
    config = TrainerConfig(device="cpu", amp_dtype="bfloat16", progress="none")
    with torch.autocast("cpu", torch.bfloat16):
        expected = by_hand(model).float().numpy()
    assert np.array_equal(predict(model, LOADER, "raw", config=config), expected)
    assert not np.array_equal(predict(model, LOADER, "raw", config=CPU), expected)


@pytest.mark.parametrize(
    ("progress", "is_shown"), [("bar", True), ("dashboard", True), ("auto", False), ("none", False)]
)
def test_a_bar_counts_the_batches_where_one_is_wanted(progress, is_shown, capsys, monkeypatch):
    monkeypatch.setattr(tqdm.auto, "tqdm", functools.partial(tqdm.auto.tqdm, mininterval=0))
    predict(small_net(), LOADER, config=TrainerConfig(device="cpu", progress=progress))
    shown = capsys.readouterr().err
    assert ("predict" in shown) == ("3/3" in shown) == is_shown


def test_the_result_goes_where_it_is_told(tmp_path):
    model = small_net()
    out = np.lib.format.open_memmap(tmp_path / "p.npy", "w+", "float32", (12, 3, 8, 8))
    result = predict(model, LOADER, "raw", out=out, config=CPU)
    assert result.base is not None and np.shares_memory(result, out) and len(result) == 11
    assert np.array_equal(np.load(tmp_path / "p.npy")[:11], by_hand(model).numpy())
    tensor = torch.zeros(11, 8, 8, dtype=torch.long)
    predict(model, LOADER, out=tensor, config=CPU)
    assert torch.equal(tensor, by_hand(model).argmax(1))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((5, 8, 8)), "room for 5 samples"),
        (np.zeros((11, 4, 4)), r"shape \(4, 4\), and a prediction has the shape \(8, 8\)"),
        (np.zeros((11, 8, 8), bool), "cannot hold predictions of type uint8"),
    ],
)
def test_an_array_that_does_not_fit_is_told(out, message):
    with pytest.raises((ValueError, TypeError), match=message):
        predict(small_net(), LOADER, out=out, config=CPU)


def test_chips_of_several_sizes_become_a_list():
    model = small_net()
    loader = [CHIPS[:2], CHIPS[2:3, :, :4], CHIPS[3:5]]
    found = predict(model, loader, config=CPU)
    assert [chip.shape for chip in found] == [(8, 8), (8, 8), (4, 8), (8, 8), (8, 8)]
    assert np.array_equal(found[2], by_hand(model, CHIPS[2:3, :, :4]).argmax(1)[0].numpy())


def test_own_batches_and_models_with_several_inputs():
    class Dated(Trainer):
        def unpack(self, batch):
            return (batch["bands"], batch["day"]), batch.get("mask")

        def run_model(self, inputs):
            bands, day = inputs
            return self.model(bands) + day.view(-1, 1, 1, 1)

    model = small_net()
    batch = {"bands": CHIPS, "day": torch.arange(11.0)}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Dated(model, optimizer, nn.CrossEntropyLoss(), [batch], config=CPU)
    expected = by_hand(model, size=11) + batch["day"].view(-1, 1, 1, 1)
    assert np.array_equal(trainer.predict([batch], "raw"), expected.numpy())
    with pytest.raises(KeyError) as caught:
        trainer.predict([{"bands": CHIPS}])
    assert "let unpack return (inputs, None)" in str(caught.value)


def test_an_overridden_predict_is_still_the_hook():
    class Old(Trainer):
        def predict(self, inputs):
            return super().predict(inputs) + 1

    model = small_net()
    with pytest.warns(TrainingWarning, match="Old.predict.inputs. is taken for the method"):
        trainer = Old(
            model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(ignore_index=255),
            make_batches(2), config=CPU,
        )  # fmt: skip
    expected = by_hand(model) + 1
    assert np.array_equal(trainer.predict(LOADER, "raw"), expected.numpy())
    assert trainer.fit(1)["train_loss"][0] > 0


def test_an_overridden_predict_of_a_loader_is_not():
    class New(Trainer):
        def predict(self, loader, output=None, *, out=None):
            return super().predict(loader, output, out=out) + 1

    model = small_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = New(
            model, torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss(), LOADER,
            config=CPU,
        )  # fmt: skip
    assert np.array_equal(trainer.predict(LOADER), by_hand(model).argmax(1).numpy() + 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [(CHIPS, "DataLoader.TensorDataset.images."), (CHIPS.numpy(), "got an array")],
)
def test_an_array_is_no_loader(data, message):
    with pytest.raises(TypeError, match=message):
        predict(small_net(), data, config=CPU)


def test_an_unknown_output_and_a_shuffling_loader_are_told():
    with pytest.raises(ValueError, match="output='labels' is not known"):
        predict(small_net(), LOADER, "labels", config=CPU)
    with pytest.warns(TrainingWarning, match="The loader shuffles"):
        predict(small_net(), DataLoader(TensorDataset(CHIPS), shuffle=True), config=CPU)
    assert len(predict(small_net(), [], config=CPU)) == 0


def test_an_interrupt_leaves_the_model_as_it_was():
    class Stop(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 2:
                raise KeyboardInterrupt
            return CHIPS[index]

    model = small_net()
    with pytest.raises(KeyboardInterrupt):
        predict(model, DataLoader(Stop()), config=CPU)
    assert model.training and torch.is_grad_enabled()


def predicted_there(device):
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Dropout(0.5))
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, 0.1 * number + 0.5)
    return predict(model, LOADER, "raw", config=TrainerConfig(device=device, progress="none"))


def test_on_a_device_predictions_are_the_same():
    assert np.allclose(on_device(predicted_there, "gpu"), predicted_there("cpu"))


# What is not said must not be wrong.


def make(model, loss, loader=LOADER, **settings):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = TrainerConfig(device="cpu", progress="none", **settings)
    return Trainer(model, optimizer, loss, loader, config=config)


def test_a_model_that_ends_with_a_sigmoid_is_taken_at_its_word():
    model = nn.Sequential(nn.Conv2d(4, 1, 1), nn.Sigmoid())
    shares = by_hand(model)[:, 0].numpy()
    losses = nn.BCELoss(), MaskedLoss(nn.BCELoss(reduction="none")), F.binary_cross_entropy
    for loss in (*losses, functools.partial(F.binary_cross_entropy, reduction="mean")):
        trainer = make(model, loss)
        assert np.array_equal(trainer.predict(LOADER, "probabilities"), shares)
        assert np.array_equal(trainer.predict(LOADER), shares > 0.5)
    assert 0 < (shares > 0.5).mean() < 1


def test_probabilities_of_several_labels_do_not_sum_to_one():
    """The loss says what the channels mean, also where you say what you want."""
    model = nn.Conv2d(4, 3, 1)
    trainer = make(model, nn.BCEWithLogitsLoss())
    expected = by_hand(model).sigmoid().numpy()
    assert np.array_equal(trainer.predict(LOADER, "probabilities"), expected)
    assert np.array_equal(trainer.predict(LOADER, "classes"), by_hand(model).numpy() > 0)


@pytest.mark.parametrize("output", ["classes", "probabilities"])
def test_a_regression_has_no_classes(output):
    with pytest.raises(
        ValueError, match=f"output='{output}' needs scores of classes, and the loss"
    ):
        make(nn.Conv2d(4, 1, 1), nn.L1Loss()).predict(LOADER, output)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_prediction_over_the_loader_of_the_run_does_not_change_its_order(workers):
    """Its generator is that of the next epoch."""

    def run():
        generator, data = (
            torch.Generator().manual_seed(3),
            TensorDataset(CHIPS, CHIPS[:, :3].argmax(1)),
        )
        loader = DataLoader(data, 2, shuffle=True, generator=generator, num_workers=workers)
        return make(small_net(), nn.CrossEntropyLoss(), loader)

    plain, looking = run(), run()
    for trainer in (plain, looking):
        trainer.fit(1)
    with pytest.warns(TrainingWarning, match="shuffles"):
        looking.predict(looking.train_loader)
    assert plain.fit(1) == looking.fit(1) and same_state(plain, looking)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("output", ["classes", "raw"])
def test_a_prediction_from_nothing_is_told_with_its_row(value, output):
    chips = CHIPS.clone()
    chips[(3, 9), 0, 0, 0] = value
    loader = DataLoader(TensorDataset(chips), batch_size=4)
    with pytest.warns(
        TrainingWarning, match=r"output for 2 samples is not finite.*: row 3, 9\. Look"
    ):
        found = predict(small_net(norm=False), loader, output, config=CPU)
    assert len(found) == 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(small_net(), LOADER, config=CPU)


@pytest.mark.parametrize(("count", "rows"), [(5, "0, 1, 2, 3, 4. Look"), (6, "3, 4 and 1 more. L")])
def test_only_some_of_many_rows_are_named(count, rows):
    chips = CHIPS.clone()
    chips[:count] = float("nan")
    with pytest.warns(TrainingWarning, match=rf"output for {count} samples .*{rows}"):
        predict(small_net(norm=False), [chips], config=CPU)


def test_an_output_without_samples_is_refused():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    with pytest.raises(TypeError, match="returned a Tensor, which is no prediction per sample"):
        predict(Mean(), LOADER, config=CPU)


def test_an_error_names_its_batch():
    loader = [CHIPS[:4], {"image": CHIPS[4:, :3], "filename": [f"{n}.tif" for n in range(7)]}]
    with pytest.raises(
        ValueError, match="The image has 3 channels and the model takes 4"
    ) as caught:
        predict(small_net(), loader, config=CPU)
    where = "This is batch index 1 of the loader (filename 0.tif, 1.tif, 2.tif, 3.tif, 4.tif and"
    assert where in str(caught.value)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (TensorDataset(CHIPS), "loader is a data set, TensorDataset, which gives samples"),
        ({"image": CHIPS}, r"got a dict\. .* for a single batch \[batch\]"),
        (None, "loader is of type NoneType, which gives no batches"),
    ],
)
def test_what_is_no_loader_is_told(loader, message):
    with pytest.raises(TypeError, match=message):
        predict(small_net(), loader, config=CPU)


def test_a_dictionary_without_a_prediction_is_told():
    with pytest.raises(
        ValueError, match=r"without 'out'.*\n.*override Trainer.run_model to return"
    ):
        predict(NamedOutput(), LOADER, config=CPU)


def test_an_old_hook_may_take_several_inputs():
    class Old(Trainer):
        def predict(self, inputs):
            return super().predict(inputs[0] + inputs[1])

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, parts):
            return self.net(parts[0] + parts[1])

    class Passing(Trainer):
        def predict(self, inputs):
            return super().predict(inputs)  # a tuple, which is no loader

    pairs, found = [((CHIPS, CHIPS), CHIPS[:, :3].argmax(1))], []
    for kind, model in ((Old, small_net()), (Passing, Sums())):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with pytest.warns(TrainingWarning, match="is taken for the method"):
            trainer = kind(model, optimizer, nn.CrossEntropyLoss(), pairs, config=CPU)
        found.append(trainer.predict(pairs))
    assert np.array_equal(*found)


# Ten thousand chips.

TEN_THOUSAND = """
import resource, sys
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ununennium import TrainerConfig, predict

torch.set_num_threads(1)


class Chips(Dataset):
    def __len__(self):
        return 10_000

    def __getitem__(self, number):
        return NOISE.roll(number, -1) + number % 7


NOISE = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(0))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # MB


config = TrainerConfig(device="cpu", progress="none")
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
loader = DataLoader(Chips(), batch_size=16)
predict(model, [next(iter(loader))], config=config)
before = peak()
out = np.lib.format.open_memmap(sys.argv[1], "w+", "uint8", (10_000, 64, 64))
predict(model, loader, out=out, config=config)
print(peak() - before)

with torch.no_grad():
    for number, batch in enumerate(loader):
        by_hand = model(batch).argmax(1).numpy()
        assert np.array_equal(out[16 * number : 16 * number + len(batch)], by_hand), number
"""


@pytest.mark.slow
def test_ten_thousand_chips_are_those_of_a_loop_by_hand_in_the_memory_of_a_few(tmp_path):
    """The chips have 655 MB, their classes 41 MB, which are on the disk."""
    command = [sys.executable, "-c", TEN_THOUSAND, str(tmp_path / "maps.npy")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 120, ended.stdout


# Several processes.


def predict_own_part(model):
    """Rank 1 alone predicts, as it can; then each its own part, of unequal lengths."""
    rank = dist.get_rank()
    trainer = make(DistributedDataParallel(model), nn.CrossEntropyLoss(), batches_of_ranks())
    alone = trainer.predict([CHIPS]) if rank == 1 else None
    part = trainer.predict([CHIPS[:4], CHIPS[4:6]] if rank else [CHIPS[6:]])
    return alone, part


def batches_of_ranks():
    return [(CHIPS[:2], CHIPS[:2, :3].argmax(1))]


def test_each_rank_predicts_its_own_loader():
    model = small_net()
    expected = by_hand(model, size=11).argmax(1).numpy()
    (_, last), (alone, first) = on_ranks(2, predict_own_part, model)
    assert np.array_equal(alone, expected)
    assert np.array_equal(np.concatenate([first, last]), expected)


def test_a_regression_is_not_thresholded_in_another_script():
    """`predict(model, loader)` gave 0 and 1 for heights, which looked like a map."""
    images = DataLoader(torch.rand(4, 4, 8, 8), 2)
    model = nn.Conv2d(4, 1, 1)
    with pytest.raises(ValueError, match="Pass output='classes' for a logit, or output='raw'"):
        predict(model, images)
    assert predict(model, images, "raw").dtype == np.float32
    assert predict(nn.Conv2d(4, 3, 1), images).dtype == np.uint8
