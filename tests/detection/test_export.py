"""Exported files do what `predict` does, whatever the batch and the size of the images, and without this package."""

import functools
import json
import os
import pickle
import resource
import shutil
import signal
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

from dskd_fast.data.images import read_image
from dskd_fast.data.layout import open_category
from dskd_fast.detection import export as export_module
from dskd_fast.detection.calibration import Exposure
from dskd_fast.detection.export import METADATA, OPSET, SUFFIXES, TOLERANCE, export
from dskd_fast.detection.program import Inspection
from dskd_fast.detection.scoring.parts import PARTS
from dskd_fast.errors import UserError

from .conftest import assert_agrees, module_run, small_detector

FORMATS = ("onnx", "openvino", "torch")


def load(path):
    """A function from uint8 images (B, 3, H, W) to a dictionary of arrays."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda images: dict(zip(names, session.run(None, {"images": images}), strict=True))
    if path.suffix == ".xml":
        return openvino_run(openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}))
    return module_run(load_program(path)[0].module())


@functools.cache
def load_program(path):
    """A .pt2's program, and its metadata as text."""
    extra = {METADATA: ""}
    return torch.export.load(path, extra_files=extra), extra[METADATA]


def openvino_run(compiled):
    return lambda images: {output.any_name: x.copy() for output, x in compiled({"images": images}).items()}


@pytest.fixture(scope="module")
def exports(tiny_detector, threshold, made_once, pytestconfig):
    """By format, what was exported of the run; PyTorch's, which is the program as it was traced, with --all alone.

    It is traced once for all formats, since that takes longest, and written as ONNX once, of which OpenVINO's is made.
    """

    def fill(folder):
        program, done = export_module._program(tiny_detector, threshold), {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export_module, "_program", lambda *_: program)
            for name in FORMATS if pytestconfig.getoption("--all") else FORMATS[:2]:
                path = folder / name / f"model{SUFFIXES[name]}"
                done[name] = export(tiny_detector, path, name, category="screw_bag", threshold=threshold)
                patch.setattr(export_module, "_write_onnx", lambda _, path, __: shutil.copy(done["onnx"].path, path))
        (folder / "done").write_bytes(pickle.dumps(done))

    return pickle.loads((made_once("exported", fill) / "done").read_bytes())


@pytest.fixture(scope="module")
def threshold(tiny_detector):
    return tiny_detector.calibration.threshold.value


@pytest.fixture(scope="module", params=[*FORMATS[:2], pytest.param("torch", marks=pytest.mark.slow)])
def exported(request, exports):
    return exports[request.param]


@pytest.fixture(scope="module")
def run_file(exported):
    return load(exported.path)


def test_every_test_image_gets_what_predict_gives(run_file, tiny_detector, threshold, data_root):
    paths = [item.path for item in open_category(data_root, "screw_bag").test]
    images = np.stack([read_image(path).transpose(2, 0, 1) for path in paths])
    for batch_size in (1, 3):
        parts = [run_file(images[start : start + batch_size]) for start in range(0, len(paths), batch_size)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_agrees(found, tiny_detector.predict(paths), threshold)


def test_dead_frames_are_suspect_and_never_pass_in_a_file_either(run_file, dead_frames, data_root):
    frames = run_file(np.stack([frame.transpose(2, 0, 1) for frame, _ in dead_frames.values()]))
    assert frames["suspect"].all()
    assert frames["anomalous"].all()
    paths = sorted((data_root / "screw_bag").glob("*/*/*.png"))
    assert not run_file(np.stack([read_image(path).transpose(2, 0, 1) for path in paths]))["suspect"].any()


@pytest.mark.parametrize("size", [(31, 64), (64, 31)])
def test_smaller_images_are_refused(exported, run_file, random_images, size):
    dim, side = (2, "height") if size[0] < 32 else (3, "width")
    message = {
        ".onnx": f"Name:'images_below_32_pixels_in_{side}'",
        ".pt2": rf"{dim}\D.*>= 32",
        ".xml": r"shape=\[\?,3,32\.\.,32\.\.\]",
    }
    with pytest.raises(Exception, match=message[exported.path.suffix]):
        run_file(random_images(2, *size))


def test_a_file_says_what_it_is(exported, tiny_detector, threshold):
    assert 0 < exported.difference < TOLERANCE
    assert exported.n_bytes == sum(file.stat().st_size for file in exported.path.parent.iterdir())
    assert exported.metadata["category"] == "screw_bag"
    assert exported.metadata["image_size"] == 64
    assert exported.metadata["threshold"] == threshold
    assert exported.metadata["scoring"] == "calibrated"
    assert exported.metadata["parts"] == list(tiny_detector.parts) == list(PARTS)
    assert list(exported.metadata["outputs"]) == ["score", "map", "parts", "anomalous", "suspect"]
    limits = tiny_detector.calibration.exposure
    assert exported.metadata["exposure"] == {"brightness": [*limits.brightness], "contrast": [*limits.contrast]}
    if exported.path.suffix == ".pt2":
        assert json.loads(load_program(exported.path)[1]) == exported.metadata
        return
    if exported.path.suffix == ".xml":
        found = openvino.Core().read_model(exported.path).get_rt_info("dskd_fast").value
        said = {name: str(found[name]) for name in exported.metadata}
        assert said["compile"] == (
            'compiled = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})'
        )
    else:
        said = onnxruntime.InferenceSession(exported.path).get_modelmeta().custom_metadata_map
    for name, value in exported.metadata.items():
        assert said[name] == (value if isinstance(value, str) else json.dumps(value))


def test_no_file_holds_anything_of_this_package(exported):
    if exported.path.suffix == ".onnx":
        model = onnx.load(exported.path)
        onnx.checker.check_model(model, full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions
        typed = onnx.shape_inference.infer_shapes(model).graph
        types = {value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output)}
        assert onnx.TensorProto.FLOAT in types
        # TensorRT does not know it, and OpenVINO silently takes float32 in its place.
        assert onnx.TensorProto.DOUBLE not in types | {tensor.data_type for tensor in typed.initializer}
        assert [path.name for path in exported.path.parent.iterdir()] == [exported.path.name]
        dims = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
        assert dims == ["batch", 3, "height", "width"]
        return
    if exported.path.suffix == ".xml":
        assert sorted(path.name for path in exported.path.parent.iterdir()) == ["model.bin", "model.xml"]
        operators = openvino.Core().read_model(exported.path).get_ops()
        assert openvino.Type.f64 not in {output.get_element_type() for one in operators for output in one.outputs()}
        assert {one.get_type_info().version_id[:5] for one in operators} == {"opset"}
        return
    calls = [node.target for node in load_program(exported.path)[0].graph.nodes if node.op == "call_function"]
    assert len(calls) > 100
    assert {target.namespace for target in calls if isinstance(target, torch._ops.OpOverload)} == {"aten"}


@pytest.mark.parametrize(
    ("file_format", "precision"), [("openvino", {}), ("onnx", {"INFERENCE_PRECISION_HINT": "bf16"})]
)
def test_openvino_in_less_than_float32_gives_no_numbers_and_passes_no_image(
    exports, random_images, file_format, precision
):
    """Both are bf16 on processors that multiply it: the first without a word."""
    path, images = exports[file_format].path, random_images(2, 40, 64)
    compiled = openvino.Core().compile_model(path, "CPU", precision)
    found = openvino_run(compiled)(images)
    if compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32:
        np.testing.assert_allclose(found["score"], load(path)(images)["score"], rtol=1e-4)
        return
    assert all(np.isnan(found[name]).all() for name in ("score", "map", "parts"))
    assert found["anomalous"].all()
    assert found["suspect"].all()


EXPOSURE = Exposure((50.0, 200.0), (10.0, 100.0), "", 1)


@pytest.mark.slow
def test_a_file_of_the_papers_scoring_keeps_its_digits_and_without_a_threshold_makes_no_decisions(
    tmp_path, random_images
):
    """What is kept agrees with the detector, here one from before there were limits of brightness and contrast."""
    detector = small_detector(align_corners=True, filter_maps=True, sigma=9.0, temperature=0.1)
    # Students within 0.1 % of their teacher: what cancels, or is taken for nothing, would show.
    teacher, *students = detector.model.convolutions
    generator = torch.Generator().manual_seed(1)
    for student in students:
        noise = torch.randn(teacher.weight.shape, generator=generator)
        student.load_state_dict({"weight": 1.3 * teacher.weight * (1 + 1e-3 * noise), "bias": 1.3 * teacher.bias})
    detector.calibrate([torch.from_numpy(random_images(8, 32, 32))], "validation")
    assert detector.calibration.statistics["global"].mean < 1e-7
    detector.calibration = replace(detector.calibration, exposure=None)
    exported = export(detector, tmp_path / "model.onnx", "onnx", category="c", threshold=None)
    run = load(exported.path)
    for size in ((1, 32, 45), (4, 61, 32), (2, 90, 70)):
        images = random_images(*size)
        found = run(images)
        assert list(found) == ["score", "map", "parts"]
        assert_agrees(found, detector.predict(images.transpose(0, 2, 3, 1)), None)
    assert (exported.metadata["scoring"], exported.metadata["parts"]) == ("paper", ["local", "global"])
    assert "exposure" not in exported.metadata
    assert exported.metadata["threshold"] is None


@pytest.mark.parametrize(
    ("output", "change"),
    [
        ("score", lambda score: score * np.nan),
        ("score", lambda score: score * 1.01),
        ("map", lambda located: located + 0.1),
        ("parts", lambda parts: parts[:, ::-1]),
        ("suspect", lambda suspect: ~suspect),
        ("anomalous", lambda anomalous: ~anomalous),
    ],
    ids=["no score", "another score", "another map", "other parts", "another suspect", "another decision"],
)
def test_a_file_that_disagrees_is_not_kept(tmp_path, below, monkeypatch, output, change):
    path = tmp_path / "model.pt2"
    path.write_text("older")
    detector = small_detector(exposure=EXPOSURE)
    whole = module_run(Inspection(detector, 1.0))

    def run(images):
        outputs = whole(images)
        return outputs | {output: change(outputs[output])}

    monkeypatch.setattr(export_module, "_program", lambda *_: None)
    monkeypatch.setattr(export_module, "_write_torch", lambda program, temporary, metadata: temporary.touch())
    monkeypatch.setattr(export_module, "_load_torch", lambda _: run)
    with pytest.raises(UserError, match="disagrees with the run by"):
        export(detector, path, "torch", category="c", threshold=1.0)
    assert [(name, path.read_text()) for name in below(tmp_path)] == [(path.name, "older")]


def test_a_detector_that_computes_in_bf16_is_refused(tiny_detector, tmp_path):
    in_bf16 = replace(tiny_detector, precision="bf16")
    with pytest.raises(UserError, match=r"calibrated for bf16, .* `dskd-fast recalibrate RUN --precision fp32`"):
        export(in_bf16, tmp_path / "model.pt2", "torch", category="screw_bag", threshold=None)
    assert not any(tmp_path.iterdir())


def test_the_two_files_of_openvino_are_replaced_together(tmp_path, below, monkeypatch):
    path, weights = tmp_path / "model.xml", tmp_path / "model.bin"

    def write(program, temporary, metadata):
        temporary.write_text("new")
        temporary.with_suffix(".bin").write_text("new")

    def replace_all_but_the_last(source, target):
        if target == path and source.read_text() == "new":
            raise OSError("no more")
        shutil.move(source, target)

    monkeypatch.setattr(export_module, "_program", lambda *_: None)
    monkeypatch.setattr(export_module, "_write_openvino", write)
    monkeypatch.setattr(export_module, "_load_openvino", lambda _: module_run(Inspection(small_detector(), 1.0)))
    for file in (weights, path):
        file.write_text("older")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_all_but_the_last)
        with pytest.raises(UserError, match="no more"):
            export(small_detector(), path, "openvino", category="c", threshold=1.0)
    assert [(tmp_path / name).read_text() for name in below(tmp_path)] == ["older", "older"]
    export(small_detector(), path, "openvino", category="c", threshold=1.0)
    assert [(tmp_path / name).read_text() for name in below(tmp_path)] == ["new", "new"]


@pytest.mark.parametrize(("file_format", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_what_a_format_needs_is_known_before_the_work(tmp_path, monkeypatch, below, file_format, package):
    path, find_spec = tmp_path / f"model{SUFFIXES[file_format]}", export_module.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            export_module.importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
        )
        with pytest.raises(UserError, match=rf'{package}, .*pip install "dskd-fast\[{file_format}\]"'):
            export(small_detector(), path, file_format, category="c", threshold=None)
    monkeypatch.setattr(export_module, "_MAX_ONNX_BYTES", 1000)
    with pytest.raises(UserError, match="--format torch"):
        export(small_detector(), path, file_format, category="c", threshold=None)
    assert below(tmp_path) == []


def test_where_the_disk_is_full_an_older_file_is_kept(tmp_path, below, monkeypatch):
    """PyTorch's own writer would end the process."""
    path = tmp_path / "model.pt2"
    path.write_text("older")
    program = torch.export.export(nn.Linear(300, 300), (torch.zeros(1, 300),))
    monkeypatch.setattr(export_module, "_program", lambda *_: program)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            export(small_detector(), path, "torch", category="c", threshold=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [(name, path.read_text()) for name in below(tmp_path)] == [(path.name, "older")]
