"""A detector as a file that needs nothing of this package: a program exported by PyTorch, ONNX, or OpenVINO's IR.

The file does all that `Detector.predict` does with images in memory: it resizes them as Pillow does, normalises, runs
the networks, applies the statistics, filters, enlarges the map and decides.
"""

import importlib.util
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as nnf

import dskd_fast
from dskd_fast.data.images import MIN_SIDE
from dskd_fast.detection.calibration import TOLERANCE, is_above
from dskd_fast.detection.detector import Detector, calibration_of
from dskd_fast.detection.program import Inspection
from dskd_fast.device import numerics
from dskd_fast.errors import UserError
from dskd_fast.files import require_writable, write_file
from dskd_fast.ops.portable import without_operators

Format = Literal["torch", "onnx", "openvino"]
SUFFIXES: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
OPSET = 18
METADATA = "dskd_fast.json"
"""Name of the metadata among a .pt2's extra files."""
RT_INFO = "dskd_fast"
"""Name of the metadata in OpenVINO's `Model.get_rt_info`."""

# No file can state it: OpenVINO 2026.4 reads the precision from neither a model's nor its nodes' properties.
OPENVINO_PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}

_PACKAGES: dict[Format, tuple[str, ...]] = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
# OpenVINO's weights lie in a second file.
_WEIGHTS = ".bin"
_MAX_ONNX_BYTES = 2**31 - 2**25  # protobuf's 2 GiB, less room for what is not weights

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the file; OpenVINO's weights lie beside it, in a file that ends in .bin.
        n_bytes: of both together.
        metadata: what the file says of itself.
        difference: the largest between its scores, maps and parts and `Detector.predict`'s, as a multiple of
            1 + |value|.
    """

    path: Path
    n_bytes: int
    metadata: dict[str, Any]
    difference: float


def export(detector: Detector, path: Path, file_format: Format, *, category: str, threshold: float | None) -> Exported:
    """Write a detector as one file, which is kept only if it agrees with the detector.

    The file takes uint8 RGB images (B, 3, H, W), each side at least 32 pixels, B, H and W free from call to call, and
    fails for smaller ones; in ONNX at a node whose name begins with "images_below_32_pixels". A value v of more than 8
    bits has to be made round(255 v / (2^bits - 1)) before, `bits` being the run's, or 16. All is in float32, in formats
    other than "torch" without float64; in less than float32 all numbers are NaN and all images anomalous and suspect.

    Args:
        detector: calibrated.
        path: of the file; an older one is replaced. A process that is killed while it replaces both of OpenVINO's
            leaves no .xml under its name.
        file_format: "torch" for `torch.export.load`, "onnx", or "openvino", whose users have to ask for float32, too:
            `Exported.metadata["compile"]` is the line.
        category: recorded in the file.
        threshold: of the decisions; None makes none.

    Raises:
        UserError: the detector computes in bf16, packages are missing, OpenVINO's .bin is there without its .xml, the
            weights are too large for an ONNX file, the file disagrees with the detector, or cannot be written. An older
            file is then still there.
    """
    if detector.precision != "fp32":
        raise UserError(
            f"the run is calibrated for {detector.precision}, and exported files compute in fp32: calibrate it again "
            "with `dskd-fast recalibrate RUN --precision fp32`"
        )
    suffix = SUFFIXES[file_format]
    if path.suffix != suffix:
        raise UserError(f"{path} does not end in {suffix}, as files of the format {file_format} do: choose such a name")
    require_writable(path)
    _check_packages(file_format)
    files = [path]
    if file_format != "torch":
        _check_size(detector)
    if file_format == "openvino":
        files.append(path.with_suffix(_WEIGHTS))
        require_writable(files[1])
        if files[1].exists() and not path.exists():
            raise UserError(f"{files[1]} exists without {path.name}, so it may be anything: choose another name")
    metadata = _metadata(detector, file_format, category, threshold)
    if file_format == "openvino":
        precision = json.dumps(OPENVINO_PRECISION)
        metadata["compile"] = f'compiled = openvino.Core().compile_model("{path.name}", "CPU", {precision})'
    write, load = {
        "torch": (_write_torch, _load_torch),
        "onnx": (_write_onnx, _load_onnx),
        "openvino": (_write_openvino, _load_openvino),
    }[file_format]
    program = _program(detector, threshold)
    difference = 0.0
    older: dict[Path, Path] = {}

    def write_and_verify(temporary: Path) -> None:
        nonlocal difference
        try:
            write(program, temporary, metadata)
            difference = _difference(detector, load(temporary), threshold)
            if not difference <= TOLERANCE:  # NaN, too
                raise UserError(
                    f"the exported file disagrees with the run by {difference:.1e}, more than {TOLERANCE:.0e}, and was "
                    "not kept: use another --format, or report this"
                )
            if len(files) > 1:
                # The .xml first, and back last: beside weights that are not its own it would be wrong without a word.
                for file in filter(Path.exists, files):
                    older[file] = temporary.with_suffix(f".old{file.suffix[1:]}")
                    os.replace(file, older[file])
                os.replace(temporary.with_suffix(_WEIGHTS), files[1])
        finally:
            for file in files[1:]:
                temporary.with_suffix(file.suffix).unlink(missing_ok=True)

    try:
        write_file(path, write_and_verify)
    except BaseException:
        # The new weights alone would keep the next export from this place.
        if len(files) > 1 and not path.exists() and all(map(Path.exists, older.values())):
            files[1].unlink(missing_ok=True)
        for file, aside in reversed(older.items()):
            if aside.exists():
                os.replace(aside, file)
        raise
    for aside in older.values():
        aside.unlink()
    return Exported(path, sum(file.stat().st_size for file in files), metadata, difference)


def _program(detector: Detector, threshold: float | None) -> torch.export.ExportedProgram:
    side = detector.model.image_size
    example = torch.zeros((2, 3, side + 3, side + 5), dtype=torch.uint8, device=detector.device)
    free = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", min=MIN_SIDE),
        3: torch.export.Dim("width", min=MIN_SIDE),
    }
    with torch.no_grad(), without_operators():
        return torch.export.export(
            Inspection(detector, threshold), (example,), dynamic_shapes={"images": free}, strict=False
        )


def _metadata(detector: Detector, file_format: Format, category: str, threshold: float | None) -> dict[str, Any]:
    outputs = {
        "score": "float32 (batch,), standard deviations above the normal mean",
        "map": "float32 (batch, height, width), the same for every pixel",
        "parts": f"float32 (batch, {len(detector.parts)}), what the score is made of, in the same unit",
    }
    if threshold is not None:
        outputs["anomalous"] = "bool (batch,), score above the threshold, or suspect"
    exposure = calibration_of(detector).exposure
    if exposure is not None:
        limits = {"brightness": [*exposure.brightness], "contrast": [*exposure.contrast]}
        outputs["suspect"] = "bool (batch,), brightness or contrast beyond what normal images allow"
    return {
        "dskd_fast": dskd_fast.__version__,
        "torch": torch.__version__,
        "category": category,
        "teacher": detector.model.teacher.name,
        "image_size": detector.model.image_size,
        "scoring": "paper" if detector.calibrated is None else "calibrated",
        "parts": list(detector.parts),
        "threshold": threshold,
        **({} if exposure is None else {"exposure": limits}),
        **({} if file_format == "torch" else {"opset": OPSET}),
        **({} if detector.bits is None else {"bits": detector.bits}),
        "inputs": {
            "images": f"uint8 (batch, 3, height, width), RGB, each side at least {MIN_SIDE} pixels; a value of more "
            f"than 8 bits as round(value * 255 / {2 ** (detector.bits or 16) - 1})"
        },
        "outputs": outputs,
        "tolerance": f"{TOLERANCE:g} (1 + |value|)",
    }


# ------------------------------------------------------------------------------------------------ formats


def _write_torch(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    # Through memory: PyTorch's own writer ends the process where the disk is full.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={METADATA: json.dumps(metadata, indent=2)})
    path.write_bytes(content.getbuffer())


def _load_torch(path: Path) -> Callable[[NDArray[np.uint8]], Outputs]:
    module = torch.export.load(path).module()

    def run(images: NDArray[np.uint8]) -> Outputs:
        with torch.inference_mode(), numerics("fp32", torch.device("cpu")):
            return {name: value.cpu().numpy() for name, value in module(torch.from_numpy(images)).items()}

    return run


def _check_packages(file_format: Format) -> None:
    missing = [name for name in _PACKAGES[file_format] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {file_format} needs {', '.join(missing)}, not installed here: run pip install "
            f'"dskd-fast[{file_format}]"'
        )


def _check_size(detector: Detector) -> None:
    n_bytes = sum(x.numel() * x.element_size() for x in detector.model.state_dict().values())
    if n_bytes > _MAX_ONNX_BYTES:
        raise UserError(
            f"the weights take {n_bytes / 2**30:.1f} GiB, and one ONNX file, of which OpenVINO's are made, too, holds "
            "2 at most: use --format torch, or train with a smaller --gccb"
        )


def to_onnx(
    program: torch.export.ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], teacher: str
) -> torch.onnx.ONNXProgram:
    """An exported program of images (B, 3, H, W) in ONNX, with these names of inputs and outputs.

    Raises:
        UserError: the teacher, of this name, holds what ONNX cannot express.
    """
    try:
        onnx_program = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = error.__cause__ or error
        raise UserError(
            f"the teacher {teacher} holds what ONNX or PyTorch's exporter cannot express "
            f"({str(reason).splitlines()[0][:200]}): use --format torch"
        ) from error
    assert onnx_program is not None  # only exporters of another kind return none
    # The exporter's names for what is left open are symbols such as s34.
    graph = onnx_program.model.graph
    shape = graph.inputs[0].shape
    assert shape is not None  # the program states it
    symbols = [str(shape[i]) for i in (0, 2, 3)]
    names = dict(zip(symbols, ("batch", "height", "width"), strict=True))
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is None:
            continue
        for i, symbol in enumerate(value.shape):
            if str(symbol) in names:
                value.shape[i] = names[str(symbol)]
    return onnx_program


def _write_onnx(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    onnx_program = to_onnx(program, [*metadata["inputs"]], [*metadata["outputs"]], metadata["teacher"])
    graph = onnx_program.model.graph
    # Runtimes name the node that fails.
    value = graph.inputs[0]
    for side in ("height", "width"):
        reader = next(node for node in graph if node.op_type == "Gather" and node.inputs[0] is value)
        reader.name = f"images_below_{MIN_SIDE}_pixels_in_{side}"
        value = reader.outputs[0]
    onnx_program.model.metadata_props.update(
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    )
    onnx_program.save(path, external_data=False)


def _load_onnx(path: Path) -> Callable[[NDArray[np.uint8]], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


def _write_openvino(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """The file, and its weights beside it."""
    import openvino

    onnx_file = path.with_suffix(SUFFIXES["onnx"])
    try:
        _write_onnx(program, onnx_file, metadata)
        model = openvino.Core().read_model(onnx_file)
        # Reading a pixel that is not there is no error in OpenVINO.
        side = openvino.Dimension(MIN_SIDE, -1)
        model.reshape({"images": openvino.PartialShape([openvino.Dimension(), 3, side, side])})
        for name, value in metadata.items():
            model.set_rt_info(value if isinstance(value, str) else json.dumps(value), [RT_INFO, name])
        try:
            openvino.save_model(model, path, compress_to_fp16=False)
        except RuntimeError as error:
            raise OSError(str(error).strip().splitlines()[-1]) from error
    finally:
        onnx_file.unlink(missing_ok=True)


def _load_openvino(path: Path) -> Callable[[NDArray[np.uint8]], Outputs]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", OPENVINO_PRECISION)
    return lambda images: {output.any_name: x.copy() for output, x in compiled({"images": images}).items()}


# ------------------------------------------------------------------------------------------------ verification


def _difference(detector: Detector, run: Callable[[NDArray[np.uint8]], Outputs], threshold: float | None) -> float:
    """The largest difference of a file's scores, maps and parts from the detector's, as a multiple of 1 + |value|."""
    generator = np.random.default_rng(0)
    side = detector.model.image_size
    differences = []
    # Larger and smaller than what the networks see, and other batches than the one that was traced.
    for batch, height, width in ((1, 2 * side, side + 31), (3, max(side // 2, MIN_SIDE), side)):
        images = _textures(generator, batch, height, width)
        found = run(images)
        expected = detector.predict(images.transpose(0, 2, 3, 1))
        pairs = [(found["score"], np.array([one.score for one in expected]))]
        pairs.append((found["map"], np.stack([one.map for one in expected])))
        pairs.append((found["parts"], np.array([list(one.parts.values()) for one in expected])))
        differences += [np.max(np.abs(ours - theirs) / (1 + np.abs(theirs))) for ours, theirs in pairs]
        suspect = np.array([one.suspect is not None for one in expected])
        wrong = "suspect" in found and (found["suspect"] != suspect).any()
        if threshold is not None:
            wrong |= (found["anomalous"] != is_above(found["score"], threshold) | suspect).any()
        if wrong:
            differences.append(np.inf)
    return float(np.max(differences))


def _textures(generator: np.random.Generator, batch: int, height: int, width: int) -> NDArray[np.uint8]:
    """Coloured clouds under fine noise, uint8 (B, 3, H, W)."""
    clouds = torch.from_numpy(generator.uniform(0, 255, (batch, 3, 6, 6)))
    images = nnf.interpolate(clouds, (height, width), mode="bilinear").numpy()
    return (images + generator.normal(0, 8, images.shape)).clip(0, 255).astype(np.uint8)
