"""Heat maps for people: the photograph beside itself under its anomaly map."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Violet to red, orange and white. Opacity rises with the score: where nothing is wrong the photograph shows through.
_STOPS = np.array([0.0, 0.35, 0.7, 1.0])
_COLOURS = np.array([[40, 0, 90], [200, 20, 60], [255, 160, 0], [255, 255, 190]], dtype=np.float64)
_OPACITY = 0.75


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
    strength = np.clip((anomaly_map - low) / max(high - low, 1e-12), 0, 1)[..., None]
    colours = np.stack([np.interp(strength[..., 0], _STOPS, _COLOURS[:, c]) for c in range(3)], axis=-1)
    opacity = _OPACITY * np.minimum(2 * strength, 1)
    heat = (image * (1 - opacity) + colours * opacity).round().astype(np.uint8)

    height, width = image.shape[:2]
    text_size = int(np.clip(height / 22, 11, 40))
    font = ImageFont.load_default(text_size)
    strip = 2 * text_size
    gap = max(2, width // 100)
    canvas = Image.new("RGB", (2 * width + gap, height + strip), (24, 24, 24))
    canvas.paste(Image.fromarray(image), (0, 0))
    canvas.paste(Image.fromarray(heat), (width + gap, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((text_size // 2, height + text_size // 2), caption, font=font, fill=(235, 235, 235))
    return canvas
