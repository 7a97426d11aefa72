import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd_fast.data.images import ImageError
from dskd_fast.data.layout import DataNotFound, default_data_root, open_category
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
    with pytest.raises(UserError, match=reason) as caught:
        category.defects(item_of(category, "test/logical_anomalies/000"))
    assert str(path) in str(caught.value)


def test_a_damaged_mask_is_named(loco):
    path = loco / "ground_truth/logical_anomalies/000/000.png"
    path.write_bytes(path.read_bytes()[:60])
    category = open_category(loco, None)
    with pytest.raises(ImageError) as caught:
        category.defects(item_of(category, "test/logical_anomalies/000"))
    assert str(path) in str(caught.value)


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
    assert open_category(root, None).train == (root / "0.png",)


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


@pytest.mark.parametrize("split", ["train/good", "train", "validation/good"])
def test_images_that_would_be_passed_over_are_an_error(tmp_path, split):
    touch(tmp_path / "train/good", "0.png")
    touch(tmp_path / split, "1.png")
    touch(tmp_path / split / "line 2", "2.png")
    if split == "train":
        (tmp_path / "train/good/0.png").unlink()
    with pytest.raises(UserError, match="line 2 holds images that would not be used"):
        open_category(tmp_path, None)


def test_a_dead_link_has_a_place_in_the_fingerprint(tmp_path, write_images):
    """It is named when images are read, with all others that cannot be."""
    write_images(tmp_path / "part", 3)
    whole = open_category(tmp_path / "part", None).fingerprint
    (tmp_path / "part" / "link.png").symlink_to(tmp_path / "nowhere.png")
    with_link = open_category(tmp_path / "part", None)
    assert with_link.fingerprint != whole
    with pytest.raises(ImageError, match=r"link\.png"):
        ImageStore(with_link.train, 32)
