"""Figures: what is drawn is what was given and is seen whole; an explorer redraws, or is static."""

import contextlib
import re

import ipywidgets as widgets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shuffle_nb.foundations import figures
from shuffle_nb.foundations.costs import Cost, Costs
from shuffle_nb.foundations.training import History

mpl.use("Agg")


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


@pytest.fixture
def axis():
    return figures.subplots()[1]


def texts(labels):
    return [label.get_text() for label in labels]


def test_methods_keep_distinct_colours():
    palette = figures.colours(["a", "b", "c"])
    assert len(set(palette.values())) == 3
    assert figures.colours(["a", "b"])["b"] == palette["b"]


def test_losses_are_drawn_as_mean_and_range(axis):
    runs = [History([4.0, 2.0]), History([6.0, 4.0])]
    figures.plot_losses(axis, {"method": runs}, window=1)
    (line,) = axis.lines
    assert line.get_ydata().tolist() == [5.0, 3.0]
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == 2.0 and corners[:, 1].max() == 6.0
    assert band.get_facecolor()[0, 3] >= 0.25 and band.get_linewidth()[0] > 0, (
        "the band is invisible"
    )
    assert axis.get_xlabel() and axis.get_ylabel()


def test_bars_show_the_mean_and_every_seed_from_zero(axis):
    figures.plot_bars(axis, {"a": [1.0, 3.0], "b": [4.0]}, "height (m)")
    assert [bar.get_height() for bar in axis.patches] == [2.0, 4.0]
    assert sum(len(dots.get_offsets()) for dots in axis.collections) == 3
    assert texts(axis.get_xticklabels()) == ["a", "b"]
    assert axis.get_ylim()[0] == 0
    figures.show(axis.figure)


def test_dots_show_the_mean_and_every_seed_where_zero_is_far(axis):
    figures.plot_dots(axis, {"a": [101.0, 103.0], "b": [104.0]}, "height (m)")
    assert [line.get_ydata().tolist() for line in axis.lines] == [[102.0] * 2, [104.0] * 2]
    assert sum(len(dots.get_offsets()) for dots in axis.collections) == 3
    assert texts(axis.get_xticklabels()) == ["a", "b"]
    assert axis.get_ylim()[0] > 100
    figures.show(axis.figure)


# What is drawn, and an axis limit that cuts one of its points.
CUT = {
    "line": lambda axis: (axis.plot([1, 2, 3], [1, 2, 9]), axis.set_ylim(0, 8)),
    "line, from below": lambda axis: (axis.plot([1, 2, 3], [1, 2, 9]), axis.set_ylim(bottom=1.5)),
    "line, sideways": lambda axis: (axis.plot([1, 2, 3], [1, 2, 9]), axis.set_xlim(1.5, 4)),
    "line on an inverted axis": lambda axis: (axis.plot([1, 2, 3]), axis.set_ylim(2.5, 0)),
    "markers only": lambda axis: (axis.plot([1, 2, 3], "o"), axis.set_ylim(0, 2.5)),
    "horizontal line": lambda axis: (axis.plot([1, 2]), axis.set_ylim(0, 3), axis.axhline(4)),
    "dots": lambda axis: (axis.scatter([1, 2, 3], [1, 2, 9]), axis.set_ylim(0, 8)),
    "bar, too short an axis": lambda axis: (axis.bar([1, 2], [3, 4]), axis.set_ylim(0, 3.5)),
    "bar, sideways": lambda axis: (axis.barh([1, 2], [3, 4]), axis.set_xlim(0, 3.5)),
    "error bar": lambda axis: (axis.errorbar([1, 2], [3, 4], yerr=1), axis.set_ylim(2, 4.5)),
    "band": lambda axis: (axis.fill_between([1, 2], [3, 4], [5, 6]), axis.set_ylim(3, 5.5)),
    "steps": lambda axis: (axis.stairs([1, 2, 9]), axis.set_ylim(0, 8)),
    "histogram": lambda axis: (axis.hist([1, 1, 1, 2]), axis.set_ylim(0, 2)),
    "span": lambda axis: (axis.plot([1, 2]), axis.set_xlim(0, 2), axis.axvspan(1, 3)),
    "line on a log axis": lambda axis: (axis.loglog([1, 10], [1, 1e3]), axis.set_ylim(1, 900)),
    "0 on a log axis": lambda axis: axis.semilogy([1, 2, 3], [0, 1, 10]),
    "infinity": lambda axis: axis.plot([1, 2, 3], [1, 2, np.inf]),
    "more, once the limits stand": lambda axis: (axis.set_ylim(0, 1), axis.plot([0.5, 1.5])),
}


@pytest.mark.parametrize("draw", CUT.values(), ids=CUT)
def test_a_figure_that_drops_a_point_is_refused_unless_the_reason_is_given(draw, axis):
    draw(axis)
    with pytest.raises(
        ValueError, match=r"^[xy]lim \(.*\) drops \d of \d+ points of the .*, such as"
    ):
        figures.show(axis.figure)
    figures.show(axis.figure, cropped="the rest is noise")
    assert axis.figure.get_supxlabel() == "Not all points are shown: the rest is noise"


# What is drawn whole, though some of it lies at the edge, is no data, or stands outside on purpose.
WHOLE = {
    "at the limits": lambda axis: (axis.plot([1, 2, 3]), axis.set(xlim=(0, 2), ylim=(1, 3))),
    "NaN": lambda axis: axis.plot([1, 2, 3], [1, np.nan, 3]),
    "masked": lambda axis: axis.scatter([1, 2], np.ma.array([1.0, 1e9], mask=[0, 1])),
    "not clipped": lambda axis: (axis.plot([1, 9], clip_on=False), axis.set_ylim(0, 2)),
    "not visible": lambda axis: (axis.plot([1, 9], visible=False), axis.set_ylim(0, 2)),
    "neither line nor marker": lambda axis: (axis.plot([1, 9], ls="none"), axis.set_ylim(0, 2)),
    "endless line": lambda axis: (axis.plot([1, 2]), axis.axline((0, 0), slope=1)),
    "spans": lambda axis: (axis.plot([1, 2]), axis.axvline(0.5), axis.axhspan(1, 2)),
    "text and arrow": lambda axis: (
        axis.plot([1, 2]),
        axis.annotate("there", (0.5, 1.5), xytext=(0.5, 9), arrowprops={"arrowstyle": "->"}),
    ),
    "picture, zoomed": lambda axis: (axis.imshow(np.eye(4)), axis.set_xlim(0, 2)),
    "mesh and colour bar": lambda axis: axis.figure.colorbar(
        axis.pcolormesh(np.eye(4), vmax=0.5), ax=axis, extend="both"
    ),
    "contours": lambda axis: (axis.contourf(np.eye(4)), axis.set_xlim(0, 2)),
    "box plot": lambda axis: axis.boxplot([[1, 2, 3, 90]]),
    "negative bars": lambda axis: axis.bar([1, 2], [-3, 4]),
    "stacked bars": lambda axis: (axis.bar([1], [3]), axis.bar([1], [4], bottom=[3])),
    "log-log": lambda axis: axis.loglog([1, 10, 1000], [1, 20, 3000], "o-"),
}


@pytest.mark.parametrize("draw", WHOLE.values(), ids=WHOLE)
def test_a_figure_that_shows_all_is_shown(draw, axis):
    draw(axis)
    figures.show(axis.figure)
    assert not plt.get_fignums()


def test_a_crop_without_need_or_without_a_reason_is_refused(axis):
    axis.plot([1, 2, 3])
    with pytest.raises(ValueError, match="nothing is cropped"):
        figures.show(axis.figure, cropped="just in case")
    axis.set_ylim(0, 2)
    with pytest.raises(ValueError, match="or it is empty"):
        figures.show(axis.figure, cropped=" ")


def test_the_sentence_names_the_line_the_limit_and_the_point(axis):
    axis.plot([0, 1, 2], [1.0, 2.0, 7.25], label="seed 2")
    axis.set_ylim(0, 2.5)
    sentence = (
        "ylim (0, 2.5) drops 1 of 3 points of the line 'seed 2', such as y = 7.25: "
        "widen it, or say why: show(figure, cropped='…')"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        figures.show(axis.figure)


TRUNCATED = {
    "from above zero": lambda axis: axis.set_ylim(0.81, 1),
    "upside down": lambda axis: axis.set_ylim(1, 0.81),
    "logarithmic": lambda axis: axis.set_yscale("log"),
}


@pytest.mark.parametrize("limit", TRUNCATED.values(), ids=TRUNCATED)
@pytest.mark.parametrize("cropped", [None, "zero is far"])
def test_bars_without_their_zero_are_refused_whatever_the_reason(limit, cropped, axis):
    figures.plot_bars(axis, {"old": [0.82, 0.83], "new": [0.84, 0.85]}, "accuracy")
    limit(axis)
    with pytest.raises(
        ValueError, match=r"bars (must start at|on a logarithmic axis have no) zero"
    ):
        figures.show(axis.figure, cropped=cropped)


def test_bars_that_lie_are_refused_as_well(axis):
    axis.barh(["old", "new"], [0.82, 0.84])
    axis.set_xlim(0.8, 1)
    with pytest.raises(ValueError, match=r"start at zero, got xlim \(0\.8, 1\).*use plot_dots"):
        figures.show(axis.figure)


@given(
    low=st.floats(1e-9, 1e9),
    ratio=st.floats(1.01, 1e6),
)
def test_every_logarithmic_range_gets_three_ticks_or_more(low, ratio):
    ticks = figures.log_ticks(low, low * ratio)
    assert 3 <= len(ticks) <= 12
    assert (np.diff(ticks) > 0).all()
    assert low * (1 - 1e-6) <= ticks[0] and ticks[-1] <= low * ratio * (1 + 1e-6)
    assert len({figures._plain_number(tick) for tick in ticks}) == len(ticks)


@pytest.mark.parametrize("letter", "xy")
@pytest.mark.parametrize("heights", [(2, 8), (0.95, 1.05), (1, 10), (1, 1e9), (3e-7, 4e-7)])
def test_a_log_axis_under_a_decade_has_three_labels_in_view(heights, letter, axis):
    points = (heights, (1, 2)) if letter == "x" else ((1, 2), heights)
    axis.plot(*points)
    axis.set(**{f"{letter}scale": "log"})
    figures.show(axis.figure)
    side = getattr(axis, f"{letter}axis")
    low, high = side.get_view_interval()
    labels = side.get_major_formatter().format_ticks(side.get_majorticklocs())
    seen = [
        text
        for text, place in zip(labels, side.get_majorticklocs(), strict=True)
        if low <= place <= high
    ]
    assert len([text for text in seen if text]) >= 3


def test_two_ticks_set_by_hand_are_refused_and_none_at_all_are_not(axis):
    axis.semilogy([1, 2, 3], [1, 10, 100])
    axis.set_yticks([1, 100])
    with pytest.raises(ValueError, match="needs three labelled ticks, got 2 on y"):
        figures.show(axis.figure)
    axis.set_yticks([])
    figures.show(axis.figure)


def costs(*sizes):
    rounds = (0.5, 1.0, 2.0, 3.0, 9.0)
    rows = [Cost("m", tuple(size * r for r in rounds), size=size, memory=8) for size in sizes]
    return Costs(tuple(rows), "tokens")


@pytest.mark.parametrize("sizes", [(1, 10), (64, 128), (64, 256, 1024)])
def test_growth_is_drawn_on_logarithmic_axes(sizes, axis):
    figures.plot_growth(axis, costs(*sizes))
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert axis.get_xlabel() == "tokens"
    figures.show(axis.figure)
    assert len([text for text in texts(axis.get_xticklabels()) if text]) >= 3
    assert axis.lines[0].get_ydata().tolist() == [2.0 * size for size in sizes]
    corners = axis.collections[0].get_paths()[0].vertices
    assert {1.0 * sizes[0], 3.0 * sizes[0]} <= set(corners[:, 1]), "quartiles of the rounds"


def test_growth_of_what_has_no_seconds_has_no_band(axis):
    figures.plot_growth(axis, costs(1, 10), "memory")
    assert not axis.collections


def test_an_image_axis_has_neither_ticks_nor_grid(axis):
    axis.imshow(np.eye(3))
    assert figures.image_axis(axis, title="ones") is axis
    assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0
    assert axis.get_title() == "ones"
    assert not any(line.get_visible() for line in axis.get_xgridlines())
    assert not any(spine.get_visible() for spine in axis.spines.values())
    figures.image_axis(axis)
    assert axis.get_title() == "ones", "a title that is not given stays"


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 4, 5), (3, 3, 4, 5)])
def test_images_of_each_layout_are_shown(shape):
    figure = figures.show_images(torch.rand(shape), titles=["x", "y", "z"], columns=2)
    drawn = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(drawn) == 3 and drawn[0].shape[:2] == (4, 5)


def draw_power(power, sign):
    figure, axis = figures.subplots()
    axis.plot(sign * np.arange(5.0) ** power)
    return figure


def controls():
    return {
        "power": widgets.IntSlider(value=1, min=0, max=4),
        "sign": widgets.Dropdown(options=[1, -1]),
    }


def heights(figure):
    return figure.axes[0].lines[0].get_ydata().tolist()


def test_an_explorer_draws_its_first_frame_without_a_front_end_and_redraws_on_change(capsys):
    explorer = figures.explore(draw_power, **controls())
    assert heights(explorer.figure) == [0, 1, 2, 3, 4]
    explorer.controls["power"].value = 2
    assert heights(explorer.figure) == [0, 1, 4, 9, 16]
    explorer.controls["sign"].value = -1
    assert heights(explorer.figure)[-1] == -16
    assert not plt.get_fignums()


def test_a_frame_is_drawn_without_turning_the_controls():
    explorer = figures.explore(draw_power, **controls())
    assert heights(explorer.frame(power=2)) == [0, 1, 4, 9, 16]
    assert heights(explorer.frame()) == heights(explorer.figure) == [0, 1, 2, 3, 4]
    assert explorer.controls["power"].value == 1


def test_the_labels_of_controls_are_not_cut_and_stand_in_line():
    explorer = figures.explore(draw_power, **controls())
    widths = {control.style.description_width for control in explorer.controls.values()}
    assert widths == {"6ch"}  # of "power", and a space


@contextlib.contextmanager
def displayed(monkeypatch, live):
    """Collect what `display` is given, as a front end or as a program that runs notebooks."""
    seen = []
    monkeypatch.setattr(figures, "is_live", lambda: live)
    monkeypatch.setattr("IPython.display.display", lambda data, **options: seen.append(data))
    yield seen


@pytest.mark.parametrize("live", [True, False])
def test_a_page_without_a_kernel_gets_the_frame_and_one_line_and_no_dead_control(live, monkeypatch):
    with displayed(monkeypatch, live) as seen:
        explorer = figures.explore(draw_power, **controls())
    bundles = [data for data in seen if isinstance(data, dict)]
    views = [mime for bundle in bundles for mime in bundle if "widget" in mime]
    assert len(views) == live
    assert explorer.figure in seen
    (bundle,) = bundles
    for text in (bundle["text/plain"], bundle["text/html"]):
        assert "Shown: power = 1, sign = 1." in text and "shuffle-nb lab" in text


def test_the_first_frame_of_an_explorer_is_whole_and_a_later_one_says_what_it_drops():
    def draw(height):
        figure, axis = figures.subplots()
        axis.plot([0, height])
        axis.set_ylim(0, 2)
        return figure

    with pytest.raises(ValueError, match="first frame of an explorer must be whole: ylim"):
        figures.explore(draw, height=widgets.IntSlider(value=3, max=4))
    explorer = figures.explore(draw, height=widgets.IntSlider(value=1, max=4))
    explorer.controls["height"].value = 4
    assert explorer.figure.get_supxlabel().startswith("Outside the frame: ylim (0, 2) drops 1 of 2")


def test_bad_input(axis):
    with pytest.raises(ValueError, match="tell 8 methods apart, got 9"):
        figures.colours(list("abcdefghi"))
    with pytest.raises(ValueError, match="quantity must be one of"):
        figures.plot_growth(axis, Costs(()), "joules")
    with pytest.raises(
        ValueError, match=r"memory of 'm' must be above zero to be drawn, got \[None"
    ):
        figures.plot_growth(axis, Costs((Cost("m", (1.0,), size=1),)), "memory")
    with pytest.raises(ValueError, match=r"3 or 4 dimensions, got shape \(2, 2\)"):
        figures.show_images(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="control 'x' must be an ipywidget"):
        figures.explore(lambda x: None, x=3)
