"""Figures: what is drawn is what was given, and an explorer redraws when a control moves."""

import ipywidgets as widgets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from shuffle_nb.foundations import figures
from shuffle_nb.foundations.costs import Cost, Costs
from shuffle_nb.foundations.training import History

mpl.use("Agg")


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def test_methods_keep_distinct_colours():
    palette = figures.colours(["a", "b", "c"])
    assert len(set(palette.values())) == 3
    assert figures.colours(["a", "b"])["b"] == palette["b"]


def test_losses_are_drawn_as_mean_and_range():
    _figure, axis = figures.subplots()
    runs = [History([4.0, 2.0]), History([6.0, 4.0])]
    figures.plot_losses(axis, {"method": runs}, window=1)
    (line,) = axis.lines
    assert line.get_ydata().tolist() == [5.0, 3.0]
    assert axis.get_xlabel() and axis.get_ylabel()


def test_bars_show_the_mean_and_every_seed():
    _figure, axis = figures.subplots()
    figures.plot_bars(axis, {"a": [1.0, 3.0], "b": [4.0]}, "height (m)")
    assert [bar.get_height() for bar in axis.patches] == [2.0, 4.0]
    assert sum(len(dots.get_offsets()) for dots in axis.collections) == 3
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b"]


def test_growth_is_drawn_on_logarithmic_axes():
    rows = tuple(Cost("m", 0, 0, float(s), 0.0, 0, 1.0, s) for s in (1, 10))
    _figure, axis = figures.subplots()
    figures.plot_growth(axis, Costs(rows, "tokens"))
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert axis.get_xlabel() == "tokens"


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 4, 5), (3, 3, 4, 5)])
def test_images_of_each_layout_are_shown(shape):
    figure = figures.show_images(torch.rand(shape), titles=["x", "y", "z"], columns=2)
    drawn = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(drawn) == 3 and drawn[0].shape[:2] == (4, 5)


def test_an_explorer_draws_its_first_frame_without_a_front_end_and_redraws_on_change(capsys):
    def draw(power, sign):
        figure, axis = figures.subplots()
        axis.plot(sign * np.arange(5.0) ** power)
        return figure

    explorer = figures.explore(
        draw,
        power=widgets.IntSlider(value=1, min=0, max=4),
        sign=widgets.Dropdown(options=[1, -1]),
    )

    def heights():
        return explorer.figure.axes[0].lines[0].get_ydata().tolist()

    assert heights() == [0, 1, 2, 3, 4]
    explorer.controls["power"].value = 2
    assert heights() == [0, 1, 4, 9, 16]
    explorer.controls["sign"].value = -1
    assert heights()[-1] == -16
    assert not plt.get_fignums()


def test_bad_input():
    with pytest.raises(ValueError, match="tell 8 methods apart, got 9"):
        figures.colours(list("abcdefghi"))
    _figure, axis = figures.subplots()
    with pytest.raises(ValueError, match="quantity must be one of"):
        figures.plot_growth(axis, Costs(()), "joules")
    with pytest.raises(ValueError, match=r"3 or 4 dimensions, got shape \(2, 2\)"):
        figures.show_images(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="control 'x' must be an ipywidget"):
        figures.explore(lambda x: None, x=3)
