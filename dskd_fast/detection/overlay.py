"""Heat maps for people: the photograph beside itself under its anomaly map."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Violet to red, orange and white. Opacity rises with the score: where nothing is wrong the photograph shows through.
_STOPS = np.array([0.0, 0.35, 0.7, 1.0])
_COLOURS = np.array([[40, 0, 90], [200, 20, 60], [255, 160, 0], [255, 255, 190]], dtype=np.float64)
_OPACITY = 0.75
# Pixels that are drawn at a time: their colours are made in float64, 24 bytes each and several times over.
_BLOCK = 2**16

# Full colour where there is no threshold: standard deviations above the normal mean.
_FULL_COLOUR = 20.0

BACKGROUND = (24, 24, 24)
FOREGROUND = (235, 235, 235)


def full_colour(threshold: float | None) -> float:
    """The map value that is drawn in full colour; 0, the normal mean, is drawn as nothing."""
    # The threshold is where the colours are half way, so what is bright decided.
    return 2 * threshold if threshold is not None and threshold > 0 else _FULL_COLOUR


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
    """The photograph (H, W, 3) under its map (H, W), uint8; see `overlay`."""
    drawn = np.empty_like(image)
    for rows in _blocks(image):
        rgb, opacity = colours(np.clip((anomaly_map[rows] - low) / max(high - low, 1e-12), 0, 1))
        opacity = opacity[..., None]
        drawn[rows] = (image[rows] * (1 - opacity) + rgb * opacity).round()
    return drawn


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
        anomaly_map: (H, W).
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
    for rows in _blocks(image):
        canvas.paste(Image.fromarray(image[rows]), (0, rows.start))
        canvas.paste(Image.fromarray(heat(image[rows], anomaly_map[rows], low, high)), (width + gap, rows.start))
    draw = ImageDraw.Draw(canvas)
    draw.text((text_size // 2, height + text_size // 2), caption, font=font, fill=FOREGROUND)
    return canvas
