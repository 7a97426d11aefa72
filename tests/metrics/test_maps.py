import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from dskd_fast.errors import UserError
from dskd_fast.metrics import maps
from dskd_fast.metrics.maps import ScoredMap, maps_without_image, read_map, read_maps, save_map, score_maps


@pytest.mark.parametrize("shape", [(4, 5), (1, 7), (7, 1), (1, 1), (5, 3), (5, 4), (3, 6)])
def test_round_trip(tmp_path, shape):
    scores = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = tmp_path / "Schraube n ü" / "test" / "good" / "000.v2.tiff"
    save_map(path, scores)
    result = read_map(path)
    assert result.dtype == np.float32
    assert np.array_equal(result, scores)
    assert list(path.parent.iterdir()) == [path]


def test_file_is_a_plain_float32_tiff_for_any_reader(tmp_path):
    scores = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    save_map(str(tmp_path / "a.tif"), scores)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert len(file.pages) == 1
        page = file.pages[0]
        assert page.shape == (6, 9)
        assert page.dtype == np.float32
        assert page.compression == tifffile.COMPRESSION.NONE
        assert page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
    with Image.open(tmp_path / "a.tif") as image:
        assert np.array_equal(np.asarray(image), scores)


def test_other_types_are_saved_as_float32(tmp_path):
    scores = np.random.default_rng(0).random((3, 4))
    save_map(tmp_path / "a.tiff", scores)
    assert np.array_equal(read_map(tmp_path / "a.tiff"), scores.astype(np.float32))


def test_save_replaces_and_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.tiff"
    save_map(path, np.zeros((2, 2)))
    before = path.read_bytes()
    with path.open("rb") as reader:
        save_map(path, np.ones((3, 3)))
        assert reader.read() == before
    assert np.array_equal(read_map(path), np.ones((3, 3)))

    def full_disk(file, *args, **kwargs):
        Path(file).write_bytes(b"II*\0half")
        raise OSError("no space left")

    monkeypatch.setattr(maps.tifffile, "imwrite", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*a\.tiff \(no space left\)"):
        save_map(path, np.zeros((2, 2)))
    assert list(tmp_path.iterdir()) == [path]
    assert np.array_equal(read_map(path), np.ones((3, 3)))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.array([[np.nan]]), "1 NaN or infinite"),
        (np.array([[1e39, 0.0]]), "as float32, has 1 NaN or infinite"),
        (np.zeros((2, 2, 3)), r"shape \(2, 2, 3\)"),
    ],
)
def test_save_refuses_what_is_no_map(tmp_path, scores, message):
    with pytest.raises(UserError, match=message):
        save_map(tmp_path / "a.tiff", scores)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_other_endings(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.tiff or \.tif.*a\.png"):
        save_map(tmp_path / "a.png", np.zeros((2, 2)))


def test_save_where_a_file_stands_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_map(tmp_path / "file" / "a.tiff", np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("dtype", "read_as"),
    [
        ("float16", "float32"),
        ("float32", "float32"),
        (">f4", "float32"),
        ("float64", "float64"),
        ("uint8", "float32"),
        ("int8", "float32"),
        ("uint16", "float32"),
        ("int32", "float64"),
        ("uint32", "float64"),
    ],
)
def test_reads_the_maps_of_other_methods(tmp_path, dtype, read_as):
    scores = np.random.default_rng(0).integers(0, 100, (6, 5)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tiff", scores)
    result = read_map(tmp_path / "a.tiff")
    assert result.dtype == read_as
    assert np.array_equal(result, scores)


@pytest.mark.parametrize("shape", [(1, 6, 5), (6, 5, 1)])
def test_reads_a_single_channel_axis(tmp_path, shape):
    scores = np.random.default_rng(0).random(shape).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tiff", scores, photometric="minisblack")
    assert np.array_equal(read_map(tmp_path / "a.tiff"), scores.reshape(6, 5))


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "packbits", None])
def test_reads_pillows_files(tmp_path, compression):
    scores = np.random.default_rng(0).random((6, 5)).astype(np.float32)
    Image.fromarray(scores).save(tmp_path / "a.tif", compression=compression)
    assert np.array_equal(read_map(tmp_path / "a.tif"), scores)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"there is no anomaly map at .*a\.tiff"):
        read_map(tmp_path / "a.tiff")


@pytest.mark.parametrize("size", [0, 3, 8, 100, 2000, -1])
def test_broken_files_are_named(tmp_path, size):
    save_map(tmp_path / "a.tiff", np.random.default_rng(0).random((40, 50)))
    whole = (tmp_path / "a.tiff").read_bytes()
    (tmp_path / "a.tiff").write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"the anomaly map .*a\.tiff"):
        read_map(tmp_path / "a.tiff")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_maps_of_other_programs(tmp_path, compression):
    scores = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    Image.fromarray(scores).save(tmp_path / "a.tiff", compression=compression)
    assert np.array_equal(read_map(tmp_path / "a.tiff"), scores)


def test_a_file_that_is_no_tiff(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff cannot be read"):
        read_map(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="cannot be read"):
        read_map(tmp_path)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((6, 5, 3), np.uint8), r"a\.tiff has the shape \(6, 5, 3\)"),
        (np.zeros((2, 6, 5), np.float32), r"a\.tiff has the shape \(2, 6, 5\)"),
        (np.zeros((6, 5), np.complex64), r"a\.tiff has values of type complex64"),
        (np.array([[0, np.nan], [np.inf, 1]], np.float32), r"a\.tiff has 2 NaN or infinite"),
    ],
)
def test_read_refuses_what_is_no_map(tmp_path, scores, message):
    tifffile.imwrite(tmp_path / "a.tiff", scores, photometric="rgb" if scores.shape[-1] == 3 else None)
    with pytest.raises(UserError, match=message):
        read_map(tmp_path / "a.tiff")


LEFT = np.array([[True, False, False], [True, False, False]])


def hand_made():
    """A category of 2 x 3 images, their maps, and all figures worked out by hand."""
    kinds = {
        "test/good/000": "good",
        "test/good/001.b": "good",
        "test/structural_anomalies/000": "structural",
        "test/logical_anomalies/000": "logical",
        "test/logical_anomalies/001": "logical",
    }
    scores = {
        "test/good/000": [[0, 0, 0], [0, 0, 0]],
        "test/good/001.b": [[5, 0, 0], [0, 0, 0]],
        "test/structural_anomalies/000": [[9, 0, 0], [8, 0, 0]],
        "test/logical_anomalies/000": [[9, 0, 0], [-1, 0, 0]],
        "test/logical_anomalies/001": [[5, 0, 0], [5, 0, 0]],
    }
    defects = {
        "test/structural_anomalies/000": [SimpleNamespace(mask=LEFT, saturation=2)],
        "test/logical_anomalies/000": [SimpleNamespace(mask=LEFT, saturation=2)],
        "test/logical_anomalies/001": [SimpleNamespace(mask=LEFT, saturation=1)],
    }
    images = [SimpleNamespace(key=key, kind=kind, path=Path(f"{key}.png")) for key, kind in kinds.items()]
    category = SimpleNamespace(name="toy", test=images, defects=lambda item, _=None: defects.get(item.key, []))
    return category, {key: np.array(rows, np.float32) for key, rows in scores.items()}


def logical_spro(limit):
    # 20 negatives, one of them at 5. First defect: half at once, the rest after every negative. Second
    # defect: a ramp over that one negative. Both halved.
    ramp = limit**2 / (2 * 0.05) if limit < 0.05 else limit - 0.05 / 2
    return (0.5 * limit + ramp) / 2 / limit


def expected_figures():
    spro_at = {}
    for name, limit in {"0.01": 0.01, "0.05": 0.05, "0.1": 0.1, "0.3": 0.3, "1.0": 1.0}.items():
        logical = pytest.approx(logical_spro(limit), abs=1e-12)
        mean = pytest.approx((1 + logical_spro(limit)) / 2, abs=1e-12)
        spro_at[name] = {"structural": 1.0, "logical": logical, "mean": mean}
    # Maxima: good 0, 5; structural 9; logical 9, 5: three and a half of four pairs.
    auroc = {"structural": 1.0, "logical": 0.875, "mean": 0.9375}
    return {"auroc": auroc, "spro": spro_at["0.05"], "spro_at": spro_at}


def write_maps(folder, scores, suffix=".tiff"):
    for key, anomaly_map in scores.items():
        save_map(folder / "toy" / f"{key}{suffix}", anomaly_map)


def size_2_by_3(path):
    assert path.suffix == ".png"
    return 2, 3


@pytest.mark.parametrize("suffix", [".tiff", ".tif"])
def test_figures_of_maps_on_disk(tmp_path, suffix):
    category, scores = hand_made()
    write_maps(tmp_path, scores, suffix)
    figures = score_maps(read_maps(tmp_path, category, size_2_by_3))
    assert figures == expected_figures()
    assert json.loads(json.dumps(figures)) == figures


def test_figures_of_maps_in_memory_with_image_scores_of_their_own():
    category, scores = hand_made()
    image_scores = iter([0.0, 1.0, 0.5, 2.0, 3.0])
    figures = score_maps(
        ScoredMap(item.key, item.kind, scores[item.key], next(image_scores), category.defects(item))
        for item in category.test
    )
    expected = expected_figures()
    expected["auroc"] = {"structural": 0.5, "logical": 1.0, "mean": 0.75}
    assert figures == expected


def test_without_masks_the_images_are_still_scored(tmp_path):
    category, scores = hand_made()
    marked = category.defects
    category.defects = lambda item, _=None: None if item.key == "test/logical_anomalies/001" else marked(item)
    write_maps(tmp_path, scores)
    figures = score_maps(read_maps(tmp_path, category, size_2_by_3))
    assert figures["auroc"] == expected_figures()["auroc"]
    assert figures["spro"] == {"structural": 1.0, "logical": None, "mean": None}


def test_without_a_kind_its_figures_are_absent():
    absent = {"structural": None, "logical": None, "mean": None}
    figures = score_maps([ScoredMap("test/good/000", "good", np.zeros((2, 2)), 0.0, [])])
    assert figures["auroc"] == absent
    assert figures["spro"] == absent
    assert figures["spro_at"] == dict.fromkeys(["0.01", "0.05", "0.1", "0.3", "1.0"], absent)


def test_missing_maps_are_counted_and_named(tmp_path):
    category, scores = hand_made()
    del scores["test/good/001.b"], scores["test/logical_anomalies/000"]
    write_maps(tmp_path, scores)
    with pytest.raises(UserError) as error:
        read_maps(tmp_path, category, size_2_by_3)
    assert "2 of 5 test images have no anomaly map" in str(error.value)
    for key in ("test/good/001.b", "test/logical_anomalies/000"):
        assert str(tmp_path / "toy" / f"{key}.tiff") in str(error.value)
    assert "..." not in str(error.value)

    with pytest.raises(UserError, match=r"5 of 5 .*000\.tiff, \.\.\.$"):
        read_maps(tmp_path / "elsewhere", category, size_2_by_3)


def test_two_maps_of_one_image_are_refused_by_name(tmp_path):
    category, scores = hand_made()
    write_maps(tmp_path, scores)
    write_maps(tmp_path, dict(list(scores.items())[:2]), ".tif")
    with pytest.raises(UserError) as error:
        read_maps(tmp_path, category, size_2_by_3)
    assert "2 of 5 test images have two anomaly maps" in str(error.value)
    for key in list(scores)[:2]:
        assert f"{tmp_path / 'toy' / key}.tiff and {Path(key).name}.tif" in str(error.value)


def test_maps_of_no_test_image_are_found(tmp_path):
    category, scores = hand_made()
    write_maps(tmp_path, scores)
    assert maps_without_image(tmp_path, category) == maps_without_image(tmp_path / "elsewhere", category) == []
    lost = [tmp_path / "toy/test/good/002.tif", tmp_path / "toy/test/bad/a/000.TIFF"]
    for path in lost:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert maps_without_image(tmp_path, category) == sorted(lost)


def test_no_test_images(tmp_path):
    category, _ = hand_made()
    category.test = []
    with pytest.raises(UserError, match="category toy has no test images"):
        read_maps(tmp_path, category, size_2_by_3)


@pytest.mark.parametrize("key", ["test/good/000", "test/structural_anomalies/000"])
def test_map_of_another_size_than_its_image(tmp_path, key):
    category, scores = hand_made()
    scores[key] = scores[key].T
    write_maps(tmp_path, scores)
    with pytest.raises(UserError, match=rf"{key}\.tiff is 2 x 3 pixels, but its image {key}\.png is 3 x 2"):
        score_maps(read_maps(tmp_path, category, size_2_by_3))


def test_bad_maps_in_memory_are_named():
    wrong = [SimpleNamespace(mask=LEFT, saturation=1)]
    with pytest.raises(UserError, match="the map of test/logical_anomalies/007"):
        score_maps([ScoredMap("test/logical_anomalies/007", "logical", np.zeros((3, 3)), 0.0, wrong)])
    with pytest.raises(UserError, match="image scores are not finite"):
        score_maps([ScoredMap("test/good/000", "good", np.zeros((3, 3)), np.nan, [])])
