"""The pictures of a run: the views as the network sees them, and a curve whose axes do not mislead."""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from plots import run

MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.1, 0.15]


def log_row(epoch, **others):
    row = {"epoch": epoch, "loss": 5 / epoch, "chance_loss": 5.5, "knn_macro_f1": None}
    return row | {"effective_rank": 20.0, "images_per_s": 1000.0 + epoch} | others


def test_the_views_show_the_pixels_before_the_normalisation(tmp_path):
    levels = torch.arange(10, dtype=torch.float32).view(10, 1, 1, 1).expand(10, 3, 32, 32) * 20 / 255
    view = (levels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    run.save_views(view, view.flip(0).double(), MEAN, STD, tmp_path / "views.png")
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    side = 96 + 4  # 32 px three times as large, and an edge of two pixels
    assert picture.shape == (2 * side, 8 * side, 3)
    centres = picture[side // 2 :: side, side // 2 :: side]
    assert (centres[0] == 20 * np.arange(8)[:, None]).all()
    assert (centres[1] == 20 * np.arange(9, 1, -1)[:, None]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["views.png"]


def test_fewer_than_eight_views_and_half_precision(tmp_path):
    view = torch.zeros(3, 3, 128, 128, dtype=torch.bfloat16)
    run.save_views(view, view, MEAN, STD, tmp_path / "views.png")
    assert Image.open(tmp_path / "views.png").size == (3 * 132, 2 * 132)


def test_the_axes_of_a_curve_do_not_mislead():
    log = [log_row(1), log_row(2, knn_macro_f1=0.5), log_row(3)]
    loss, knn, rank, rate = Figure().subplots(1, 4)
    for axes, (column, label) in zip((loss, knn, rank, rate), run.LOG_LABELS.items()):
        run.draw_column(axes, log, column, label)
        assert all(tick == int(tick) for tick in axes.get_xticks())
    assert rate.get_ylim()[0] == 0 and rate.get_ylim()[1] > 1003
    assert knn.lines[0].get_xdata().tolist() == [2]
    assert set(loss.lines[1].get_ydata()) == {5.5}


def test_a_curve_without_knn_or_chance_is_drawn(tmp_path):
    run.draw_curve([{"epoch": 1, "loss": 2.0, "knn_macro_f1": None}], tmp_path / "curve.png")
    pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("L"))
    assert pixels.shape[1] == 2148 and 0.001 < (pixels < 128).mean() < 0.2
