import io
import json

import numpy as np
import pytest
from PIL import Image

IMAGE = np.zeros((40, 64, 3), np.uint8)

CONFIG = [
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True},
    {"defect_name": "long", "pixel_value": 254, "saturation_threshold": 150, "relative_saturation": False},
    {"defect_name": "huge", "pixel_value": 253, "saturation_threshold": 10**400, "relative_saturation": False},
    {"defect_name": "tiny", "pixel_value": 252, "saturation_threshold": 0.1, "relative_saturation": True},
]


def write(root, *names):
    """Empty files: discovery must not open an image."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def numbered(folder, n, end=".png"):
    return [f"{folder}/{i:03d}{end}" for i in range(n)]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def blob(value=255, rows=slice(5, 15), columns=slice(10, 30), shape=(40, 64)):
    mask = np.zeros(shape, np.uint8)
    mask[rows, columns] = value
    return mask


def item_of(category, key):
    (item,) = [item for item in category.test if item.key == key]
    return item


def mvtec_ad(root, name, **n_images):
    write(root / name, *numbered("train/good", 20), *numbered("test/good", 3))
    for folder, n in n_images.items():
        write(root / name, *numbered(f"test/{folder}", n), *numbered(f"ground_truth/{folder}", n, "_mask.png"))


def encode(image, format, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def loco(tmp_path):
    root = tmp_path / "data" / "screw_bag"
    write(root, *numbered("train/good", 12), *numbered("validation/good", 3), *numbered("test/good", 2))
    for folder, n in (("logical_anomalies", 2), ("structural_anomalies", 1)):
        for i in range(n):
            save(root / "test" / folder / f"{i:03d}.png", IMAGE)
            save(root / "ground_truth" / folder / f"{i:03d}/000.png", blob())
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root
