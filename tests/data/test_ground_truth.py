import json

import numpy as np
import pytest
from PIL import Image

from dskd_fast.data.category import GroundTruth
from dskd_fast.data.ground_truth import MaskError
from dskd_fast.data.layout import open_category
from dskd_fast.errors import UserError

from .conftest import CONFIG, IMAGE, blob, item_of, mvtec_ad, numbered, save, write


def test_loco_defects_and_their_saturation(loco):
    folder = loco / "ground_truth/logical_anomalies/000"
    # Mask, name, saturation threshold, and area.
    expected = [
        (blob(255), "missing", int(0.5 * 200), 200),
        (blob(254), "long", min(150, 200), 200),
        (blob(253), "huge", 200, 200),
        (blob(255, slice(0, 7), slice(0, 3)), "missing", int(0.5 * 21), 21),
        (blob(252, slice(0, 3), slice(0, 3)), "tiny", 1, 9),  # where int(0.1 * 9) is none
        (blob(255) | blob(255, slice(30, 40), slice(40, 60)), "missing", 200, 400),  # two regions are one defect here
    ]
    for i, (mask, *_) in enumerate(expected):
        save(folder / f"{2 * i:03d}.png", mask)
    # An image that EXIF turns has masks of its upright size.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGE.transpose(1, 0, 2).copy()).save(loco / "test/logical_anomalies/000.png", exif=exif)
    for has_config in (True, False):
        if not has_config:
            (loco / "defects_config.json").unlink()
        category = open_category(loco, None)
        found = category.defects(item_of(category, "test/logical_anomalies/000"))
        for defect, (mask, name, saturation, area) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(defect.mask, mask > 0)
            wanted = (name, saturation) if has_config else ("logical_anomalies", area)
            assert (defect.name, defect.saturation) == wanted


def test_bad_loco_masks(loco):
    path, category = loco / "ground_truth/logical_anomalies/000/000.png", open_category(loco, None)
    for mask, reason in (
        (blob(7), "pixel value 7"),
        (blob(0), "empty"),
        (blob(shape=(64, 40), columns=slice(0, 9)), "40 x 64"),
        (blob(255) + blob(254, slice(20, 30)), "2 values"),
    ):
        save(path, mask)
        with pytest.raises(MaskError, match=f"{path} .*{reason}"):
            category.defects(item_of(category, "test/logical_anomalies/000"))


@pytest.mark.parametrize(
    ("file", "kinds", "sentence"),
    [
        ("bad/1_mask.png", {"structural"}, "1_mask.png belongs to no image of {0}/test/bad"),
        ("bad/0/deep/0.png", {"structural"}, "bad/0/deep/0.png belongs to no image of {0}/test/bad"),
        ("bad/0.tif", {"structural"}, "bad/0.tif is a second one beside {0}/ground_truth/bad/0_mask.PNG"),
        ("logical_anomalies/0.png", {"logical"}, "{0}/ground_truth/logical_anomalies holds masks, but {0}/test/"),
        ("0.png", {"structural", "logical"}, "0.png lies directly in {0}/ground_truth"),
    ],
)
def test_a_mask_without_an_image_of_its_own_is_named(tmp_path, file, kinds, sentence):
    write(tmp_path, "train/good/0.png", "test/good/0.png")
    save(tmp_path / "test/bad/0.png", IMAGE)
    save(tmp_path / "ground_truth/bad/0_mask.PNG", blob())
    category = open_category(tmp_path, None)
    assert (category.stray_masks, category.unused) == ({}, {})
    save(tmp_path / "ground_truth" / file, blob())
    category = open_category(tmp_path, None)
    truth = GroundTruth(category)
    (found,) = truth.bad_masks()
    assert sentence.format(tmp_path) in found
    assert category.stray_masks == dict.fromkeys(kinds, (found,))
    assert (truth.defects(item_of(category, "test/bad/0")) is None) == ("structural" in kinds)


def test_bad_defects_config(loco):
    path, (relative, absolute, *_) = loco / "defects_config.json", CONFIG
    for content, reason in (
        ("{not json", "JSON"),
        ('{"a": 1}', "list"),
        ([relative, {"defect_name": "long"}], "entry 2 .* lacks pixel_value"),
        *(([relative | {"pixel_value": x}], "pixel_value must be an integer") for x in (0, 256, True, "1")),
        ([relative | {"defect_name": 3}], "defect_name"),
        ([relative | {"relative_saturation": 1}], "relative_saturation must be true or false"),
        *(([absolute | {"saturation_threshold": x}], "positive") for x in (0, np.nan, np.inf, "1", True)),
        ([absolute | {"saturation_threshold": 1.5}], "counts pixels"),
        ([relative | {"saturation_threshold": 1.5}], "must not exceed 1"),
        ([relative, absolute | {"pixel_value": 255}], "255 another"),
    ):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=reason) as caught:
            open_category(loco, None)
        assert str(path) in str(caught.value)


def test_mvtec_ad_defects_are_the_8_connected_components(tmp_path):
    mvtec_ad(tmp_path, "bottle", broken=2)
    mask = blob(255, slice(2, 4), slice(2, 4)) | blob(255, slice(20, 30), slice(20, 40))
    mask[4, 4] = 1  # touches the first region at a corner; the value does not matter
    dots = np.zeros((100, 100), np.uint8)
    dots[::2, ::2] = 255
    for name, image, content in (("000", IMAGE, mask), ("001", np.zeros((100, 100, 3), np.uint8), dots)):
        save(tmp_path / f"bottle/test/broken/{name}.png", image)
        save(tmp_path / f"bottle/ground_truth/broken/{name}_mask.png", content)
    category = open_category(tmp_path, "bottle")
    defects = category.defects(item_of(category, "test/broken/000"))
    assert [(defect.saturation, defect.name) for defect in defects] == [(5, "broken"), (200, "broken")]
    np.testing.assert_array_equal(defects[0].mask | defects[1].mask, mask > 0)
    assert not (defects[0].mask & defects[1].mask).any()
    with pytest.raises(UserError, match=r"001_mask\.png has 2500 separate regions"):
        category.defects(item_of(category, "test/broken/001"))


@pytest.mark.parametrize("mask_name", ["ein Kratzer.1.png", "ein Kratzer.1_mask.png", "ein Kratzer.1/0.png"])
def test_own_folder_with_any_mask_convention(tmp_path, mask_name):
    root = tmp_path / "Prüfling 7"
    write(root, *numbered("train/good", 5), "test/good/gut.jpg")
    save(root / "test/größer Kratzer/ein Kratzer.1.bmp", IMAGE)
    save(root / "ground_truth/größer Kratzer" / mask_name, blob(1))
    category = open_category(tmp_path, "Prüfling 7")
    item = item_of(category, "test/größer Kratzer/ein Kratzer.1")
    assert item.kind == "structural"
    (defect,) = category.defects(item)
    assert (defect.saturation, defect.name) == (200, "größer Kratzer")
    assert category.localisation_obstacle("structural") is None
