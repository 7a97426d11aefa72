import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image

from dskd_fast.data.ground_truth import Defect
from dskd_fast.errors import UserError
from dskd_fast.metrics.auroc import auroc
from dskd_fast.metrics.maps import ScoredMap, read_map, read_maps, save_map, score_maps
from dskd_fast.metrics.spro import SPRO


@pytest.mark.parametrize("shape", [(4, 5), (1, 7), (7, 1), (1, 1)])
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


def test_reads_the_maps_of_other_methods(tmp_path):
    path, values = tmp_path / "a.tiff", np.random.default_rng(0).integers(0, 100, (6, 5))
    for dtype in ("float16", ">f4", "uint8", "int8", "uint16", "float64", "int32", "uint32"):
        for shape in ((6, 5), (1, 6, 5), (6, 5, 1)):
            tifffile.imwrite(path, values.astype(dtype).reshape(shape), photometric="minisblack")
            result = read_map(path)
            assert result.dtype == ("float64" if dtype in ("float64", "int32", "uint32") else "float32")
            assert np.array_equal(result, values)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):  # as other programs compress it
        Image.fromarray(values.astype(np.float32)).save(path, compression=compression)
        assert np.array_equal(read_map(path), values)


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
    tifffile.imwrite(path, np.array([[0, np.nan], [np.inf, 1]], np.float32))
    with pytest.raises(UserError, match=r"a\.tiff has 2 NaN or infinite"):
        read_map(path)


@pytest.fixture
def toy():
    """A category of images of 8 x 9 pixels, of which the anomalous ones have a defect on the left, and its maps."""
    kinds = {"test/good/000": "good", "test/good/001.b": "good", "test/structural_anomalies/000": "structural"}
    kinds |= {f"test/logical_anomalies/00{i}": "logical" for i in range(2)}
    marked = Defect(np.tile(np.arange(9) < 3, (8, 1)), 20.5, "left")
    truth = {key: [] if kind == "good" else [marked] for key, kind in kinds.items()}
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        name="toy",
        test=[SimpleNamespace(key=key, kind=kind, path=Path(f"{key}.png")) for key, kind in kinds.items()],
        defects=lambda item, _=None: truth[item.key],
        truth=truth,
        maps={key: rng.random((8, 9), np.float32) + (kind != "good") * marked.mask / 2 for key, kind in kinds.items()},
    )


def write_maps(folder, maps, suffix=".tiff"):
    for key, anomaly_map in maps.items():
        save_map(folder / "toy" / f"{key}{suffix}", anomaly_map)


def read(folder, category):
    def size_of(path):
        assert path.suffix == ".png"
        return 8, 9

    return read_maps(folder, category, size_of)


@pytest.mark.parametrize("suffix", [".tiff", ".tif"])
def test_figures_are_areas_of_image_scores_and_of_maps_in_memory_or_on_disk(tmp_path, toy, suffix):
    spro, scores = SPRO(), {"good": [], "structural": [], "logical": []}
    scored = [ScoredMap(x.key, x.kind, toy.maps[x.key], 1 - toy.maps[x.key].mean(), toy.defects(x)) for x in toy.test]
    for one in scored:
        spro.add(one.anomaly_map, one.defects, one.kind)
        scores[one.kind].append(one.score)
    structural, logical = (auroc(scores["good"], scores[kind]) for kind in ("structural", "logical"))
    areas = spro.compute()
    spro_at = {str(limit): {kind: areas[kind][limit] for kind in areas} for limit in (0.01, 0.05, 0.1, 0.3, 1.0)}
    figures = score_maps(scored)
    assert figures["auroc"] == {"structural": structural, "logical": logical, "mean": (structural + logical) / 2}
    assert (figures["spro"], figures["spro_at"]) == (spro_at["0.05"], spro_at)
    assert spro_at["0.05"] != spro_at["0.1"] != spro_at["1.0"]
    assert json.loads(json.dumps(figures)) == figures
    # On disk the image score is the maximum.
    expected = score_maps(one._replace(score=one.anomaly_map.max()) for one in scored)
    assert expected["auroc"] != figures["auroc"]
    write_maps(tmp_path, toy.maps, suffix)
    assert score_maps(read(tmp_path, toy)) == expected
    # Without masks the images are still scored.
    toy.truth["test/logical_anomalies/001"] = None
    unmarked = score_maps(read(tmp_path, toy))
    assert unmarked["auroc"] == expected["auroc"]
    assert unmarked["spro"] == {"structural": expected["spro"]["structural"], "logical": None, "mean": None}


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
    refused(rf"{key}\.tiff is 8 x 9 pixels, but its image {key}\.png is 9 x 8")
    write_maps(tmp_path, lost, ".tif")
    names = ", ".join(f"{tmp_path}/toy/{key}.tiff and {Path(key).name}.tif" for key in lost)
    refused(f"2 of 5 test images have two anomaly maps, .* removed: {names}$")
    toy.test = []
    refused("category toy has no test images")
