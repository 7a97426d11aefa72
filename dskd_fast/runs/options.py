"""The options of a run: everything that decides its result."""

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from dskd_fast.choices import (
    BITS_RANGE,
    DEFAULT_TEACHER,
    DEVICES,
    LITE,
    LOSSES,
    PRECISIONS,
    SCHEDULES,
    SCORINGS,
    STAGE4_INITS,
    STUDENTS,
    TEMPERATURE_RANGE,
)
from dskd_fast.errors import UserError

if TYPE_CHECKING:
    from dskd_fast.detection.calibration import Scoring
    from dskd_fast.detection.detector import Detector
    from dskd_fast.models import DSKD

# Of the options that are one of several names.
CHOICES = {
    "stage4_init": STAGE4_INITS,
    "students": STUDENTS,
    "schedule": SCHEDULES,
    "local_loss": LOSSES,
    "global_loss": LOSSES,
    "precision": PRECISIONS,
    "device": DEVICES,
    "scoring": SCORINGS,
}


@dataclass(frozen=True)
class TrainingOptions:
    """Everything that decides the result, with the paper's recipe as defaults.

    Attributes:
        teacher, teacher_weights, image_size, gccb, stage4_init: see `dskd_fast.DSKD`.
        epochs, batch_size, lr: of Adam with betas (0.5, 0.999).
        schedule: of the learning rate: "constant" (the paper's) or "cosine", to 0 over the training.
        warmup: the share of the training over which the learning rate rises to `lr`, 0 (the paper's) to 1.
        averaging: decay per step of the moving average of the students' weights that is the result, from 0 (none, the
            paper's) up to, not including, 1.
        temperature: T of the contextual affinity.
        students: "both", or "local" or "global" for one branch alone (the paper's ablations).
        local_loss, global_loss: of each student: "cosine" (per position, the paper's for the local one),
            "flattened-cosine" (one per image, as in RD4AD's code) or "contextual-affinity" (the paper's for the global
            one). Its anomaly map is the cosine distance or the contextual affinity, accordingly.
        augmentation: in `Augmentation.parse`'s form.
        scoring: "calibrated" (ours: `dskd_fast.detection.scoring.calibrated`) or "paper" (eq. 8).
        sigma: of the image score's Gaussian filter, in pixels of the S x S image; None is 4 at 256, in proportion.
        filter_maps, align_corners: see `Scoring`.
        precision: of training: "fp32", "tf32" or "bf16". Scoring is in float32, or as `dskd-fast
            recalibrate --precision` says.
        compile: whether training runs through torch.compile.
        device: "auto", "cpu" or "cuda".
        seed: of the initial weights, the order and the augmentation.
        bits: of values of more than 8 bits in image files, 9 to 16: 2^bits - 1 is white; None takes the full range of
            a file's type.

    Raises:
        UserError: a value of the wrong type or out of range. (Whether `image_size` and `gccb` fit the teacher shows
            when the networks are built.)
    """

    teacher: str = DEFAULT_TEACHER
    teacher_weights: str | None = None
    image_size: int = 256
    gccb: int | None = None
    stage4_init: str = "imagenet"
    epochs: int = 200
    batch_size: int = 16
    lr: float = 0.005
    schedule: str = "constant"
    warmup: float = 0.0
    averaging: float = 0.0
    temperature: float = 1.0
    students: str = "both"
    local_loss: str = "cosine"
    global_loss: str = "contextual-affinity"
    augmentation: str = "none"
    scoring: str = "calibrated"
    sigma: float | None = None
    filter_maps: bool = False
    align_corners: bool = False
    precision: str = "fp32"
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    bits: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, accepted: str) -> None:
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)!r}: use {accepted}")

        for name, hint in get_type_hints(TrainingOptions).items():
            value = getattr(self, name)
            whole_for_real = type(value) is int and isinstance(1.0, hint)
            is_of_type = isinstance(value, hint) and (type(value) is not bool or hint is bool)
            check(name, is_of_type or whole_for_real, f"a value of type {getattr(hint, '__name__', hint)}")
        for name, choices in CHOICES.items():
            check(name, getattr(self, name) in choices, "one of " + ", ".join(choices))
        for name in ("image_size", "epochs", "batch_size"):
            check(name, getattr(self, name) >= 1, "a whole number from 1 up")
        fewest, most = BITS_RANGE
        check("bits", self.bits is None or fewest <= self.bits <= most, f"a whole number from {fewest} to {most}")
        check("seed", 0 <= self.seed < 2**63, "a whole number from 0 up")
        check("lr", 0 < self.lr < math.inf, "a number above 0")
        check("warmup", 0 <= self.warmup <= 1, "a number from 0 to 1")
        check("averaging", 0 <= self.averaging < 1, "a number from 0 up to, not including, 1")
        low, high = TEMPERATURE_RANGE
        check("temperature", low <= self.temperature <= high, f"a number from {low} to {high:g}")
        check("sigma", self.sigma is None or 0 < self.sigma <= self.image_size, "a number above 0, up to image_size")
        from dskd_fast.data.augment import (
            Augmentation,  # imported late, as below: the command line's help needs no torch
        )

        Augmentation.parse(self.augmentation)

    def networks(self, *, pretrained: bool) -> "DSKD":
        """The networks that are trained; not `pretrained`, with arbitrary weights, for a state dict to be loaded."""
        from dskd_fast.models import DSKD
        from dskd_fast.models.initialisation import WithoutRandomWeights

        with contextlib.nullcontext() if pretrained else WithoutRandomWeights():
            return DSKD(
                self.teacher,
                image_size=self.image_size,
                gccb=self.gccb,
                stage4_init=self.stage4_init,
                students=self.students,
                pretrained=pretrained,
                teacher_weights=self.teacher_weights if pretrained else None,
            )

    def detector(self, model: "DSKD") -> "Detector":
        """The networks with the scoring that is asked for, not calibrated yet."""
        from dskd_fast.detection.detector import Detector
        from dskd_fast.detection.scoring.calibrated import CalibratedScore

        scoring = self.map_options
        calibrated = None
        if self.scoring == "calibrated":
            calibrated = CalibratedScore(model, scoring.sigma).to(model.teacher.mean.device)
        return Detector(model.eval(), scoring, bits=self.bits, calibrated=calibrated)

    @property
    def map_options(self) -> "Scoring":
        """How maps and scores are made of features."""
        from dskd_fast.detection.calibration import Scoring

        sigma = 4 * self.image_size / 256 if self.sigma is None else self.sigma
        return Scoring(
            self.temperature,
            sigma,
            self.filter_maps,
            self.align_corners,
            local_map=self.local_loss.removeprefix("flattened-"),
            global_map=self.global_loss.removeprefix("flattened-"),
        )


# What may change in the middle of a training: the model and what it has seen stay what they are.
CHANGEABLE = ("epochs", "batch_size", "lr", "precision", "compile", "device")

# What a recipe changes of the paper's. Of "fast", chosen on photographs (`dskd_fast/detection/README.md`), the epochs
# come from the number of steps.
RECIPE_OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fast": {
        "batch_size": 8,
        "lr": 0.005,
        "schedule": "constant",
        "warmup": 0.05,
        "averaging": 0.99,
        "local_loss": "flattened-cosine",
    },
}
FAST_STEPS = 400
"""Training steps of the recipe "fast", rounded up to whole epochs."""


def default_recipe(teacher: str) -> str:
    """The recipe of who names none: the paper's teacher is for a GPU, "lite" for minutes."""
    return "fast" if teacher == LITE else "paper"


def recipe_options(recipe: str, n_images: int, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a recipe gives for so many training images, under those that were given besides."""
    options = RECIPE_OPTIONS[recipe] | given
    if recipe == "fast" and "epochs" not in given:
        steps_per_epoch = math.ceil(n_images / options["batch_size"])
        options["epochs"] = math.ceil(FAST_STEPS / max(1, steps_per_epoch))
    return options


# Options that runs of earlier versions do not have, and what these did.
ADDED_OPTIONS = {"bits": None, "warmup": 0.0, "averaging": 0.0, "scoring": "paper"}
