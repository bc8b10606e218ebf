"""Pictures of maps: what they call the numbers that they show."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from plots import maps
from plots.maps import COLOURS, OTHER, Drawn, palette


def drawn(found, task, classes=None):
    """A map of shares (rows, columns, K) of patches of 8 px, side by side."""
    rows, columns, count = found.shape
    picture = np.zeros((8 * rows, 8 * columns, 3), np.uint8)
    centres = (8 * np.arange(rows) + 4, 8 * np.arange(columns) + 4)
    names = classes or [f"class {k}" for k in range(count)]
    return Drawn(picture, 8 * rows, 8 * columns, *centres, found, None, names, task)


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws a map and gives its figure."""
    kept = []
    monkeypatch.setattr(maps, "save", lambda figure, *rest, **more: kept.append(figure))

    def draw(found, task, classes=None, by=maps.draw_map):
        by(tmp_path / "map.png", drawn(found, task, classes))
        return kept.pop()

    return draw


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_probabilities_of_classes_are_not_called_fractions(figure):
    """Three of four patches are water, of which the model is little sure; the fifth has no data."""
    found = np.array([[[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [np.nan, np.nan]]])
    of_classes = figure(found, "scene", ["Water", "Rock"])
    of_fractions = figure(found, "fraction", ["Water", "Rock"])
    said = ["Water: 75.0 %\nof the patches", "Rock: 25.0 %\nof the patches"]
    assert titles(of_classes) == ["scene", "class", *said]
    assert titles(of_fractions) == ["scene", "largest fraction", "Rock: 52.5 %", "Water: 47.5 %"]
    assert of_classes.axes[-1].get_ylabel() == "probability"
    assert of_fractions.axes[-1].get_ylabel() == "fraction of the patch"


def painted(figure):
    """The colours (rows, columns, 3) of the map of the classes, the last of the panels."""
    mesh = figure.axes[-1].collections[0]
    return mesh.to_rgba(mesh.get_array())[..., :3]


@pytest.mark.parametrize("count", [3, 10, 29])
def test_a_class_has_one_colour_in_every_map(figure, count):
    """In the first map class 0 takes most, in the second class 1."""
    for order in ([0, 0, 1], [1, 1, 0]):
        colours = painted(figure(np.eye(count)[[order]], "scene", by=maps.draw_classes))
        assert np.allclose(colours, [[to_rgb(COLOURS[k]) for k in order]])


def test_every_class_has_a_colour_of_its_own():
    colours = palette(255)
    assert palette(10) == list(COLOURS) and palette(29) == colours[:29]
    assert len({*colours, OTHER}) == 256
    near = [np.ptp([to_rgb(a), to_rgb(b)], 0).max() for a in colours[:40] for b in colours[:40] if a < b]
    assert min(near) > 0.04


@pytest.mark.parametrize("name, columns", [("Forests", 5), ("Shrubland and Shrublands with Trees", 2)])
def test_the_legend_stays_in_the_picture(name, columns):
    """Five of the paper's names side by side were cut off."""
    with matplotlib.rc_context({"font.size": 10, "legend.fontsize": 10}):
        drawn = Figure(figsize=(9, 4), dpi=80, layout="constrained")
        maps.add_legend(drawn, [Patch(label=f"{name} {k}") for k in range(10)])
        (legend,) = drawn.legends
        assert len(legend.get_texts()) == 10 and legend._ncols == columns
        assert legend.get_window_extent().width < drawn.bbox.width


def test_a_void_truth_has_no_colour():
    found, truth = np.full((1, 2, 2), 0.5), np.array([[[1, 0], [np.nan, np.nan]]])
    axis = Figure().subplots()
    what = drawn(found, "fraction")._replace(truth=truth)
    maps.draw_largest(axis, what, truth, what.shown(), "truth")
    assert axis.collections[0].get_array().mask.tolist() == [[False, True]]
