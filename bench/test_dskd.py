"""One training step and one scoring pass of the whole model, against the eager loss and a single-student method.

ReverseDistillation of anomalib trains one student with the same backbone; DSKD trains two. All weights are random: the
work is the same. Scoring is `Detector.find`, by calibrated scores and by the paper's: rows of one table, whose
speed-ups are over the latter's, with which the calibrated ones take turns.
"""

import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.contestants import cosine_textbook, textbook
from bench.lab import row
from dskd_fast import DSKD
from dskd_fast.detection.detector import to_float
from dskd_fast.models.folding import round_weights
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.trainer import Trainer

_SIZE = 256


class Case(NamedTuple):
    teacher: str
    batch: int
    mode: str
    contestant: str
    precision: str

    @property
    def id(self) -> str:
        return f"{self.teacher}-b{self.batch}-{self.mode}-{self.contestant}-{self.precision}"

    @property
    def work(self) -> str:
        return f"{self.teacher}, {_SIZE} px, batch of {self.batch}"

    @property
    def group(self) -> str:
        return f"{self.work}, {self.mode}"

    def row(self) -> dict:
        return row(
            "dskd",
            self.work,
            self.mode,
            self.contestant,
            self.precision,
            ours=self.contestant in _ALL_OURS,
            reference=(self.contestant, self.precision) == (_REFERENCES[self.mode], "fp32"),
            images=self.batch,
        )


OURS, EAGER, _OTHER = "DSKD", "DSKD, eager losses", "anomalib ReverseDistillation"
CALIBRATED, PAPERS = "DSKD, calibrated scores", "DSKD, the paper's scores"
_ALL_OURS = (OURS, CALIBRATED, PAPERS)
_CONTESTANTS = {"training step": (OURS, EAGER, _OTHER), "scoring pass": (CALIBRATED, PAPERS, EAGER, _OTHER)}
_REFERENCES = {"training step": EAGER, "scoring pass": PAPERS}

# Each image is compared with every training image: about as many as a category of MVTec LOCO AD has.
_N_TRAINING = 350

# Without --bench-full: the recipe that is meant for a CPU, and the method it is compared with as that ships.
_QUICK = {
    ("lite", "training step"): ((OURS, "fp32"), (EAGER, "fp32")),
    ("lite", "scoring pass"): ((CALIBRATED, "fp32"), (PAPERS, "fp32"), (EAGER, "fp32")),
    ("wide_resnet50_2", "training step"): ((OURS, "fp32"), (OURS, "bf16"), (_OTHER, "fp32"), (_OTHER, "bf16")),
    ("wide_resnet50_2", "scoring pass"): ((PAPERS, "fp32"), (_OTHER, "fp32")),
}


def cases(is_full: bool) -> list[Case]:
    found = []
    for (teacher, mode), quick in _QUICK.items():
        for batch in (4, 16) if is_full else (4,):
            for contestant in _CONTESTANTS[mode]:
                for precision in ("fp32", "bf16"):
                    exists = mode == "training step" or precision == "fp32" or contestant != EAGER
                    if exists and (is_full or (contestant, precision) in quick):
                        found.append(Case(teacher, batch, mode, contestant, precision))
    return found


def test_dskd(benchmark, lab, case):
    info, key = case.row(), (case.teacher, case.mode, case.contestant, case.precision)
    if case.contestant == _OTHER:
        if importlib.util.find_spec("anomalib") is None:
            lab.leave_out(info, case.group, 'anomalib is not installed: pip install -e ".[baselines]"')
        if case.teacher == "lite":
            lab.leave_out(info, case.group, "it has no student for this backbone")
    lab.leave_out_of_quick(case)
    if reason := lab.too_long(key, case.batch):
        lab.leave_out(info, case.group, reason)
    reference = None
    if case.contestant == CALIBRATED:
        reference = call_of(case._replace(contestant=PAPERS), lab.device)
        reference()
    call = (_anomalib if case.contestant == _OTHER else call_of)(case, lab.device)
    # Memory is taken from the system in the first steps, and then kept.
    seconds = lab.time(benchmark, case.group, info, call, warm_up=2, reference=reference)
    lab.note_time(key, case.batch, seconds, f"a batch of {case.batch}")


def _images(case: Case, size: int = _SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (case.batch, 3, size, size), dtype=torch.uint8, generator=generator)


def call_of(case: Case, device: torch.device, size: int = _SIZE, is_compiled: bool = False) -> Callable[[], object]:
    """The call to time of a contestant that is DSKD, on images of `size`; only a training step can be compiled."""
    model = DSKD(case.teacher, image_size=size, pretrained=False).to(device, memory_format=torch.channels_last)
    images = _images(case, size)
    scoring = "calibrated" if case.contestant == CALIBRATED else "paper"
    options = TrainingOptions(
        case.teacher, image_size=size, precision=case.precision, scoring=scoring, compile=is_compiled
    )
    if case.mode == "training step":
        trainer = Trainer(model, options)
        if case.contestant == EAGER:
            trainer.losses.global_loss_fn = _summed(textbook)
        batch = to_float(images, device)
        return lambda: trainer.step(batch)
    if case.contestant in _ALL_OURS:
        model.fold()
        if case.precision == "bf16":
            round_weights(model, torch.bfloat16)
    detector = options.detector(model)
    detector.precision = case.precision
    if case.contestant == EAGER:
        model.anomaly_maps = lambda *arguments, **named: _eager_maps(model, *arguments)
    detector.calibrate([images], "train")
    if detector.calibrated is not None:
        condensed = detector.calibrated.parts["condensed"]
        condensed.references = condensed.references.repeat(math.ceil(_N_TRAINING / len(images)), 1)[:_N_TRAINING]
    return lambda: detector.find(images)


def _summed(function: Callable) -> Callable:
    return lambda student, teacher: sum(function(s, t).mean() for s, t in zip(student, teacher, strict=True))


def _eager_maps(model: DSKD, images: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    features = model(images)

    def added(student: list[torch.Tensor], function: Callable) -> torch.Tensor:
        maps = (function(s, t).view(len(s), 1, *s.shape[2:]) for s, t in zip(student, features.teacher, strict=True))
        return sum(torch.nn.functional.interpolate(m, images.shape[-2:], mode="bilinear")[:, 0] for m in maps)

    return added(features.local_student, cosine_textbook), added(features.global_student, textbook)


def _anomalib(case: Case, device: torch.device) -> Callable[[], object]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
        from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
        from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel
    layers = ["layer1", "layer2", "layer3"]
    model = ReverseDistillationModel(
        case.teacher, (_SIZE, _SIZE), layers, AnomalyMapGenerationMode.ADD, pre_trained=False
    ).to(device)
    images = _images(case).to(device).float() / 255

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16")

    if case.mode == "scoring pass":
        model.eval()

        def score() -> object:
            with torch.inference_mode(), autocast():
                return model(images)

        return score
    loss_fn = ReverseDistillationLoss()
    parameters = [*model.decoder.parameters(), *model.bottleneck.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.005, betas=(0.5, 0.99))  # as anomalib configures it
    model.train()

    def step() -> None:
        with autocast():
            loss = loss_fn(*model(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
