import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from dskd_fast.data.ground_truth import Defect
from dskd_fast.errors import UserError
from dskd_fast.metrics.maps import ScoredMap, read_map, read_maps, save_map, score_maps


@pytest.mark.parametrize("shape", [(4, 5), (1, 7), (7, 1), (1, 1), (3, 6)])
def test_round_trip_through_a_plain_float32_tiff_for_any_reader(tmp_path, shape):
    scores = np.random.default_rng(0).standard_normal(shape)
    path = tmp_path / "Schraube n ü" / "test" / "good" / "000.v2.tiff"
    save_map(path, np.zeros((2, 2)))
    save_map(path, scores)
    assert list(path.parent.iterdir()) == [path]
    scores = scores.astype(np.float32)
    with Image.open(path) as image, tifffile.TiffFile(path) as file:
        [page] = file.pages
        assert page.compression == tifffile.COMPRESSION.NONE
        assert page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
        for found in (read_map(str(path)), page.asarray(), np.asarray(image)):
            assert found.dtype == np.float32
            assert np.array_equal(found, scores)


@pytest.mark.parametrize(
    ("dtype", "read_as"),
    [
        *((dtype, "float32") for dtype in ("float16", ">f4", "uint8", "int8", "uint16")),
        *((dtype, "float64") for dtype in ("float64", "int32", "uint32")),
    ],
)
def test_reads_the_maps_of_other_methods(tmp_path, dtype, read_as):
    for shape in ((6, 5), (1, 6, 5), (6, 5, 1)):
        scores = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
        tifffile.imwrite(tmp_path / "a.tiff", scores, photometric="minisblack")
        result = read_map(tmp_path / "a.tiff")
        assert result.dtype == read_as
        assert np.array_equal(result, scores.reshape(6, 5))
    if dtype == ">f4":  # as other programs compress it
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
            Image.fromarray(result.astype(np.float32)).save(tmp_path / "a.tiff", compression=compression)
            assert np.array_equal(read_map(tmp_path / "a.tiff"), result)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "a.tiff"
    with pytest.raises(UserError, match=r"there is no anomaly map at .*a\.tiff"):
        read_map(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_map(tmp_path)
    save_map(path, np.random.default_rng(0).random((40, 50)))
    whole = path.read_bytes()
    for size in (0, 3, 8, 100, 2000, -1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"the anomaly map .*a\.tiff"):
            read_map(path)
    # tifffile reads a missing strip as zeros.
    tifffile.imwrite(path, np.ones((40, 50), np.float32), rowsperstrip=10)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["StripByteCounts"].overwrite([2000, 0, 2000, 2000])
    with pytest.raises(UserError, match=r"a\.tiff cannot be used: .*1 of its strips or tiles missing"):
        read_map(path)
    Image.new("L", (4, 4)).save(path, format="PNG")
    with pytest.raises(UserError, match=r"a\.tiff cannot be read"):
        read_map(path)
    tifffile.imwrite(path, np.array([[0, np.nan], [np.inf, 1]], np.float32))
    with pytest.raises(UserError, match=r"a\.tiff has 2 NaN or infinite"):
        read_map(path)


LEFT = np.array([[True, False, False], [True, False, False]])

# By the image's key: its kind, its map (2 x 3), and the saturation of its defect on the left.
TOY = {
    "test/good/000": ("good", [[0, 0, 0], [0, 0, 0]], None),
    "test/good/001.b": ("good", [[5, 0, 0], [0, 0, 0]], None),
    "test/structural_anomalies/000": ("structural", [[9, 0, 0], [8, 0, 0]], 2),
    "test/logical_anomalies/000": ("logical", [[9, 0, 0], [-1, 0, 0]], 2),
    "test/logical_anomalies/001": ("logical", [[5, 0, 0], [5, 0, 0]], 1),
}


@pytest.fixture
def toy():
    """A category whose figures were worked out by hand; `marked` are its defects, `maps` its maps."""
    marked = {key: [Defect(LEFT, s, "left")] if s else [] for key, (_, _, s) in TOY.items()}
    return SimpleNamespace(
        name="toy",
        test=[SimpleNamespace(key=key, kind=kind, path=Path(f"{key}.png")) for key, (kind, _, _) in TOY.items()],
        defects=lambda item, _=None: marked[item.key],
        marked=marked,
        maps={key: np.array(rows, np.float32) for key, (_, rows, _) in TOY.items()},
    )


def expected_figures():
    spro_at = {}
    for name, limit in {"0.01": 0.01, "0.05": 0.05, "0.1": 0.1, "0.3": 0.3, "1.0": 1.0}.items():
        # 20 negatives, one of them at 5. First defect: half at once, the rest after every negative. Second defect: a
        # ramp over that one negative. Both halved.
        ramp = limit**2 / (2 * 0.05) if limit < 0.05 else limit - 0.05 / 2
        logical = (0.5 * limit + ramp) / 2 / limit
        exact = {"structural": 1.0, "logical": logical, "mean": (1 + logical) / 2}
        spro_at[name] = pytest.approx(exact, abs=1e-12)
    # Maxima: good 0, 5; structural 9; logical 9, 5: three and a half of four pairs.
    auroc = {"structural": 1.0, "logical": 0.875, "mean": 0.9375}
    return {"auroc": auroc, "spro": spro_at["0.05"], "spro_at": spro_at}


def write_maps(folder, maps, suffix=".tiff"):
    for key, anomaly_map in maps.items():
        save_map(folder / "toy" / f"{key}{suffix}", anomaly_map)


def read(folder, category):
    def size_2_by_3(path):
        assert path.suffix == ".png"
        return 2, 3

    return read_maps(folder, category, size_2_by_3)


@pytest.mark.parametrize("suffix", [".tiff", ".tif"])
def test_figures_of_maps_on_disk(tmp_path, toy, suffix):
    write_maps(tmp_path, toy.maps, suffix)
    figures = score_maps(read(tmp_path, toy))
    assert figures == expected_figures()
    assert json.loads(json.dumps(figures)) == figures
    # Without masks the images are still scored.
    toy.marked["test/logical_anomalies/001"] = None
    figures = score_maps(read(tmp_path, toy))
    assert figures["auroc"] == expected_figures()["auroc"]
    assert figures["spro"] == {"structural": 1.0, "logical": None, "mean": None}


def test_figures_of_maps_in_memory_with_image_scores_of_their_own(toy):
    image_scores = [0.0, 1.0, 0.5, 2.0, 3.0]
    figures = score_maps(
        ScoredMap(item.key, item.kind, toy.maps[item.key], score, toy.defects(item))
        for item, score in zip(toy.test, image_scores, strict=True)
    )
    assert figures == expected_figures() | {"auroc": {"structural": 0.5, "logical": 1.0, "mean": 0.75}}


def test_missing_second_and_wrong_maps_are_counted_and_named(tmp_path, toy):
    def refused(message):
        with pytest.raises(UserError, match=message):
            score_maps(read(tmp_path, toy))

    refused(r"5 of 5 test images have no anomaly map: .*000\.tiff, \.\.\.$")
    lost = {key: toy.maps.pop(key) for key in ("test/good/001.b", "test/logical_anomalies/000")}
    write_maps(tmp_path, toy.maps)
    refused(f"2 of 5 test images have no anomaly map: {', '.join(f'{tmp_path}/toy/{key}.tiff' for key in lost)}$")
    write_maps(tmp_path, lost)
    key, anomaly_map = "test/good/000", toy.maps["test/good/000"]
    write_maps(tmp_path, {key: anomaly_map.T})
    refused(rf"{key}\.tiff is 2 x 3 pixels, but its image {key}\.png is 3 x 2")
    write_maps(tmp_path, lost, ".tif")
    names = ", ".join(f"{tmp_path}/toy/{key}.tiff and {Path(key).name}.tif" for key in lost)
    refused(f"2 of 5 test images have two anomaly maps, .* removed: {names}$")
    toy.test = []
    refused("category toy has no test images")
