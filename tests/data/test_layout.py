import errno
import json
import os
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd_fast.data.category import GroundTruth
from dskd_fast.data.ground_truth import MaskError
from dskd_fast.data.images import ImageError
from dskd_fast.data.layout import DataNotFound, list_categories, open_category
from dskd_fast.data.listing import list_folder
from dskd_fast.data.store import ImageStore
from dskd_fast.errors import UserError

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


def test_a_folder_is_listed_in_natural_order_by_suffixes(tmp_path):
    images = ["1.png", "2.PNG", "10.JpEg", "a b.bmp", "ä.tif", "ö.tiff", "ü.webp", "字.jpg"]
    others = ["2.GIF", "10.heic"]
    write(tmp_path, *images, *others, ".hidden.png", "._1.png", "notes.txt", "png", "gif", "x.png.part", "folder.png/a")
    listing = list_folder(tmp_path)
    assert [path.name for path in listing.images] == images
    assert [path.name for path in listing.others] == others
    with pytest.raises(UserError, match=r"cannot list the folder .*missing"):
        list_folder(tmp_path / "missing")


def test_loco(loco):
    category = open_category(loco.parent, "screw_bag")
    assert (category.name, category.root, category.layout) == ("screw_bag", loco, "loco")
    assert category.train == tuple(loco / name for name in numbered("train/good", 12))
    assert category.validation == tuple(loco / name for name in numbered("validation/good", 3))
    assert category.validation_source == "folder"
    assert category.n_images == {"train": 12, "validation": 3, "test/good": 2, "test/structural": 1, "test/logical": 2}
    assert [item.key for item in category.test] == [
        *(f"test/{folder}/00{i}" for folder in ("good", "logical_anomalies") for i in range(2)),
        "test/structural_anomalies/000",
    ]
    assert category.localisation_obstacle("structural") is category.localisation_obstacle("logical") is None
    assert category.defects(category.test[0]) == []
    (loco / "ground_truth/logical_anomalies/001/000.png").unlink()
    category = open_category(loco, None)
    assert category.defects(item_of(category, "test/logical_anomalies/001")) is None
    assert category.localisation_obstacle("structural") is None
    obstacle = category.localisation_obstacle("logical")
    assert re.search(rf"1 of the 2 logical test images .*{loco}/test/logical_anomalies/001\.png", obstacle)


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


def mvtec_ad(root, name, **n_images):
    write(root / name, *numbered("train/good", 20), *numbered("test/good", 3))
    for folder, n in n_images.items():
        write(root / name, *numbered(f"test/{folder}", n), *numbered(f"ground_truth/{folder}", n, "_mask.png"))


def test_the_papers_37_logical_images_of_mvtec_ad(tmp_path):
    # The numbers of images are those of MVTec AD.
    mvtec_ad(tmp_path, "cable", bent_wire=13, cable_swap=12, combined=11, cut_inner_insulation=14)
    mvtec_ad(tmp_path, "capsule", crack=23, faulty_imprint=22, poke=21)
    mvtec_ad(tmp_path, "transistor", bent_lead=10, cut_lead=10, damaged_case=10, misplaced=10)
    mvtec_ad(tmp_path, "bottle", cable_swap=4, misplaced=4, combined=10, faulty_imprint=6)
    for name, n_logical, n_structural, some in (
        ("cable", 15, 35, ["combined/005", "combined/007", "combined/009"]),
        ("capsule", 2, 64, ["faulty_imprint/004", "faulty_imprint/005"]),
        ("transistor", 20, 20, []),
        ("bottle", 0, 24, []),
    ):
        category = open_category(tmp_path, name)
        assert category.layout == "mvtec_ad"
        assert category.localisation_obstacle("structural") is None
        counts = {"test/good": 3, "test/structural": n_structural, "test/logical": n_logical}
        assert category.n_images == {"train": 18, "validation": 2} | counts
        logical = [
            item.key
            for item in category.test
            if item.kind == "logical" and item.folder in ("combined", "faulty_imprint")
        ]
        assert logical == [f"test/{name}" for name in some]


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


@pytest.mark.parametrize("below", [".", "train", "train/good"])
def test_images_alone_are_enough(tmp_path, monkeypatch, below):
    root = tmp_path / "mine"
    write(root, *numbered(below, 4), f"{below}/notes.txt", f"{below}/.hidden.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    for data_root, name in ((root, None), (tmp_path, "mine"), (root, "mine"), ("~/mine", None)):
        category = open_category(data_root, name)
        assert (category.name, category.layout) == ("mine", "folder")
        assert category.train == tuple(root / name for name in numbered(below, 4))
        assert (category.validation, category.validation_source, category.test) == ((), "none", ())
        assert category.defect_types is None
        assert "no structural test images" in category.localisation_obstacle("structural")
    monkeypatch.chdir(root)
    assert open_category(".", None).name == "mine"


@pytest.mark.parametrize(
    ("files", "data_root", "category", "error", "message"),
    [
        ("", "nowhere", "a", DataNotFound, r"nowhere does not exist; download .*CC BY-NC-SA 4.0.* https://www\.mvtec"),
        ("empty/a.txt", ".", "a", DataNotFound, r"neither .*--data-root or \$DSKD_FAST_DATA .*dskd-fast demo"),
        ("empty/a.txt", ".", "empty", UserError, "no folder train or test and no images"),
        ("a.zip", "a.zip", None, UserError, "is a file"),
        ("a/0.png b/train/0.png c/1.txt .d/0.png", ".", "e", UserError, "e.*choose one of: a, b$"),
        ("a/0.png b/train/0.png c/1.txt .d/0.png", ".", None, UserError, "choose one of: a, b$"),
        ("a/0.png", "a", "b", UserError, "holds no category b"),
        ("train/readme.txt", ".", None, UserError, "no training images in .*/train/good"),
        *(("a/0.png", ".", name, UserError, "name of a folder") for name in ("", ".", "..", "a/b", "/etc", "a\\b")),
    ],
)
def test_what_cannot_be_found_is_named_with_what_to_do(tmp_path, files, data_root, category, error, message):
    write(tmp_path, *files.split())
    with pytest.raises(UserError, match=message) as caught:
        open_category(tmp_path / data_root, category)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_a_picture_beside_categories_is_no_category(tmp_path):
    write(tmp_path, "a/train/good/0.png", "b/0.png", "logo.svg")
    assert list_categories(tmp_path) == ["a", "b"]
    write(tmp_path, "preview.png")
    with pytest.raises(UserError, match=r"is itself a category, since it holds images directly, as preview\.png"):
        list_categories(tmp_path)


@pytest.mark.parametrize("names", [("good", "bad"), ("OK", "n.o.k."), ("defects", "line 1"), ("normal",)])
def test_classes_are_not_taken_for_categories_and_anomalous_ones_not_trained_on(tmp_path, names):
    write(tmp_path, *(f"{name}/0.png" for name in names))
    for find in (list_categories, lambda root: open_category(root, None)):
        with pytest.raises(UserError, match=f"{names[0]}.* looks like a class of images.* put good images into .*/tr"):
            find(tmp_path)
    for name in names:
        if name in ("bad", "n.o.k.", "defects"):
            for root, category in ((tmp_path, name), (tmp_path / name, None)):
                with pytest.raises(UserError, match="looks by its name like a folder of anomalous images"):
                    open_category(root, category)
        else:
            assert open_category(tmp_path, name).train == (tmp_path / name / "0.png",)
        (tmp_path / name / "train").mkdir()
        (tmp_path / name / "0.png").rename(tmp_path / name / "train/0.png")
    assert sorted(list_categories(tmp_path)) == sorted(names)


def test_holdout(tmp_path):
    # How many images, the share, and how many of them that is.
    for n, share, expected in ((9, 0.5, 0), (10, 0.1, 2), (10, 0.99, 9), (30, 0.1, 3), (100, 0.25, 25), (100, 0, 0)):
        write(tmp_path, *numbered(".", n))
        category = open_category(tmp_path, None, holdout=share)
        assert (len(category.validation), category.validation_source) == (expected, "holdout" if expected else "none")
        assert sorted(category.train + category.validation) == [tmp_path / name for name in numbered(".", n)]
        for split in (category.train, category.validation):
            assert list(split) == sorted(split)
    for bad in (-0.1, 1, np.nan):
        with pytest.raises(UserError, match="holdout"):
            open_category(tmp_path, None, holdout=bad)


def test_the_holdout_follows_the_seed_and_the_names_alone_and_takes_each_image_equally_often(tmp_path):
    write(tmp_path, *numbered("a", 20), *numbered("b", 20))

    def held_out(name, seed):
        return [path.name for path in open_category(tmp_path, name, holdout=0.25, seed=seed).validation]

    assert held_out("a", 3) == held_out("b", 3) != held_out("a", 4)
    counts = Counter(name for seed in range(100) for name in held_out("a", seed))
    # Binomial(100, 1/4): mean 25, standard deviation 4.3; five of these on either side.
    assert [4 <= n <= 46 for n in counts.values()] == [True] * 20


BASE = ("train/good/0.png", "test/good/0.png", "test/bad/0.png")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        # What would not be used.
        (["train/good/line 2/1.gif"], "train/good/line 2 holds .* not be used, 1.gif among them; move .*/train/good,"),
        (["train/1.png"], "train holds .* not be used, 1.png among them; move good ones to .*train/good"),
        (["validation/1.png", "validation/good/2.heic"], "validation holds images that would not be used, 1.png"),
        (["validation/1.gif", "validation/2.gif"], "none of the 2 image files in .*validation is of a format"),
        (["test/bad/cam1/10.png"], "test/bad/cam1 holds .* move them to .*/test/bad, or to a folder of their own"),
        (["test/1.gif"], "test holds images .* move them to .*/test/good or to a folder named by defect"),
        (["test/bad/0_mask.png"], "test/bad/0_mask.png looks like the mask of the image beside it"),
        (["test/bad/0.JPG"], "0.png and 0.JPG differ only in their suffix|0.JPG and 0.png differ only"),
        (["test/ground_truth/bad/0.png"], "test/ground_truth looks like the masks"),
        # Names that are nearly right.
        *(([f"{name}/good/1.png"], f"{name} .* looks like the folder validation; rename it to .*/validation")
          for name in ("VAL", "Validation", "validation_set")),
        *(([f"{name}/good/1.png"], f"{name} .* looks like the folder train") for name in ("Train", "train-images")),
        *(([f"{name}/bad/0.png"], f"{name} .* looks like the folder ground_truth") for name in ("Ground Truth", "GT")),
        *(([f"{split}/Good/1.png"], f"{split}/Good .* looks like the folder good") for split in ("train", "test")),
        (["validation/normal/1.png"], "validation/normal .* looks like the folder good; rename it to .*/validation/go"),
        (["test/Logical Anomalies/1.png"], "Logical Anomalies .* looks like the folder logical_anomalies"),
        *(([name], f"{name} is not read under this name; rename it to defects_config.json")
          for name in ("Defects_Config.json", "defect-config.JSON")),
        # Without the usual folders.
        (["/0.png", "cam1/1.png"], "cam1 holds .* not be used, 1.png among them; move good ones to .*"),
        (["/Train/good/0.png"], "Train .* looks like the folder train"),
    ],
)  # fmt: skip
def test_images_that_would_be_passed_over_or_misjudged_are_an_error(tmp_path, files, message):
    is_alone = files[0].startswith("/")
    write(tmp_path, *(() if is_alone else BASE), *(name.lstrip("/") for name in files))
    with pytest.raises(UserError, match=message):
        open_category(tmp_path, None)


@pytest.mark.parametrize("is_flat", [True, False])
def test_a_folder_that_cannot_be_read_matters_only_beside_good_images(tmp_path, monkeypatch, is_flat):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    write(tmp_path, "0.png" if is_flat else "train/0.png", "lost+found/0.png")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot list .*lost\+found: Permission") if is_flat else nullcontext():
        assert open_category(tmp_path, None).n_images["train"] == 1


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
    # Another spelling as a link to the folder, as for data that also another program reads; and a link back up.
    (tmp_path / "cable/Test").symlink_to(tmp_path / "cable/test")
    (tmp_path / "cable/train/good/up").symlink_to(tmp_path / "cable/train")
    for root in (loco, tmp_path / "cable"):
        category = open_category(root, None)
        assert (category.unused, category.stray_masks) == ({}, {})
        assert category.localisation_obstacle("logical") is None


def test_the_fingerprint_is_of_names_and_contents(tmp_path, write_images):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        for path in write_images(tmp_path / folder / "train", 3, seed=seed):
            Image.open(path).save(path.with_suffix(".bmp"))
            path.unlink()
    a, b, c = (open_category(tmp_path, name) for name in "abc")
    assert a.fingerprint == b.fingerprint
    # The same names and sizes, other pixels: what older versions took for the same.
    assert a.names_and_sizes == c.names_and_sizes
    before = b.fingerprint
    for source, is_same in ((c, False), (a, True)):
        shutil.copy(source.train[1], b.train[1])
        assert (b.fingerprint == before) is is_same
    b.train[0].rename(b.train[0].with_name("z.bmp"))
    assert open_category(tmp_path, "b").fingerprint != before
    # A dead link counts, and is named with all others that cannot be read when images are decoded.
    (tmp_path / "a/train/link.png").symlink_to(tmp_path / "nowhere.png")
    with_link = open_category(tmp_path, "a")
    assert with_link.fingerprint != a.fingerprint
    with pytest.raises(ImageError, match=r"link\.png: there is no such file"):
        ImageStore(with_link.train, 32)
