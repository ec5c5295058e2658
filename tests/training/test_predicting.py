"""Predictions are those of a loop by hand, in the loader's order, and leave no trace."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from device import on_device
from small import make_batches, make_trainer, same_state, small_net
from ununennium import (
    Callback,
    CheckpointError,
    MaskedLoss,
    Trainer,
    TrainerConfig,
    load_weights,
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
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_need_not_have_a_target(kind):
    model = small_net()
    loader = [BATCHES[kind](CHIPS[:6]), BATCHES[kind](CHIPS[6:])]
    expected = by_hand(model).argmax(1).numpy()
    assert np.array_equal(predict(model, loader, config=CPU), expected)
    assert np.array_equal(predict(model, iter(loader), config=CPU), expected)  # of no length


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


@pytest.mark.parametrize("classes", [3, 300])
def test_classes_take_as_little_memory_as_they_can(classes):
    found = predict(nn.Conv2d(4, classes, 1), LOADER, config=CPU)
    assert found.dtype == (np.uint8 if classes == 3 else np.int32)


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


def test_weights_of_a_checkpoint_predict_in_another_script(tmp_path):
    trainer = make_trainer()
    trainer.fit(1)
    path = trainer.save_checkpoint(tmp_path / "run.pt")
    found = predict(load_weights(small_net(), path), LOADER, config=CPU)
    assert np.array_equal(found, trainer.predict(LOADER))
    with pytest.raises(CheckpointError, match="holds another model"):
        load_weights(nn.Conv2d(4, 3, 1), path)


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
