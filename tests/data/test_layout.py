import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd_fast.data.images import ImageError
from dskd_fast.data.layout import (
    DataNotFound,
    GroundTruth,
    MaskError,
    default_data_root,
    list_categories,
    open_category,
    unused_sentences,
)
from dskd_fast.data.store import ImageStore
from dskd_fast.errors import UserError


def touch(folder, *names):
    """Empty files: discovery must not open an image."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def numbered(n, suffix=".png"):
    return [f"{i:03d}{suffix}" for i in range(n)]


def blob(value=255, rows=slice(5, 15), columns=slice(10, 30), shape=(40, 64)):
    mask = np.zeros(shape, np.uint8)
    mask[rows, columns] = value
    return mask


IMAGE = np.zeros((40, 64, 3), np.uint8)

CONFIG = [
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True},
    {"defect_name": "long", "pixel_value": 254, "saturation_threshold": 150, "relative_saturation": False},
    {"defect_name": "huge", "pixel_value": 253, "saturation_threshold": 9999, "relative_saturation": False},
    {"defect_name": "tiny", "pixel_value": 252, "saturation_threshold": 0.1, "relative_saturation": True},
]


@pytest.fixture
def loco(tmp_path):
    root = tmp_path / "data" / "screw_bag"
    touch(root / "train/good", *numbered(12))
    touch(root / "validation/good", *numbered(3))
    touch(root / "test/good", *numbered(2))
    for folder, n in (("logical_anomalies", 2), ("structural_anomalies", 1)):
        for name in numbered(n):
            save(root / "test" / folder / name, IMAGE)
            save(root / "ground_truth" / folder / name.removesuffix(".png") / "000.png", blob())
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def item_of(category, key):
    (item,) = [item for item in category.test if item.key == key]
    return item


def test_loco(loco):
    category = open_category(loco.parent, "screw_bag")
    assert (category.name, category.root, category.layout) == ("screw_bag", loco, "loco")
    assert category.train == tuple(loco / "train/good" / name for name in numbered(12))
    assert category.validation == tuple(loco / "validation/good" / name for name in numbered(3))
    assert category.validation_source == "folder"
    assert category.n_images == {
        "train": 12,
        "validation": 3,
        "test/good": 2,
        "test/structural": 1,
        "test/logical": 2,
    }
    assert [(item.key, item.folder, item.kind) for item in category.test] == [
        ("test/good/000", "good", "good"),
        ("test/good/001", "good", "good"),
        ("test/logical_anomalies/000", "logical_anomalies", "logical"),
        ("test/logical_anomalies/001", "logical_anomalies", "logical"),
        ("test/structural_anomalies/000", "structural_anomalies", "structural"),
    ]
    assert category.localisation_obstacle("structural") is None
    assert category.localisation_obstacle("logical") is None
    assert category.defects(category.test[0]) == []


def test_loco_defects_and_their_saturation(loco):
    folder = loco / "ground_truth/logical_anomalies/000"
    # 10 x 20 = 200 pixels; 7 x 3 = 21; 200 < 9999; 3 x 3 = 9.
    save(folder / "000.png", blob(255))
    save(folder / "001.png", blob(254))
    save(folder / "002.png", blob(253))
    save(folder / "003.png", blob(255, slice(0, 7), slice(0, 3)))
    save(folder / "004.png", blob(252, slice(0, 3), slice(0, 3)))
    # Two regions are one defect here.
    save(folder / "010.png", blob(255) | blob(255, slice(30, 40), slice(40, 60)))
    category = open_category(loco, None)
    defects = category.defects(item_of(category, "test/logical_anomalies/000"))
    # int(0.5 * 200), min(150, 200), min(9999, 200), int(0.5 * 21), at least 1 for int(0.1 * 9), int(0.5 *
    # 400)
    assert [defect.saturation for defect in defects] == [100, 150, 200, 10, 1, 200]
    assert [defect.name for defect in defects] == ["missing", "long", "huge", "missing", "tiny", "missing"]
    assert [defect.mask.sum() for defect in defects] == [200, 200, 200, 21, 9, 400]
    assert all(defect.mask.dtype == bool for defect in defects)
    np.testing.assert_array_equal(defects[0].mask, blob() > 0)


def test_loco_masks_without_a_configuration_saturate_at_their_area(loco):
    (loco / "defects_config.json").unlink()
    category = open_category(loco, None)
    assert category.layout == "loco"
    (defect,) = category.defects(item_of(category, "test/logical_anomalies/000"))
    assert (defect.saturation, defect.name) == (200, "logical_anomalies")


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (blob(7), "pixel value 7"),
        (blob(0), "empty"),
        (blob(shape=(40, 63)), "63 x 40"),
        (blob(shape=(64, 40), columns=slice(0, 9)), "40 x 64"),
        (blob(255) + blob(254, slice(20, 30)), "2 values"),
    ],
)
def test_bad_loco_masks(loco, mask, reason):
    path = loco / "ground_truth/logical_anomalies/000/000.png"
    save(path, mask)
    category = open_category(loco, None)
    with pytest.raises(MaskError, match=reason) as caught:
        category.defects(item_of(category, "test/logical_anomalies/000"))
    assert str(path) in str(caught.value)


def test_all_bad_masks_are_named_and_hide_neither_the_good_ones_nor_each_other(loco):
    folder = loco / "ground_truth/logical_anomalies"
    damaged, lossy, other = folder / "000/000.png", folder / "000/001.JPG", folder / "001/000.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    save(lossy, blob())
    save(other, blob(7))
    category = open_category(loco, None)
    with pytest.raises(MaskError) as caught:
        category.defects(item_of(category, "test/logical_anomalies/000"))
    reasons = caught.value.reasons
    assert len(reasons) == 2
    assert f"the mask {damaged} is unusable: it is damaged" in reasons[0]
    assert f"the mask {lossy} is in a format that may smear" in reasons[1]

    truth = GroundTruth(category)
    for _ in range(2):  # as for two variants of the maps
        found = {item.key: truth.defects(item) for item in category.test}
    assert [defect.saturation for defect in found["test/structural_anomalies/000"]] == [100]
    assert found["test/logical_anomalies/000"] is found["test/logical_anomalies/001"] is None
    assert found["test/good/000"] == []
    assert truth.bad_masks("structural") == []
    assert truth.bad_masks() == truth.bad_masks("logical")
    assert truth.bad_masks()[:2] == list(reasons)
    assert f"{other} holds the pixel value 7" in truth.bad_masks()[2]
    assert len(truth.bad_masks()) == 3


@pytest.mark.parametrize(
    ("file", "kinds", "sentence"),
    [
        ("bad/1_mask.png", ["structural"], "{0} belongs to no image of {root}/test/bad"),
        ("bad/01/0.png", ["structural"], "{0} belongs to no image of {root}/test/bad"),
        ("bad/0/deep/0.png", ["structural"], "{0} belongs to no image of {root}/test/bad"),
        ("bad/0.tif", ["structural"], "{0} is a second one beside {root}/ground_truth/bad/0_mask.PNG"),
        ("bad/0_mask.webp", ["structural"], "{0} is a second one beside {root}/ground_truth/bad/0_mask.PNG"),
        ("logical_anomalies/0.png", ["logical"], "{root}/ground_truth/logical_anomalies holds masks, but {root}/test/"),
        ("0.png", ["structural", "logical"], "{0} lies directly in {root}/ground_truth"),
    ],
)
def test_a_mask_without_an_image_of_its_own_is_named(tmp_path, file, kinds, sentence):
    touch(tmp_path / "train/good", "0.png")
    save(tmp_path / "test/bad/0.png", IMAGE)
    touch(tmp_path / "test/good", "0.png")
    save(tmp_path / "ground_truth/bad/0_mask.PNG", blob())
    category = open_category(tmp_path, None)
    assert (category.stray_masks, category.unused) == ({}, {})
    save(tmp_path / "ground_truth" / file, blob())
    category = open_category(tmp_path, None)
    assert sorted(category.stray_masks) == sorted(kinds)
    expected = sentence.format(tmp_path / "ground_truth" / file, root=tmp_path)
    for kind in kinds:
        (found,) = category.stray_masks[kind]
        assert expected in found
    truth = GroundTruth(category)
    assert truth.bad_masks() == [found]
    assert (truth.defects(item_of(category, "test/bad/0")) is None) == ("structural" in kinds)


def test_masks_fit_images_that_exif_turns(loco):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(IMAGE.transpose(1, 0, 2).copy()).save(loco / "test/logical_anomalies/000.png", exif=exif)
    category = open_category(loco, None)
    (defect,) = category.defects(item_of(category, "test/logical_anomalies/000"))
    assert defect.mask.shape == (40, 64)


def test_missing_ground_truth_is_no_ground_truth_rather_than_no_defect(loco):
    (loco / "ground_truth/logical_anomalies/001/000.png").unlink()
    category = open_category(loco, None)
    assert category.defects(item_of(category, "test/logical_anomalies/001")) is None
    assert category.defects(item_of(category, "test/logical_anomalies/000")) is not None
    assert category.localisation_obstacle("structural") is None
    obstacle = category.localisation_obstacle("logical")
    assert re.search(r"1 of the \d+ logical test images", obstacle)
    assert str(loco / "test/logical_anomalies/001.png") in obstacle


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{not json", "JSON"),
        ('{"a": 1}', "list"),
        ("[3]", "entry 1 .* lacks defect_name"),
        (
            [CONFIG[0], {k: v for k, v in CONFIG[1].items() if k != "pixel_value"}],
            "entry 2 .* lacks pixel_value",
        ),
        ([CONFIG[0] | {"pixel_value": 0}], "pixel_value"),
        ([CONFIG[0] | {"pixel_value": 256}], "pixel_value"),
        ([CONFIG[0] | {"pixel_value": True}], "pixel_value"),
        ([CONFIG[0] | {"defect_name": 3}], "defect_name"),
        ([CONFIG[0] | {"relative_saturation": 1}], "relative_saturation"),
        ([CONFIG[0] | {"saturation_threshold": 1.5}], "must not exceed 1"),
        ([CONFIG[0] | {"saturation_threshold": 0}], "positive"),
        ([CONFIG[0] | {"saturation_threshold": float("nan")}], "positive"),
        ([CONFIG[0] | {"saturation_threshold": "1"}], "positive"),
        ([CONFIG[1] | {"saturation_threshold": 1.5}], "counts pixels"),
        ([CONFIG[0], CONFIG[1] | {"pixel_value": 255}], "255 another"),
    ],
)
def test_bad_defects_config(loco, content, reason):
    path = loco / "defects_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=reason) as caught:
        open_category(loco, None)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["Defects_Config.json", "defect-config.JSON"])
def test_a_defects_config_under_another_name_is_refused(loco, name):
    path = (loco / "defects_config.json").rename(loco / name)
    with pytest.raises(
        UserError, match=re.escape(f"{path} is not read under this name; rename it to defects_config.json")
    ):
        open_category(loco, None)


def mvtec_ad(root, name, **n_images):
    touch(root / name / "train/good", *numbered(20))
    touch(root / name / "test/good", *numbered(3))
    for folder, n in n_images.items():
        touch(root / name / "test" / folder, *numbered(n))
        touch(root / name / "ground_truth" / folder, *[f"{i:03d}_mask.png" for i in range(n)])


def test_the_papers_37_logical_images_of_mvtec_ad(tmp_path):
    # The numbers of images are those of MVTec AD.
    mvtec_ad(tmp_path, "cable", bent_wire=13, cable_swap=12, combined=11, cut_inner_insulation=14)
    mvtec_ad(tmp_path, "capsule", crack=23, faulty_imprint=22, poke=21)
    mvtec_ad(tmp_path, "transistor", bent_lead=10, cut_lead=10, damaged_case=10, misplaced=10)
    mvtec_ad(tmp_path, "bottle", cable_swap=4, misplaced=4, combined=10, faulty_imprint=6)
    logical = Counter()
    keys = set()
    for name in ("cable", "capsule", "transistor", "bottle"):
        category = open_category(tmp_path, name)
        assert category.layout == "mvtec_ad"
        assert category.localisation_obstacle("structural") is None
        assert category.n_images["test/good"] == 3
        for item in category.test:
            logical[name] += item.kind == "logical"
            keys |= {f"{name}/{item.key}"} if item.kind == "logical" else set()
        assert category.n_images["test/logical"] == logical[name]
        assert category.n_images["test/structural"] == len(category.test) - 3 - logical[name]
    assert logical == {"cable": 15, "capsule": 2, "transistor": 20, "bottle": 0}
    assert logical.total() == 37
    assert {key for key in keys if "combined" in key or "imprint" in key} == {
        "cable/test/combined/005",
        "cable/test/combined/007",
        "cable/test/combined/009",
        "capsule/test/faulty_imprint/004",
        "capsule/test/faulty_imprint/005",
    }


def test_mvtec_ad_defects_are_the_8_connected_components(tmp_path):
    mvtec_ad(tmp_path, "bottle", broken=1)
    mask = np.zeros((40, 64), np.uint8)
    mask[2:4, 2:4] = 255
    # Touches the first at a corner; the value does not matter.
    mask[4, 4] = 1
    mask[20:30, 20:40] = 255
    save(tmp_path / "bottle/test/broken/000.png", IMAGE)
    save(tmp_path / "bottle/ground_truth/broken/000_mask.png", mask)
    category = open_category(tmp_path, "bottle")
    defects = category.defects(item_of(category, "test/broken/000"))
    assert [(defect.saturation, defect.name) for defect in defects] == [(5, "broken"), (200, "broken")]
    np.testing.assert_array_equal(defects[0].mask | defects[1].mask, mask > 0)
    assert not (defects[0].mask & defects[1].mask).any()


def test_noise_in_place_of_a_mask_is_refused(tmp_path):
    mvtec_ad(tmp_path, "bottle", broken=1)
    save(tmp_path / "bottle/test/broken/000.png", np.zeros((100, 100, 3), np.uint8))
    dots = np.zeros((100, 100), np.uint8)
    dots[::2, ::2] = 255
    save(tmp_path / "bottle/ground_truth/broken/000_mask.png", dots)
    category = open_category(tmp_path, "bottle")
    with pytest.raises(UserError, match=r"000_mask\.png has 2500 separate regions"):
        category.defects(item_of(category, "test/broken/000"))


@pytest.mark.parametrize("mask_name", ["ein Kratzer.1.png", "ein Kratzer.1_mask.png", "ein Kratzer.1/0.png"])
def test_own_folder_with_any_mask_convention(tmp_path, mask_name):
    root = tmp_path / "Prüfling 7"
    touch(root / "train/good", *numbered(5))
    touch(root / "test/good", "gut.jpg")
    save(root / "test/größer Kratzer/ein Kratzer.1.bmp", IMAGE)
    save(root / "ground_truth/größer Kratzer" / mask_name, blob(1))
    category = open_category(tmp_path, "Prüfling 7")
    item = item_of(category, "test/größer Kratzer/ein Kratzer.1")
    assert item.kind == "structural"
    (defect,) = category.defects(item)
    assert (defect.saturation, defect.name) == (200, "größer Kratzer")
    assert category.localisation_obstacle("structural") is None


def test_a_folder_named_logical_anomalies_is_logical(tmp_path):
    touch(tmp_path / "train/good", "0.png")
    for folder in ("logical_anomalies", "scratch"):
        touch(tmp_path / "test" / folder, "0.png")
    category = open_category(tmp_path, None)
    assert {item.folder: item.kind for item in category.test} == {
        "logical_anomalies": "logical",
        "scratch": "structural",
    }


@pytest.mark.parametrize("below", ["", "train", "train/good"])
def test_images_alone_are_enough(tmp_path, below):
    root = tmp_path / "mine"
    touch(root / below, *numbered(4), "notes.txt", ".hidden.png")
    for category in (open_category(root, None), open_category(tmp_path, "mine"), open_category(root, "mine")):
        assert category.name == "mine"
        assert category.layout == "folder"
        assert category.train == tuple(root / below / name for name in numbered(4))
        assert (category.validation, category.validation_source, category.test) == ((), "none", ())
        assert category.defect_types is None
        assert "no structural test images" in category.localisation_obstacle("structural")


def test_a_subfolder_of_that_name_wins_over_the_folder_itself(tmp_path):
    root = tmp_path / "a"
    touch(root, "0.png")
    touch(root / "a", "1.png")
    assert open_category(root, "a").train == (root / "a" / "1.png",)
    with pytest.raises(UserError, match=r"a/a holds images that would not be used"):
        open_category(root, None)


def test_the_name_of_the_working_directory(tmp_path, monkeypatch):
    touch(tmp_path / "mine", "0.png")
    monkeypatch.chdir(tmp_path / "mine")
    assert open_category(".", None).name == "mine"


@pytest.mark.parametrize(
    ("n", "holdout", "n_held_out"),
    [(9, 0.5, 0), (10, 0.1, 2), (10, 0.01, 2), (10, 0.99, 9), (30, 0.1, 3), (100, 0.25, 25), (100, 0, 0)],
)
def test_holdout(tmp_path, n, holdout, n_held_out):
    touch(tmp_path, *numbered(n))
    category = open_category(tmp_path, None, holdout=holdout)
    assert len(category.validation) == n_held_out
    assert category.validation_source == ("holdout" if n_held_out else "none")
    assert sorted(category.train + category.validation) == [tmp_path / name for name in numbered(n)]
    assert list(category.train) == sorted(category.train)
    assert list(category.validation) == sorted(category.validation)


def test_the_holdout_follows_the_seed_and_the_names_alone(tmp_path):
    for folder in ("a", "b"):
        touch(tmp_path / folder, *numbered(50))
    first = open_category(tmp_path, "a", seed=3)
    again = open_category(tmp_path, "b", seed=3)
    other = open_category(tmp_path, "a", seed=4)
    assert [path.name for path in first.validation] == [path.name for path in again.validation]
    assert first.validation != other.validation


def test_each_image_is_held_out_equally_often(tmp_path):
    touch(tmp_path, *numbered(20))
    counts = Counter()
    for seed in range(200):
        counts.update(path.name for path in open_category(tmp_path, None, holdout=0.25, seed=seed).validation)
    # Binomial(200, 1/4): mean 50, standard deviation 6.1; five of these on either side.
    assert all(20 <= counts[name] <= 80 for name in numbered(20))


@pytest.mark.parametrize("holdout", [-0.1, 1, 1.5, float("nan")])
def test_holdout_out_of_range(tmp_path, holdout):
    touch(tmp_path, "0.png")
    with pytest.raises(UserError, match="holdout"):
        open_category(tmp_path, None, holdout=holdout)


@pytest.mark.parametrize("below", ["validation/good", "validation"])
def test_a_validation_folder_wins_over_a_holdout(tmp_path, below):
    touch(tmp_path / "train/good", *numbered(20))
    touch(tmp_path / below, "v.png")
    category = open_category(tmp_path, None)
    assert category.validation == (tmp_path / below / "v.png",)
    assert category.validation_source == "folder"
    assert len(category.train) == 20


def test_equal_stems_in_a_test_folder(tmp_path):
    touch(tmp_path / "train/good", "a.png", "a.jpg")
    touch(tmp_path / "test/x", "b.png", "c.png", "b.JPG")
    touch(tmp_path / "test/y", "b.png")
    with pytest.raises(UserError, match="suffix") as caught:
        open_category(tmp_path, None)
    assert "b.JPG" in str(caught.value)
    assert "b.png" in str(caught.value)
    (tmp_path / "test/x/b.JPG").unlink()
    assert len(open_category(tmp_path, None).test) == 3


def test_images_directly_in_test(tmp_path):
    touch(tmp_path / "train/good", "a.png")
    touch(tmp_path / "test", "a.png")
    with pytest.raises(UserError, match="directly"):
        open_category(tmp_path, None)


@pytest.mark.parametrize("below", ["train", "train/good"])
def test_no_training_images(tmp_path, below):
    touch(tmp_path / "a" / below, "readme.txt")
    with pytest.raises(UserError, match="no training images") as caught:
        open_category(tmp_path, "a")
    assert str(tmp_path / "a/train/good") in str(caught.value)


def test_missing_data_root(tmp_path):
    with pytest.raises(DataNotFound) as caught:
        open_category(tmp_path / "nowhere", "screw_bag")
    message = str(caught.value)
    for part in (
        str(tmp_path / "nowhere"),
        "https://www.mvtec.com/company/research/datasets/mvtec-loco",
        "CC BY-NC-SA 4.0",
        "$DSKD_FAST_DATA",
        "--data-root",
        "dskd-fast demo",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("category", ["screw_bag", None])
def test_data_root_without_categories(tmp_path, category):
    touch(tmp_path / "empty")
    with pytest.raises(DataNotFound, match="neither"):
        open_category(tmp_path, category)


@pytest.mark.parametrize("category", ["screwbag", None])
def test_a_missing_category_names_those_there_are(loco, category):
    touch(loco.parent / "pictures", "a.png")
    touch(loco.parent / "empty")
    touch(loco.parent / ".hidden", "a.png")
    with pytest.raises(UserError, match=r"choose one of: pictures, screw_bag$") as caught:
        open_category(loco.parent, category)
    assert not isinstance(caught.value, DataNotFound)


def test_another_category_is_not_quietly_taken(loco):
    with pytest.raises(UserError, match="holds no category pushpins"):
        open_category(loco, "pushpins")


def test_a_category_folder_without_images(tmp_path):
    touch(tmp_path / "a")
    with pytest.raises(UserError, match="no folder train or test and no images"):
        open_category(tmp_path, "a")


@pytest.mark.parametrize("category", ["", ".", "..", "a/b", "/etc", "a\\b"])
def test_a_category_is_a_plain_name(loco, category):
    with pytest.raises(UserError, match="name of a folder"):
        open_category(loco.parent, category)


def test_data_root_is_a_file(tmp_path):
    touch(tmp_path, "a.zip")
    with pytest.raises(UserError, match="is a file"):
        open_category(tmp_path / "a.zip", None)


def test_default_data_root(monkeypatch):
    monkeypatch.setenv("DSKD_FAST_DATA", "/somewhere/ä b")
    assert default_data_root() == Path("/somewhere/ä b")
    for clear in (
        lambda: monkeypatch.setenv("DSKD_FAST_DATA", ""),
        lambda: monkeypatch.delenv("DSKD_FAST_DATA"),
    ):
        clear()
        assert default_data_root() == Path("mvtec_loco_anomaly_detection")


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "mine", "a.png")
    assert open_category("~/mine", None).root == tmp_path / "mine"


def test_a_test_set_alone_is_a_category_without_training_images(tmp_path):
    touch(tmp_path / "mine/test/good", *numbered(2))
    category = open_category(tmp_path, "mine")
    assert (category.train, category.validation, len(category.test)) == ((), (), 2)


BASE = ("train/good/0.png", "test/good/0.png", "test/bad/0.png")


def write(root, *names):
    for name in names:
        touch((root / name).parent, Path(name).name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        # What would not be used.
        (["train/good/line 2/1.gif"], "train/good/line 2 holds images that would not be used; move good ones to"),
        (["train/good2/1.png"], "train/good2 holds images that would not be used"),
        (["train/bad/a/b/1.png"], "train/bad/a/b holds images that would not be used"),
        (["train/1.png"], "train holds images that would not be used, 1.png among them, because .*train/good has some"),
        (["validation/1.png", "validation/good/2.heic"], "validation holds images that would not be used, 1.png"),
        (["validation/1.png", "validation/cam/2.png"], "validation/cam holds images that would not be used"),
        (["validation/1.gif", "validation/2.gif"], "none of the 2 image files in .*validation is of a format"),
        (["test/bad/cam1/10.png"], "test/bad/cam1 holds images that would not be used; .* such as .*/test/bad_cam1"),
        (["test/good/a/b/1.png"], "test/good/a/b holds images that would not be used"),
        (["test/1.gif"], "test holds images directly"),
        (["test/bad/0_mask.png"], "test/bad/0_mask.png looks like the mask of the image beside it"),
        (["test/ground_truth/bad/0.png"], "test/ground_truth looks like the masks"),
        (["test/masks/0.png"], "test/masks looks like the masks"),
        # Names that are nearly right.
        *(([f"{name}/good/1.png"], f"{name} .* looks like the folder validation; rename it to .*/validation")
          for name in ("val", "VAL", "Valid", "Validation", "validation_set")),
        *(([f"{name}/good/1.png"], f"{name} .* looks like the folder train")
          for name in ("Train", "training", "train-images")),
        *(([f"{name}/bad/1.png"], f"{name} .* looks like the folder test") for name in ("Test", "testing")),
        *(([f"{name}/bad/0.png"], f"{name} .* looks like the folder ground_truth")
          for name in ("groundtruth", "ground-truth", "Ground Truth", "GT", "masks")),
        *(([f"{split}/{name}/1.png"], f"{split}/{name} .* looks like the folder good")
          for split in ("train", "test") for name in ("Good", "GOOD", "ok", "OK", "normal")),
        (["validation/normal/1.png"], "validation/normal .* looks like the folder good; rename it to .*/validation/go"),
        (["test/logical/1.png"], "test/logical .* looks like the folder logical_anomalies"),
        (["test/Logical Anomalies/1.png"], "Logical Anomalies .* looks like the folder logical_anomalies"),
    ],
)  # fmt: skip
def test_images_that_would_be_passed_over_or_misjudged_are_an_error(tmp_path, files, message):
    write(tmp_path, *BASE)
    assert open_category(tmp_path, None).unused == {}
    write(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        open_category(tmp_path, None)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["0.png", "cam1/1.png"], "cam1 holds images that would not be used; move good ones to"),
        (["0.png", "Test/bad/1.png"], "Test .* looks like the folder test"),
        (["0.gif", "1.heic"], "none of the 2 image files in .* is of a format that is read, 0.gif among them"),
        (["Train/good/0.png"], "Train .* looks like the folder train"),
        (["train/ok/0.png"], "train/ok .* looks like the folder good"),
        (["train/0.gif"], "none of the 1 image files in .*train is of a format that is read"),
    ],
)
def test_a_folder_of_good_images_is_looked_at_as_closely(tmp_path, files, message):
    write(tmp_path / "part", *files)
    with pytest.raises(UserError, match=message):
        open_category(tmp_path, "part")


def test_image_files_that_nothing_reads_are_listed(tmp_path):
    write(tmp_path, *BASE, "ground_truth/good/0.png")
    write(tmp_path, *(f"train/good/{i}.gif" for i in range(1, 6)), "test/bad/9.HEIC")
    write(tmp_path, "preview.webp", "Thumbs.db", "new/a/1.png", "new/notes.txt", ".cache/1.png", "train/good/._0.png")
    write(tmp_path, "results/overlays/0.png")
    (tmp_path / "results/predictions.csv").write_text("path,score,threshold,decision,overlay,map,error\n")
    category = open_category(tmp_path, None)
    assert category.n_images == {"train": 1, "validation": 0, "test/good": 1, "test/structural": 1, "test/logical": 0}
    assert category.stray_masks == {}
    assert {what: len(paths) for what, paths in category.unused.items()} == {
        "formats that are not read": 6,
        "directly in the folder of the category": 1,
        "in folders that have no meaning here": 1,
        "drawn by an earlier prediction": 1,
        "masks of good images": 1,
    }
    assert set(unused_sentences(category.unused_summary)) == {
        "not used: 6 image files (formats that are not read): "
        "train/good/1.gif, train/good/2.gif, train/good/3.gif, ...",
        "not used: 1 image file (directly in the folder of the category): preview.webp",
        "not used: 1 image file (in folders that have no meaning here): new/a/1.png",
        "not used: 1 image file (drawn by an earlier prediction): results/overlays/0.png",
        "not used: 1 image file (masks of good images): ground_truth/good/0.png",
    }
    json.dumps(category.unused_summary)


@pytest.mark.parametrize("where", [".", "results"])
def test_results_of_a_prediction_among_good_images_are_listed_and_not_trained_on(tmp_path, where):
    write(tmp_path, "0.png", *(f"{where}/{folder}/0.png" for folder in ("overlays", "maps")))
    (tmp_path / where / "predictions.csv").write_text("path,score,threshold,decision,overlay,map,error,skipped\n")
    category = open_category(tmp_path, None)
    assert category.train == (tmp_path / "0.png",)
    assert {what: len(paths) for what, paths in category.unused.items()} == {"drawn by an earlier prediction": 2}


def test_the_published_layouts_and_links_have_nothing_to_complain_of(loco, tmp_path):
    mvtec_ad(tmp_path, "cable", bent_wire=2, cable_swap=2)
    for root in (loco, tmp_path / "cable"):
        write(root, "license.txt", "readme.txt", ".DS_Store", "train/.DS_Store", "test/good/Thumbs.db")
    (loco / "ground_truth/logical_anomalies/001/000.png").unlink()
    (loco / "ground_truth/logical_anomalies/001").rmdir()
    (loco / "ground_truth/logical_anomalies/001").symlink_to(loco / "ground_truth/logical_anomalies/000")
    # Another spelling as a link to the folder, as for data that also another program reads.
    (tmp_path / "cable/Test").symlink_to(tmp_path / "cable/test")
    for root in (loco, tmp_path / "cable"):
        category = open_category(root, None)
        assert (category.unused, category.stray_masks) == ({}, {})
        assert category.localisation_obstacle("logical") is None


def test_a_picture_beside_categories_is_no_category(tmp_path):
    write(tmp_path, "a/train/good/0.png", "b/0.png", "logo.svg")
    assert list_categories(tmp_path) == ["a", "b"]
    write(tmp_path, "preview.png")
    with pytest.raises(UserError, match=r"is itself a category, since it holds images directly, as preview\.png"):
        list_categories(tmp_path)
    assert open_category(tmp_path, "a").n_images["train"] == 1


@pytest.mark.parametrize("names", [("good", "bad"), ("OK", "NG"), ("defects", "line 1"), ("normal",)])
def test_classes_are_not_taken_for_categories(tmp_path, names):
    write(tmp_path, *(f"{name}/0.png" for name in names))
    for find in (list_categories, lambda root: open_category(root, None)):
        with pytest.raises(
            UserError, match=f"{names[0]}.* looks like a class of images.* put good images into .*/train/"
        ):
            find(tmp_path)
    write(tmp_path, *(f"{name}/train/0.png" for name in names))
    for name in names:
        (tmp_path / name / "0.png").unlink()
    assert sorted(list_categories(tmp_path)) == sorted(names)


def test_a_folder_of_anomalous_images_is_not_trained_on(tmp_path):
    write(tmp_path, "good/0.png", "n.o.k./0.png")
    assert open_category(tmp_path, "good").train == (tmp_path / "good/0.png",)
    for root, name in ((tmp_path, "n.o.k."), (tmp_path / "n.o.k.", None)):
        with pytest.raises(UserError, match="looks by its name like a folder of anomalous images"):
            open_category(root, name)


def test_the_fingerprint_is_of_names_and_contents(tmp_path, write_images):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        for path in write_images(tmp_path / folder / "train", 3, seed=seed):
            Image.open(path).save(path.with_suffix(".bmp"))
            path.unlink()
    a, b, c = (open_category(tmp_path, name) for name in "abc")
    assert a.fingerprint == b.fingerprint
    # The same names and sizes, other pixels: what older versions took for the same.
    assert a.names_and_sizes == c.names_and_sizes
    assert a.fingerprint != c.fingerprint
    before = b.fingerprint
    shutil.copy(c.train[1], b.train[1])
    assert b.fingerprint != before
    shutil.copy(a.train[1], b.train[1])
    assert b.fingerprint == before
    b.train[0].rename(b.train[0].with_name("z.bmp"))
    assert open_category(tmp_path, "b").fingerprint != before


def test_a_dead_link_has_a_place_in_the_fingerprint(tmp_path, write_images):
    """It is named when images are read, with all others that cannot be."""
    write_images(tmp_path / "part", 3)
    whole = open_category(tmp_path / "part", None).fingerprint
    (tmp_path / "part" / "link.png").symlink_to(tmp_path / "nowhere.png")
    with_link = open_category(tmp_path / "part", None)
    assert with_link.fingerprint != whole
    with pytest.raises(ImageError, match=r"link\.png"):
        ImageStore(with_link.train, 32)
