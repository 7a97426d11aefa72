"""Heat maps for people: the photograph beside itself under its anomaly map."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Violet to red, orange and white. Opacity rises with the score: where nothing is wrong the photograph shows through.
_STOPS = np.array([0.0, 0.35, 0.7, 1.0])
_COLOURS = np.array([[40, 0, 90], [200, 20, 60], [255, 160, 0], [255, 255, 190]], dtype=np.float64)
_OPACITY = 0.75
# Pixels that are drawn at a time, so that what is made of them stays in a core's cache.
_BLOCK = 2**16
# Strengths that have a colour of their own. With this many and opacities of 1/256 nothing is off by 1 of 255.
_N_COLOURS = 1024

# In standard deviations: full colour where there is no threshold, and the least between a threshold and full colour.
_FULL_COLOUR, _LEAST_STEP = 20.0, 1.0

BACKGROUND = (24, 24, 24)
FOREGROUND = (235, 235, 235)


def colour_range(threshold: float | None) -> tuple[float, float]:
    """The map values that are drawn as nothing and in full colour.

    The first is 0, the normal mean, but where a threshold is near that or below: what decides there would be invisible,
    and between them there would be too little to tell apart.
    """
    if threshold is None:
        return 0.0, _FULL_COLOUR
    # The threshold is where the colours are half way, so what is bright decided.
    step = max(threshold, _LEAST_STEP)
    return threshold - step, threshold + step


def colours(strength: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How a heat map is drawn.

    Args:
        strength: any shape, from 0, nothing, to 1, full colour.

    Returns:
        The colours, RGB from 0 to 255 along a new last axis, and their opacity from 0 to 1, of the same shape as
        `strength`.
    """
    rgb = np.stack([np.interp(strength, _STOPS, _COLOURS[:, c]) for c in range(3)], axis=-1)
    return rgb, _OPACITY * np.minimum(2.0 * strength, 1)


def heat(image: NDArray[np.uint8], anomaly_map: NDArray[np.float32], low: float, high: float) -> NDArray[np.uint8]:
    """The photograph (H, W, 3) under its map, uint8; see `overlay`."""
    canvas = Image.new("RGB", (image.shape[1], image.shape[0]))
    source = Image.fromarray(anomaly_map)
    for rows in _blocks(image):
        canvas.paste(
            _heat(Image.fromarray(image[rows]), len(image), rows, anomaly_map, source, low, high), (0, rows.start)
        )
    return np.asarray(canvas)


def _heat(
    block: Image.Image,
    height: int,
    rows: slice,
    anomaly_map: NDArray[np.float32],
    source: Image.Image,
    low: float,
    high: float,
) -> Image.Image:
    """Rows of a photograph under their part of the map, enlarged (bilinear); most of a normal image stays as it is."""
    down, across = source.height / height, source.width / block.width
    top, bottom = rows.start * down, (rows.start + block.height) * down
    # What an enlarged value is made of: its neighbours, or more where the map is made smaller.
    reach = 1 + max(1, down)
    is_drawn = (anomaly_map[max(0, int(top - reach)) : math.ceil(bottom + reach)] > low).any(0)
    if not is_drawn.any():
        return block
    columns = np.flatnonzero(is_drawn)
    reach = 1 + max(1, across)
    left = max(0, int((columns[0] - reach) / across))
    right = min(block.width, math.ceil((columns[-1] + 1 + reach) / across))
    box = (left * across, top, min(right * across, source.width), min(bottom, source.height))
    values = np.asarray(source.resize((right - left, block.height), Image.Resampling.BILINEAR, box))
    with np.errstate(over="ignore"):
        values = (values - np.float32(low)) * np.float32((_N_COLOURS - 1) / max(high - low, 1e-12))
    strength = (values.clip(0, _N_COLOURS - 1) + np.float32(0.5)).astype(np.intp)
    # Four channels, one of them unused: NumPy is slow where the last axis has three entries.
    photograph = block.crop((left, 0, right, block.height)).tobytes("raw", "RGBX")
    pixels = np.frombuffer(photograph, np.uint8).reshape(*strength.shape, 4).astype(np.uint16)
    pixels *= _KEPT.take(strength).view(np.uint16).reshape(pixels.shape)
    pixels += _ADDED.take(strength).view(np.uint16).reshape(pixels.shape)
    pixels >>= 8
    size = right - left, block.height
    drawn = block.copy()
    drawn.paste(Image.frombuffer("RGB", size, pixels.astype(np.uint8), "raw", "RGBX", 0, 1), (left, 0))
    return drawn


def _tables() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """For each strength what a pixel is multiplied with, and what is added, in 1/256: four uint16 in one number."""
    rgb, opacity = colours(np.linspace(0, 1, _N_COLOURS))
    kept = (256 * (1 - opacity[:, None])).round() * np.ones(4)
    added = np.zeros((_N_COLOURS, 4))
    added[:, :3] = (rgb * (256 - kept[:, :3])).round() + 128  # a half, to round
    as_one = (table.astype(np.uint16).view(np.uint64)[:, 0] for table in (kept, added))
    return next(as_one), next(as_one)


_KEPT, _ADDED = _tables()


def _blocks(image: NDArray[np.uint8]) -> Iterator[slice]:
    """Rows of an image, so many at a time that memory beside the image is small."""
    n = max(1, _BLOCK // image.shape[1])
    return (slice(start, start + n) for start in range(0, len(image), n))


def overlay(
    image: NDArray[np.uint8], anomaly_map: NDArray[np.float32], caption: str, low: float, high: float
) -> Image.Image:
    """Photograph and heat map side by side, over a line of text.

    Args:
        image: (H, W, 3), uint8, RGB.
        anomaly_map: of the whole photograph, float32, (H, W) or of another size, and then enlarged (bilinear).
        caption: the text.
        low, high: map values drawn as nothing and as the full colour. Constants of the run, not of the image, so that
            a normal image stays dark.
    """
    height, width = image.shape[:2]
    text_size = int(np.clip(height / 22, 11, 40))
    font = ImageFont.load_default(text_size)
    strip = 2 * text_size
    gap = max(2, width // 100)
    canvas = Image.new("RGB", (2 * width + gap, height + strip), BACKGROUND)
    source = Image.fromarray(anomaly_map)
    for rows in _blocks(image):
        block = Image.fromarray(image[rows])
        canvas.paste(block, (0, rows.start))
        canvas.paste(_heat(block, height, rows, anomaly_map, source, low, high), (width + gap, rows.start))
    draw = ImageDraw.Draw(canvas)
    draw.text((text_size // 2, height + text_size // 2), caption, font=font, fill=FOREGROUND)
    return canvas
