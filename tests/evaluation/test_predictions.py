"""Predictions of anomalib are scored as it scores them; objects with the same attributes stand for its own."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dskd_fast.errors import UserError
from dskd_fast.evaluation.predictions import evaluate_predictions, evaluate_saved, load_predictions
from dskd_fast.metrics.maps import save_map

SIZE = (96, 120)


@pytest.fixture
def predicted(category):
    """A batch for each four test images, with what anomalib's `ImageBatch` has: (4, 1) scores and maps (4, h, w)."""
    generator = torch.Generator().manual_seed(0)

    def batch(items):
        maps = torch.rand((len(items), *SIZE), generator=generator)
        scores = torch.rand((len(items), 1), generator=generator)
        paths = [str(item.path) for item in items]
        return types.SimpleNamespace(image_path=paths, anomaly_map=maps, pred_score=scores, gt_mask=None)

    return [batch(category.test[i : i + 4]) for i in range(0, len(category.test), 4)]


def test_objects_dictionaries_single_images_and_files_give_the_figures_of_maps_on_disk(predicted, category, tmp_path):
    single = []
    for batch in predicted:
        batch.pred_score = None
        for path, anomaly_map in zip(batch.image_path, batch.anomaly_map.numpy(), strict=True):
            single.append(types.SimpleNamespace(image_path=path, anomaly_map=anomaly_map[None], pred_score=None))
            below = Path(path).relative_to(category.root.parent).with_suffix(".tiff")
            save_map(tmp_path / "maps" / below, anomaly_map)
    expected = evaluate_saved(tmp_path / "maps", category)
    assert expected["image_score"] == "maximum of the map"
    assert evaluate_predictions(predicted, category) == expected
    assert evaluate_predictions([single[:5], [single[5:]]], category) == expected
    torch.save([vars(batch) for batch in predicted], tmp_path / "p.pt")
    assert evaluate_saved(tmp_path / "p.pt", category) == expected


def marked(batch, category):
    """The defects of a batch's images, (B, H, W), bool."""
    items = [item for item in category.test if str(item.path) in batch.image_path]
    masks = [[np.zeros(SIZE, bool), *(defect.mask for defect in category.defects(item))] for item in items]
    return torch.tensor(np.array([np.any(of_image, axis=0) for of_image in masks]))


def test_the_score_is_the_predictions_own_and_smaller_maps_are_enlarged(predicted, category):
    """A map of the defects themselves finds them; scores that say the opposite do not change that."""
    for batch in predicted:
        maps = marked(batch, category).float()[:, None]
        batch.anomaly_map = torch.nn.functional.interpolate(maps, (48, 60), mode="area").bfloat16()
        batch.pred_score = 1 - maps.amax((1, 2, 3)).half()
    figures = evaluate_predictions(predicted, category)
    assert figures["auroc"] == {"structural": 0, "logical": 0, "mean": 0}
    assert figures["image_score"] == "pred_score of the predictions"
    assert min(figures["spro"].values()) > 0.8


def test_without_maps_there_are_areas_alone(predicted, category):
    expected = evaluate_predictions(predicted, category)["auroc"]
    for batch in predicted:
        batch.anomaly_map = None
    figures = evaluate_predictions(predicted, category)
    assert figures["auroc"] == expected
    assert set(figures["spro"].values()) == {None}
    assert figures["absent"] == ["no sPRO: the predictions have no anomaly_map"]


def test_images_are_found_where_the_data_have_moved_and_others_are_named(predicted, category, tmp_path):
    expected = evaluate_predictions(predicted, category)
    (tmp_path / "link").symlink_to(category.root)
    for batch in predicted:
        batch.image_path = [path.replace(str(category.root), f"{tmp_path}/link") for path in batch.image_path]
    assert evaluate_predictions(predicted, category) == expected
    for batch in predicted:
        batch.image_path = [path.replace(f"{tmp_path}/link", "/elsewhere/screw_bag") for path in batch.image_path]
    other = types.SimpleNamespace(image_path="/other/bag/test/good/000.png", anomaly_map=None, pred_score=1.0)
    found = evaluate_predictions([*predicted, other], category)
    assert found["auroc"] == expected["auroc"]
    assert found["unused"][-1]["first"] == [other.image_path]
    for batch in predicted:
        batch.image_path = ["C:" + path.replace("/", "\\") for path in batch.image_path]
    assert evaluate_predictions(predicted, category) == expected


def test_values_that_anomalib_has_cut_off_are_warned_of(predicted, category):
    assert evaluate_predictions(predicted, category)["warnings"] == []
    predicted[0].pred_score[:3] = 1
    (warning,) = evaluate_predictions(predicted, category)["warnings"]
    assert "0 image scores are 0 and 3 are 1, and 0 % of all pixels are 1" in warning
    predicted[1].pred_score[0] = 2  # not cut off
    assert evaluate_predictions(predicted, category)["warnings"] == []


def test_maps_of_cropped_images_are_refused(predicted, category):
    for batch in predicted:
        batch.gt_mask = marked(batch, category)
    evaluate_predictions(predicted, category)
    for batch in predicted:
        batch.gt_mask = batch.gt_mask[:, 6:-6, 8:-8]
    with pytest.raises(UserError, match="the maps are of cropped images"):
        evaluate_predictions(predicted, category)


def changed(**changes):
    """All batches, the first with other values."""
    return lambda first, *others: [types.SimpleNamespace(**vars(first) | changes), *others]


MAPS, SCORES, HOLDS_ITSELF = torch.rand(4, *SIZE), torch.rand(4, 1), []
HOLDS_ITSELF.append(HOLDS_ITSELF)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda *batches: batches[:-1], "2 of 10 test images have no prediction: .*engine.predict"),
        (lambda *batches: [*batches, batches[0]], "two predictions of .*test"),
        (changed(image_path=None), "a prediction has no image_path"),
        (changed(pred_score=None), "4 of 10 predictions have no pred_score"),
        (lambda *batches: [{"image_path": b.image_path} for b in batches], "neither anomaly_map nor pred_score"),
        (changed(anomaly_map=MAPS[:2]), r"anomaly_map has shape \(2, 96, 120\) and image_path 4 images"),
        (changed(pred_score=SCORES[:2]), r"pred_score has shape \(2, 1\) and image_path 4 images"),
        (changed(pred_score=SCORES * torch.nan), r"pred_score of .*\.png is nan"),
        (changed(anomaly_map=MAPS[:, :0]), r"anomaly_map has shape \(4, 0, 120\)"),
        (changed(anomaly_map=MAPS.to_sparse()), r"anomaly_map of .*\.png is a Tensor that is no array of real numbers"),
        (changed(pred_score=SCORES * 1j), r"pred_score of .*\.png is a Tensor that is no array of real numbers"),
        (lambda *_: HOLDS_ITSELF, "nested too deeply"),
        (lambda *batches: [*batches, None], r"predictions hold None: .*return_predictions=True"),
        (
            lambda *_: {"image_path": "/bags/test/good/000.png", "pred_score": 1.0},
            r"none of the 1 predictions is of a test image in .*/bags/test/good/000.png",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(predicted, category, change, message):
    with pytest.raises(UserError, match=message):
        evaluate_predictions(change(*predicted), category)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_file_is_read_without_executing_anything(tmp_path):
    for content, message in (
        ([{"image_path": ["a"], "anomaly_map": Evil()}], "holds objects of other classes .*such as .*exec"),
        (types.SimpleNamespace(image_path="a"), "holds objects of other classes .*such as types.SimpleNamespace"),
    ):
        torch.save(content, tmp_path / "p.pt")
        with pytest.raises(UserError, match=message):
            load_predictions(tmp_path / "p.pt")
    torch.save(torch.ones(9), tmp_path / "p.pt")
    (tmp_path / "p.pt").write_bytes((tmp_path / "p.pt").read_bytes()[:-200])
    with pytest.raises(UserError, match=r"p.pt cannot be read as a file of torch.save"):
        load_predictions(tmp_path / "p.pt")


def test_neither_a_checkpoint_nor_pictures_nor_nothing_are_predictions(tmp_path, category):
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "model.ckpt")
    (tmp_path / "images" / "good").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "good" / "000.png")
    for name, message in (
        ("model.ckpt", "predictions hold a dict: give what"),
        ("images", r"has 1 pictures and no map, 000.png first: the colours of pictures"),
        ("nowhere", "there is no folder and no file"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_saved(tmp_path / name, category)


def test_the_command_does_not_replace_what_it_scores(cli_error, tmp_path):
    (tmp_path / "p.pt").write_bytes(b"predictions")
    message = cli_error("evaluate-maps", tmp_path / "p.pt", "--category", "c", "--out", tmp_path / "." / "p.pt")
    assert "would be replaced: name another file" in message
    assert (tmp_path / "p.pt").read_bytes() == b"predictions"


def test_anomalibs_own_predictions_have_anomalibs_areas(category, tmp_path, monkeypatch):
    """PaDiM with random weights, predicted, saved as they are, and scored without anomalib's classes."""
    pytest.importorskip("anomalib", reason="anomalib is not installed: see CONTRIBUTING.md")
    from anomalib.data import MVTecLOCO
    from anomalib.engine import Engine
    from anomalib.models import Padim

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Padim(pre_trained=False, n_features=10, visualizer=False)
    data = MVTecLOCO(root=category.root.parent, category=category.name, num_workers=0)
    engine = Engine(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    engine.fit(model, datamodule=data)
    model.post_processor.enable_normalization = False
    (theirs,) = engine.test(model, datamodule=data)
    predictions = engine.predict(model, datamodule=data)
    torch.save(predictions, tmp_path / "p.pt")
    ours = evaluate_predictions(predictions, category)
    assert evaluate_saved(tmp_path / "p.pt", category) == ours
    n = ours["n_images"]
    pooled = sum(n[kind] * ours["auroc"][kind] for kind in ("structural", "logical")) / (n["structural"] + n["logical"])
    assert pooled == pytest.approx(theirs["image_AUROC"], abs=1e-6)
    assert ours["image_score"] == "pred_score of the predictions"
    assert None not in ours["spro"].values()
