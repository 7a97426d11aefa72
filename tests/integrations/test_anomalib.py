"""`Dskd` inside anomalib; `tests/integrations.sh` makes environments for it."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import dskd_fast
from dskd_fast.data.images import read_image, resize_square
from dskd_fast.data.layout import open_category
from dskd_fast.errors import UserError
from dskd_fast.training.train import train

pytest.importorskip("anomalib", reason="no anomalib: bash tests/integrations.sh FOLDER anomalib makes one with it")

from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, MVTecLOCO
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from dskd_fast.integrations.anomalib import Dskd
from dskd_fast.integrations.anomalib_parts import DskdPostProcessor, DskdPreProcessor

pytestmark = pytest.mark.filterwarnings("ignore")

# A recipe in which everything counts that there is: schedule, warm-up, averages.
RECIPE = {"averaging": 0.9, "warmup": 0.3, "schedule": "cosine", "lr": 0.002, "gccb": 8, "augmentation": "none"}


class _OurOrder(MVTecLOCO):
    """The training images in the order in which `dskd-fast train` takes them."""

    def train_dataloader(self):
        random = torch.Generator().manual_seed(0)
        n = len(self.train_data)
        order = [torch.randperm(n, generator=random).tolist() for _ in range(self.trainer.current_epoch + 1)][-1]
        collate = self.train_data.collate_fn
        return torch.utils.data.DataLoader(self.train_data, self.train_batch_size, sampler=order, collate_fn=collate)


@pytest.fixture(scope="module")
def make(tiny_weights, data_root, tmp_path_factory):
    """Makes a model, its data module and an engine: make(data=class, **arguments of Dskd)."""

    def run(folder=None, data=_OurOrder, callbacks=None, logger=False, **arguments):
        options = RECIPE | {"teacher_weights": str(tiny_weights)} | arguments.pop("options", {})
        model = Dskd("test_resnet", image_size=64, options=options, **{"epochs": 2} | arguments)
        loco = data(root=data_root, category="screw_bag", train_batch_size=4, eval_batch_size=4, num_workers=0)
        root = folder or tmp_path_factory.mktemp("engine")
        engine = Engine(
            default_root_dir=root,
            accelerator="cpu",
            callbacks=callbacks,
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            # One loader gives one order.
            reload_dataloaders_every_n_epochs=1,
        )
        return model, loco, engine

    return run


@pytest.fixture(scope="module")
def fitted(make):
    """A model after its training, with its data module and engine. Read only."""
    model, data, engine = make()
    engine.fit(model, datamodule=data)
    return model, data, engine


@pytest.fixture(scope="module")
def test_images(data_root):
    return sorted((data_root / "screw_bag" / "test").rglob("*.png"))


def predicted(model, paths):
    """pred_score, pred_label and anomaly_map of files, as anomalib gives them."""
    engine = Engine(logger=False, accelerator="cpu", enable_progress_bar=False, default_root_dir=paths[0].parent)
    batches = []
    for folder in sorted({path.parent for path in paths}):
        engine = Engine(logger=False, accelerator="cpu", enable_progress_bar=False, default_root_dir="unused")
        silent = copy.copy(model)
        silent.visualizer = None
        batches += engine.predict(silent, data_path=folder)
    found = {str(batch.image_path[0]): batch for batch in batches}
    chosen = [found[str(path)] for path in paths]
    scores = torch.cat([batch.pred_score for batch in chosen])
    return scores, torch.cat([batch.pred_label for batch in chosen]), torch.cat([batch.anomaly_map for batch in chosen])


def test_the_same_images_in_the_same_order_give_the_same_detector_as_train(
    fitted, data_root, tiny_options, test_images, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, _, _ = fitted
    theirs, history = train(open_category(data_root, "screw_bag"), tiny_options(**RECIPE, epochs=2))
    ours = model.model.record["history"]
    assert [epoch["local_loss"] for epoch in ours] == pytest.approx([epoch.local_loss for epoch in history], rel=1e-4)
    assert model.model.threshold == pytest.approx(theirs.calibration.threshold.value, rel=2e-3)
    scores, labels, _ = predicted(model, test_images)
    expected = theirs.predict(test_images)
    raw = model.post_processor.raw(scores).numpy()
    np.testing.assert_allclose(raw, [found.score for found in expected], rtol=2e-3, atol=2e-3)
    assert labels.tolist() == [found.anomalous for found in expected]


def test_a_checkpoint_needs_no_pickle_and_no_weights_of_the_teacher_and_gives_the_same(
    fitted, test_images, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, _, engine = fitted
    path = engine.trainer.checkpoint_callback.best_model_path
    content = torch.load(path, weights_only=True)
    assert not any(isinstance(value, torch.nn.Module) for value in content["hyper_parameters"].values())
    monkeypatch.setattr("dskd_fast.models.teacher.Teacher.load_weights", lambda *_: pytest.fail("weights were loaded"))
    loaded = Dskd.load_from_checkpoint(path)
    assert loaded.post_processor.image_threshold == model.post_processor.image_threshold
    for ours, theirs in zip(predicted(loaded, test_images), predicted(model, test_images), strict=True):
        assert torch.equal(ours, theirs)


def test_a_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(fitted, make, tmp_path):
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    model, data, engine = make(tmp_path / "first", callbacks=[every])
    engine.fit(model, datamodule=data)
    early = tmp_path / "epoch=0.ckpt"
    torch.load(early, weights_only=True)
    resumed, data, engine = make(tmp_path / "second")
    engine.fit(resumed, datamodule=data, ckpt_path=early)
    assert engine.trainer.current_epoch == 2
    ours, theirs = resumed.model.state_dict(), fitted[0].model.state_dict()
    for name in ours.keys() - {"_extra_state"}:
        torch.testing.assert_close(ours[name], theirs[name])
    half, data, engine = make(tmp_path / "third")
    with pytest.raises(UserError, match="not come to its end"):
        engine.test(half, datamodule=data, ckpt_path=early)


def test_a_run_becomes_a_model_and_back(tiny_run, test_images, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Dskd.from_run(tiny_run)
    scores, labels, _ = predicted(model, test_images)
    expected = dskd_fast.load(tiny_run, "cpu").predict(test_images)
    raw = model.post_processor.raw(scores).numpy()
    np.testing.assert_allclose(raw, [found.score for found in expected], rtol=1e-3, atol=1e-3)
    assert labels.tolist() == [found.anomalous for found in expected]
    model.save_run(tmp_path / "again")
    assert cli("predict", tmp_path / "again", test_images[0].parent, "--out", tmp_path / "results").code == 0
    again = dskd_fast.load(tmp_path / "again", "cpu").predict(test_images)
    assert [found.score for found in again] == [found.score for found in expected]


def test_a_fitted_model_becomes_a_run(fitted, test_images, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _, _ = fitted
    model.save_run(tmp_path / "run")
    scores, _, located = predicted(model, test_images)
    found = dskd_fast.load(tmp_path / "run", "cpu").predict(test_images)
    raw = model.post_processor.raw(scores).numpy()
    np.testing.assert_allclose(raw, [one.score for one in found], rtol=1e-3, atol=1e-3)
    assert located.shape == (len(test_images), 64, 64)
    assert cli("evaluate", tmp_path / "run", "--device", "cpu").code == 0
    with pytest.raises(UserError, match="already exists"):
        model.save_run(tmp_path / "run")


def test_batch_norm_learns_and_the_teacher_does_not(fitted, make):
    before, after = make()[0].model.state_dict(), fitted[0].model.state_dict()
    changed = {name for name in before.keys() - {"_extra_state"} if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith("networks.teacher.")]
    assert any("running_mean" in name for name in changed)


def test_the_recipe_says_how_many_epochs_and_a_finished_training_stays_finished(make, tmp_path, monkeypatch):
    monkeypatch.setattr("dskd_fast.runs.options.FAST_STEPS", 4)
    model, data, engine = make(tmp_path, recipe="fast", epochs=None)
    engine.fit(model, datamodule=data)
    assert (engine.trainer.current_epoch, engine.trainer.global_step) == (2, 6)
    path = engine.trainer.checkpoint_callback.best_model_path
    again, data, engine = make(tmp_path / "again", recipe="fast", epochs=None)
    engine.fit(again, datamodule=data, ckpt_path=path)
    assert engine.trainer.global_step == 6
    assert again.model.get_extra_state() == model.model.get_extra_state()


def test_what_anomalib_tests_and_logs(make, tmp_path):
    model, data, engine = make(tmp_path, data=MVTecLOCO, logger=CSVLogger(tmp_path / "logs"), epochs=1)
    engine.fit(model, datamodule=data)
    (found,) = engine.test(model, datamodule=data)
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= found.keys()
    logged = next((tmp_path / "logs").rglob("metrics.csv")).read_text()
    assert all(name in logged for name in ("train_loss", "local_loss", "global_loss"))


def test_only_normal_validation_images_that_are_no_test_images_set_the_threshold(make, data_root, tmp_path):
    model, _, engine = make(tmp_path, epochs=1)
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/logical_anomalies"}
    arguments = {"name": "bag", "root": data_root / "screw_bag", "train_batch_size": 4, "num_workers": 0, "seed": 0}
    with pytest.raises(UserError, match=r'val_split_mode="from_train"'):
        engine.fit(model, datamodule=Folder(**arguments, **folders, val_split_mode="same_as_test"))
    model, _, engine = make(tmp_path, epochs=1)
    data = Folder(**arguments, **folders)
    engine.fit(model, datamodule=data)
    assert data.val_data.has_anomalous
    calibration = model.model.detector.calibration
    assert (calibration.source, calibration.n_images) == ("validation", 2)
    tested = set(data.test_data.samples.image_path)
    assert tested.isdisjoint(data.val_data.samples.image_path)


@pytest.mark.parametrize("callback", [EarlyStopping, ModelCheckpoint])
def test_what_waits_for_a_figure_of_validation_is_refused(callback, make, tmp_path):
    model, data, engine = make(tmp_path, callbacks=[callback(monitor="image_AUROC")])
    with pytest.raises(UserError, match=f"{callback.__name__} monitors image_AUROC"):
        engine.fit(model, datamodule=data)


def test_images_are_resized_to_the_bit_and_not_normalised(test_images):
    pixels = read_image(test_images[0])
    expected = torch.from_numpy(resize_square(pixels, 64)).permute(2, 0, 1) / 255
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    pre_processor = DskdPreProcessor(64)
    assert torch.equal(pre_processor.transform(image), expected)
    assert torch.equal(pre_processor.transform(image[None])[0], expected)
    assert torch.equal(pre_processor(image[None])[0], expected)
    assert torch.equal(pre_processor.transform(expected), expected)


def test_scaled_scores_keep_their_order_and_their_threshold():
    post_processor = DskdPostProcessor()
    post_processor.set_threshold(5.25)
    scores = torch.cat([torch.linspace(-40, 5.2, 500), torch.tensor([5.25]), torch.linspace(5.3, 400, 500)])
    scaled = post_processor.scaled(scores)
    assert (scaled.diff() > 0).all()
    assert scaled[500] == 0.5
    assert 0 <= scaled.min() < scaled.max() <= 1
    torch.testing.assert_close(post_processor.raw(scaled), scores, rtol=1e-4, atol=1e-4)


# Marked for the minute that each takes.
@pytest.mark.parametrize(
    "kind", ["torch", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("onnx", "openvino"))]
)
def test_an_exported_file_gives_what_the_model_gives(kind, fitted, test_images, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model, _, engine = fitted
    image = torch.from_numpy(read_image(test_images[0])).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = model.eval()(image)
    path = engine.export(model, kind, export_root=tmp_path)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True))
    else:
        inferencer = (
            TorchInferencer(path, "cpu")
            if kind == "torch"
            else OpenVINOInferencer(path, "CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
        )
        batch = inferencer.predict(image[0] if kind == "torch" else image[0].permute(1, 2, 0).numpy())
        found = {name: np.asarray(getattr(batch, name)) for name in expected._fields}
    np.testing.assert_allclose(found["pred_score"].reshape(-1), expected.pred_score, atol=1e-4)
    np.testing.assert_allclose(found["anomaly_map"].reshape(64, 64), expected.anomaly_map[0, 0], atol=1e-4)
    assert found["pred_label"].reshape(-1).astype(bool).tolist() == expected.pred_label.tolist()


def test_the_command_line_of_anomalib_trains_it(data_root, tiny_weights, tmp_path):
    options = {"gccb": 8, "teacher_weights": str(tiny_weights)}
    command = [Path(sys.executable).parent / "anomalib", "train", "--model", "dskd_fast.integrations.anomalib.Dskd"]
    command += ["--model.teacher", "test_resnet", "--model.image_size", "64", "--model.epochs", "1"]
    command += ["--model.options", str(options), "--data", "anomalib.data.MVTecLOCO", "--data.root", str(data_root)]
    command += ["--data.category", "screw_bag", "--data.num_workers", "0", "--data.train_batch_size", "4"]
    command += ["--default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [*tmp_path.rglob("model.ckpt")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 8}, "batch_size is not among the options: set train_batch_size"),
        ({"seed": 1}, "an argument of its own"),
        ({"temprature": 1}, "there is no option temprature"),
    ],
)
def test_options_that_are_not_the_models_are_refused(options, message):
    with warnings.catch_warnings(), pytest.raises(UserError, match=message):
        Dskd("lite", options=options, pre_trained=False)
