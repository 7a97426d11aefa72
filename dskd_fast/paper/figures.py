"""Figures of the paper's experiments: heat maps side by side, and figures over the temperature."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dskd_fast.detection.overlay import BACKGROUND, FOREGROUND, heat
from dskd_fast.files import write_file
from dskd_fast.paper.tables import Cell

_TILE = 256
_GAP = 6
_TEXT = 14
_HEADS = ("image", "local student", "global student", "combined")

_COLOURS = {"structural": "#0072B2", "logical": "#D55E00", "mean": "#000000"}


def draw_examples(title: str, rows: Sequence[tuple[str, Sequence[NDArray]]], low: float, high: float) -> Image.Image:
    """Images with their heat maps side by side.

    Args:
        title: above all.
        rows: a caption, and the photograph (H, W, 3), uint8, with its local, global and combined map (H, W) each.
        low, high: the map values that have no colour, and the full one.
    """
    drawn = []
    for caption, (image, *maps) in rows:
        tiles = [Image.fromarray(tile) for tile in (image, *(heat(image, m, low, high) for m in maps))]
        for tile in tiles:
            tile.thumbnail((_TILE, _TILE))
        drawn.append((caption, tiles))
    font = ImageFont.load_default(_TEXT)
    line = 2 * _TEXT
    width = len(_HEADS) * (_TILE + _GAP) + _GAP
    words = _wrapped(title, font, width - 2 * _GAP)
    heights = [line + tiles[0].height for _, tiles in drawn]
    sheet = Image.new("RGB", (width, line * (len(words) + 1) + sum(heights) + _GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y = 0
    for text in words:
        draw.text((_GAP, y + _TEXT // 2), text, font=font, fill=FOREGROUND)
        y += line
    for i, head in enumerate(_HEADS):
        draw.text((_GAP + i * (_TILE + _GAP), y + _TEXT // 2), head, font=font, fill=FOREGROUND)
    y += line
    for caption, tiles in drawn:
        for i, tile in enumerate(tiles):
            sheet.paste(tile, (_GAP + i * (_TILE + _GAP), y))
        y += tiles[0].height
        draw.text((_GAP, y + _TEXT // 4), caption, font=font, fill=FOREGROUND)
        y += line
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets of `draw_examples`, one below the other."""
    stacked = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), BACKGROUND)
    y = 0
    for sheet in sheets:
        stacked.paste(sheet, (0, y))
        y += sheet.height
    return stacked


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def plot_temperatures(
    path: Path, temperatures: Sequence[float], measures: Mapping[str, Mapping[str, Sequence[Cell]]], data: str
) -> list[Path]:
    """Plot figures over the temperature (the paper's figure 6) as PNG and SVG.

    Args:
        path: of the files, without suffix.
        temperatures: of the points.
        measures: by measure and kind, a figure for each temperature; those without any are left out.
        data: says what the figures are of.

    Returns:
        The files; none if there are no figures.
    """
    import matplotlib
    from matplotlib.figure import Figure

    there = {
        measure: kinds
        for measure, kinds in measures.items()
        if any(cell.value is not None for cells in kinds.values() for cell in cells)
    }
    if not there:
        return []
    with matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "svg.hashsalt": "dskd-fast",
        }
    ):
        figure = Figure(figsize=(4.2 * len(there), 3.4), layout="constrained")
        figure.suptitle(data, fontsize=9)
        for axes, (measure, kinds) in zip(figure.subplots(1, len(there), squeeze=False)[0], there.items(), strict=True):
            for kind, cells in kinds.items():
                points = [
                    (t, c.value, c.spread or 0) for t, c in zip(temperatures, cells, strict=True) if c.value is not None
                ]
                if points:
                    x, y, spread = np.array(points).T
                    bars = spread if spread.any() else None
                    axes.errorbar(x, y, bars, marker="o", markersize=4, capsize=2, color=_COLOURS[kind], label=kind)
            axes.set_xscale("log")
            axes.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
            axes.minorticks_off()
            axes.set_xlabel("temperature T")
            axes.set_ylabel(measure)
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(kinds), columnspacing=1)
        files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
        write_file(files[0], lambda temporary: figure.savefig(temporary, dpi=150))
        write_file(files[1], lambda temporary: figure.savefig(temporary, metadata={"Date": None}))
    return files
