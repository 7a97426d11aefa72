import errno
import os
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd_fast.data.images import ImageError
from dskd_fast.data.layout import DataNotFound, list_categories, open_category
from dskd_fast.data.listing import list_folder
from dskd_fast.data.store import ImageStore
from dskd_fast.errors import UserError

from .conftest import item_of, mvtec_ad, numbered, write


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
