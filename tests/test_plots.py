"""The figures, read back from their axes."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from ununennium.plots import GREY, plot_chips, plot_history, rgb_of

HISTORY = {
    "train_loss": [1.2, 0.8, 0.6],
    "val_loss": [1.1, 0.9, 0.7],
    "val_IoU": [0.2, 0.4, 0.5],
    "val_IoU_classes": [1.0, 2.0, 2.0],
    "val_IoU/water": [0.3, 0.5, 0.7],
    "val_IoU/town": [math.nan, 0.0, 0.1],
    "val_accuracy": [0.5, 0.6, 0.7],
    "lr": [1e-3, 1e-3, 5e-4],
    "train_skipped_steps": [0.0, 0.0, 0.0],
}


def test_matplotlib_is_imported_with_the_first_figure():
    code = "import sys, ununennium.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_score_has_its_panel_and_every_epoch_its_point():
    panels = {axis.get_title(): axis for axis in plot_history(HISTORY).axes}
    assert list(panels) == ["loss", "IoU", "scores", "learning rate"]
    lines = {title: axis.get_lines() for title, axis in panels.items()}
    assert [line.get_label() for line in lines["IoU"]] == ["mean", "water", "town"]
    (accuracy,) = panels["scores"].get_legend().get_texts()
    assert accuracy.get_text() == "val_accuracy"
    assert panels["learning rate"].get_legend() is None  # the title says it
    for line, name in zip(lines["loss"], ("train_loss", "val_loss"), strict=True):
        assert line.get_xdata().tolist() == [1, 2, 3]
        assert line.get_ydata().tolist() == HISTORY[name]
    assert panels["IoU"].get_ylim() == (-0.03, 1.03) and panels["loss"].get_ylim()[0] == 0
    constant = plot_history(HISTORY | {"lr": [1e-3] * 3})
    assert [axis.get_title() for axis in constant.axes] == ["loss", "IoU", "scores"]


def test_two_runs_are_compared_by_their_names():
    """A dictionary of histories gave an empty figure once."""
    other = HISTORY | {"train_loss": [1.0, 0.9], "val_accuracy": [0.4, 0.8]}
    panels = {axis.get_title(): axis for axis in plot_history({"a": HISTORY, "b": other}).axes}
    lines = {title: axis.get_lines() for title, axis in panels.items()}
    assert [line.get_label() for line in lines["scores"]] == ["a: val_accuracy", "b: val_accuracy"]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in lines["loss"]}
    assert drawn["a: train_loss"] == HISTORY["train_loss"]
    assert drawn["b: train_loss"] == other["train_loss"]
    assert [text.get_text() for text in panels["scores"].get_legend().get_texts()] == [
        "a: val_accuracy", "b: val_accuracy",
    ]  # fmt: skip


def test_an_empty_history_is_an_empty_figure():
    (axis,) = plot_history({}).axes
    assert not axis.get_lines()


def chips(**options):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 4, 6, 6, generator=generator)
    masks = torch.randint(3, (2, 6, 6), generator=generator)
    masks[0, :2] = 255
    predicted = torch.randint(3, (2, 6, 6), generator=generator)
    return (
        images,
        masks,
        predicted,
        plot_chips(images, masks, predicted, ignore_index=255, **options),
    )


def pictures(figure):
    """Return the pictures of a figure: rows, then image, truth, prediction, error."""
    shown = [torch.tensor(axis.get_images()[0].get_array()) for axis in figure.axes]
    return [shown[row : row + 4] for row in range(0, len(shown), 4)]


def test_chips_show_truth_prediction_error_and_grey():
    _, masks, predicted, figure = chips()
    (grey, black, white) = rgb_of(GREY, "black", "white")
    colours = [rgb_of(patch.get_facecolor())[0] for patch in figure.legends[0].get_patches()]
    for row, (_, truth, guess, error) in enumerate(pictures(figure)):
        ignored = masks[row] == 255
        for picture in (truth, guess, error):
            assert (picture[ignored] == grey).all()
        for number in range(3):
            assert (truth[masks[row] == number] == colours[number]).all()
            assert (guess[(predicted[row] == number) & ~ignored] == colours[number]).all()
        wrong = masks[row] != predicted[row]
        assert (error[wrong & ~ignored] == black).all() and (error[~wrong] == white).all()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["image", "truth", "prediction", "error", "", "", "", ""]


def test_the_legend_names_the_classes_and_nodata_if_there_is_any():
    def labels(figure):
        return [text.get_text() for text in figure.legends[0].get_texts()]

    images, masks, predicted, figure = chips()
    assert labels(figure) == ["0", "1", "2", "no data"]
    assert labels(chips(class_names=["a", "b", "c"])[-1]) == ["a", "b", "c", "no data"]
    assert labels(plot_chips(images[1:], masks[1:], predicted[1:])) == ["0", "1", "2"]


def test_a_class_has_one_colour_in_both_figures():
    curves = plot_history({"val_IoU/a": [0.1], "val_IoU/b": [0.2], "val_IoU/c": [0.3]})
    (axis,) = curves.axes
    patches = chips()[-1].legends[0].get_patches()
    for line, patch in zip(axis.get_lines(), patches, strict=False):
        assert torch.equal(rgb_of(line.get_color()), rgb_of(patch.get_facecolor()))


def test_arrays_and_maps_with_a_channel_draw_the_same():
    images, masks, predicted, figure = chips()
    again = plot_chips(
        images.numpy(),
        masks[:, None].numpy().astype(np.int16),
        predicted[:, None],
        ignore_index=255,
    )
    for row, other in zip(pictures(figure), pictures(again), strict=True):
        assert all(torch.equal(one, two) for one, two in zip(row, other, strict=True))


def test_figures_are_returned_and_not_left_open():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plot_history(HISTORY)
    chips()
    assert plt.get_fignums() == before


def test_labels_beyond_the_names_are_refused():
    images, masks, predicted, _ = chips()
    with pytest.raises(ValueError, match="label 2. .* pass ignore_index=2; otherwise name all"):
        plot_chips(images[1:], masks[1:], predicted[1:], class_names=["a", "b"])


def test_figures_of_unusual_runs():
    from ununennium.plots import plot_chips, plot_history

    history = {"train_loss": [-0.1, -0.4], "val_RMSE": [3.0, 2.0], "val_IoU": [0.0, 0.0]}
    figure = plot_history(history)
    loss, iou, scores = figure.axes
    assert loss.get_ylim()[0] < -0.4 and iou.get_ylim()[0] < 0 and scores.get_title() == "scores"
    flood = torch.zeros(2, 1, 8, 8)
    plot_chips(np.zeros((2, 1, 8, 8), np.float32), flood, flood)
    with pytest.raises(ValueError, match="add a dimension"):
        plot_chips(torch.zeros(4, 8, 8), torch.zeros(8, 8), torch.zeros(8, 8))
    with pytest.raises(ValueError, match="pass ignore_index=255"):
        plot_chips(
            torch.zeros(2, 4, 8, 8), torch.full((2, 8, 8), 255), flood[:, 0], class_names=["a"]
        )


@pytest.mark.parametrize(
    "call",
    [
        "plot_history({'val_loss': [1.0, 0.5]})",
        "plot_chips(torch.rand(1, 3, 2, 2), *torch.zeros(2, 1, 2, 2).long())",
        "plot_confusion(ConfusionMatrix(3))",
    ],
)
def test_a_figure_without_matplotlib_says_what_to_install(call):
    code = f"""
import sys, torch

class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name=name)

sys.meta_path.insert(0, Without())
from ununennium import *
from ununennium.plots import *
try:
    {call}
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert done == (
        "matplotlib A figure needs matplotlib, which is missing: pip install "
        "'ununennium[notebook]'.\n"
    )


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_histories_is_drawn_with_numbered_names(kind):
    shorter = {"val_loss": [0.8, 0.6]}
    figure = plot_history(kind([HISTORY, shorter]))
    axis = figure.axes[0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["run 1: train_loss", "run 1: val_loss", "run 2: val_loss"]
    named = plot_history({"run 1": HISTORY, "run 2": shorter}).axes[0]
    drawn, expected = ([line.get_ydata().tolist() for line in a.lines] for a in (axis, named))
    assert str(drawn) == str(expected)


@pytest.mark.parametrize(("history", "kind"), [(["a"], "str"), (3, "int"), (object(), "object")])
def test_something_else_than_a_history_is_refused_in_a_sentence(history, kind):
    with pytest.raises(TypeError, match=f"draws what fit returned, not a {kind}. Pass trainer.h"):
        plot_history(history)


def test_bands_that_the_images_do_not_have_are_refused():
    """They were drawn in grey, without a word."""
    images, maps = torch.rand(1, 4, 8, 8), torch.zeros(1, 8, 8)
    with pytest.raises(ValueError, match=r"rgb=\(7, 2, 1\) names band 7, and the images have 4"):
        plot_chips(images, maps.long(), maps.long(), rgb=(7, 2, 1))
    plot_chips(images[:, :1], maps.long(), maps.long())  # one band is grey by default
