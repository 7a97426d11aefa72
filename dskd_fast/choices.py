"""Names, ranges and defaults that the command line shares with what it calls. Nothing is imported: --help is quick."""

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "tf32", "bf16")
"""Of training; of the operands of one call see `dskd_fast.ops.dispatch.PRECISIONS`."""
SCORING_PRECISIONS = ("fp32", "bf16")

DEFAULT_TEACHER = "wide_resnet50_2"
LITE = "lite"
STAGE4_INITS = ("imagenet", "random")
STUDENTS = ("both", "local", "global")
LOSSES = ("cosine", "flattened-cosine", "contextual-affinity")
SCHEDULES = ("constant", "cosine")
SCORINGS = ("calibrated", "paper")
RECIPES = ("fast", "paper")

TEMPERATURE_RANGE = (0.01, 100.0)
DISTILLATION_TEMPERATURE_RANGE = (0.005, 100.0)
"""Of the loss against any keys."""
BITS_RANGE = (9, 16)
"""Bits of a camera whose files hold 16."""

OVERLAYS = ("all", "anomalous", "none")
OVERLAY_FORMATS = ("jpg", "png")
EXPORT_FORMATS = ("torch", "onnx", "openvino")
EXPERIMENTS = ("loco", "mvtec-ad", "ablation-students", "ablation-losses", "ablation-gccb", "ablation-temperature")
"""Of the paper."""
METHODS = ("dskd", "rd", "patchcore-25", "spade", "us", "gcad", "ae", "vae", "mnad", "f-anogan", "vm")
"""Of the paper's tables, its own first."""
ANOMALIB = "anomalib:"
"""Before the name of a model of anomalib."""


def is_method(name: str) -> bool:
    """Whether it is one of `METHODS`, or may be a model of anomalib."""
    return name in METHODS or (name.startswith(ANOMALIB) and name.removeprefix(ANOMALIB).isidentifier())


FALSE_ALARMS = 0.01
"""The share of normal images that a threshold lets be called anomalous, where there are enough images to tell."""

HOLDOUT = 0.1
"""Share of the training images that is held out where there are no validation images."""

MAX_PIXELS = 250_000_000
"""Images with more pixels are refused."""

HOST, PORT = "127.0.0.1", 8000
SERVED_BYTES, SERVED_PIXELS = 32 * 2**20, 50_000_000
"""Of a photograph that is sent to the service, at most."""

DATA_ROOT_VARIABLE = "DSKD_FAST_DATA"
DATA_ROOT = "mvtec_loco_anomaly_detection"
"""Folder of the data set where neither an option nor the variable names one."""
