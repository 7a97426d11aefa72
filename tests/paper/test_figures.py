import numpy as np
import pytest
from PIL import Image

from dskd_fast.paper.figures import draw_examples, plot_temperatures
from dskd_fast.paper.tables import Cell


def example(size, value):
    """A grey image, and maps of which the second, the global one, has that value everywhere."""
    return [np.full((*size, 3), 128, np.uint8), *(np.full(size, x, np.float32) for x in (0, value, 0))]


@pytest.mark.parametrize("size", [(64, 128), (300, 150), (1000, 1600)])
def test_photograph_local_global_and_combined_stand_side_by_side(size):
    sheet = np.asarray(draw_examples("a title", [("good: x", example(size, 10.0))], low=0.0, high=10.0))
    grey = (sheet == 128).all(axis=2)
    hot = (np.abs(sheet - (128 * 0.25 + np.array([255, 255, 190]) * 0.75)) < 1).all(axis=2)
    columns = sheet.shape[1] // 4
    shown = [grey[:, i * columns : (i + 1) * columns].sum() for i in range(4)]
    assert shown[2] == 0
    assert shown[0] == shown[1] == shown[3] == hot.sum() > 1000
    assert hot[:, 2 * columns : 3 * columns].sum() == hot.sum()


def test_the_plot_has_a_panel_for_each_measure_that_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    cells = [Cell(0.5, 0.01, 2), Cell(), Cell(0.7)]
    measures = {"sPRO@0.05": {"mean": [Cell()] * 3}, "AUROC": {"mean": cells, "logical": [Cell()] * 3}}
    files = plot_temperatures(tmp_path / "figure", [0.5, 1, 2], measures, "some data")
    assert files == [tmp_path / "figure.png", tmp_path / "figure.svg"]
    with Image.open(files[0]) as image:
        assert image.width > 300
    svg = files[1].read_text()
    # matplotlib writes each text as a comment next to its outlines.
    for text in ("some data", "AUROC", "mean", "0.5", "temperature T"):
        assert f"<!-- {text} -->" in svg
    for text in ("sPRO@0.05", "logical"):
        assert f"<!-- {text} -->" not in svg
    before = files[1].read_bytes()
    plot_temperatures(tmp_path / "figure", [0.5, 1, 2], measures, "some data")
    assert files[1].read_bytes() == before
    assert plot_temperatures(tmp_path / "none", [1], {"AUROC": {"mean": [Cell()]}}, "some data") == []
