"""The whole model: a step, a scoring pass, and a training beside the CPU's."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bench import memory
from bench.gpu.measure import Session, clock
from bench.test_dskd import CALIBRATED, EAGER, OURS, PAPERS, Case, call_of
from dskd_fast.cli.demo import options_for_demo
from dskd_fast.data.layout import open_category
from dskd_fast.data.synthetic import CATEGORY, make_screw_bag
from dskd_fast.errors import UserError
from dskd_fast.models.teacher import LITE, Teacher
from dskd_fast.runs.history import TrainingState
from dskd_fast.training.train import train as train_on

_STEP, _SCORING = "training step", "scoring pass"
# The most telling first; scoring is always in float32.
_WHOLE = (
    (_STEP, OURS, "bf16", False),
    (_STEP, EAGER, "bf16", False),
    (_SCORING, PAPERS, "fp32", False),
    (_SCORING, EAGER, "fp32", False),
    (_STEP, OURS, "tf32", False),
    (_STEP, EAGER, "tf32", False),
    (_STEP, OURS, "bf16", True),
    (_STEP, EAGER, "bf16", True),
    (_SCORING, CALIBRATED, "fp32", False),
    (_STEP, OURS, "fp32", False),
)


def compile_step(session: Session, is_ours: bool) -> dict[str, Any]:
    """A compiled training step, done once."""
    teacher, size, batch = session.plan.model
    case = Case(teacher, batch, _STEP, OURS if is_ours else EAGER, "bf16")
    call_of(case, session.device, size, is_compiled=True)()
    return {}


def model(session: Session) -> None:
    """Times and peak memory of the whole model."""
    teacher, size, batch = session.plan.model

    def measured(mode: str, contestant: str, precision: str, is_compiled: bool) -> dict[str, Any]:
        memory.give_back(session.device)
        case = Case(teacher, batch, mode, contestant, precision)
        call = call_of(case, session.device, size, is_compiled)
        call()
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
            torch.cuda.reset_peak_memory_stats(session.device)
        # The host is part of it: nothing is held back.
        found: dict[str, Any] = clock(lambda k: call(), session.plan, 3, is_held=False)
        if session.device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated(session.device)
        return found | {"images_per_second": batch / found["ms"] * 1e3}

    session.each(
        (
            {"teacher": teacher, "size": size, "batch": batch, "mode": mode, "contestant": contestant}
            | {"precision": precision, "compiled": compiled},
            functools.partial(measured, mode, contestant, precision, compiled),
        )
        for mode, contestant, precision, compiled in _WHOLE
    )


def train(session: Session) -> None:
    """`train` on the demo's images, from the same weights in the same order, on the GPU and on the CPU."""
    here = session.plan.device
    trainings = list(dict.fromkeys([(here, "fp32"), ("cpu", "fp32"), (here, "bf16")]))
    session.each(
        ({"device": device, "precision": precision}, functools.partial(_train, session, device, precision))
        for device, precision in trainings[session.process :: session.processes]
    )


def _train(session: Session, device: str, precision: str) -> dict[str, Any]:
    images, size, epochs = session.plan.train
    options = dataclasses.replace(
        options_for_demo("cpu", seed=0),
        device=device,
        precision=precision,
        image_size=size,
        epochs=epochs,
        scoring="paper",
    )
    with tempfile.TemporaryDirectory() as folder:
        make_screw_bag(Path(folder), n_train=images, n_validation=0, n_test_good=0, n_structural=0, n_logical=0, seed=0)
        category = open_category(Path(folder), CATEGORY)
        weights, options = _weights(options, Path(folder))
        steps = -(-images // options.batch_size)

        def report(state: TrainingState) -> None:
            if state.step % steps == 0:
                losses_of_epoch = {"local_loss": state.local_loss, "global_loss": state.global_loss}
                session.note(what="epoch", device=device, precision=precision, epoch=state.epoch, **losses_of_epoch)

        _, history = train_on(category, options, report)
    return {
        "what": "training",
        "weights": weights,
        "images": images,
        "local_loss": [epoch.local_loss for epoch in history],
        "global_loss": [epoch.global_loss for epoch in history],
        "images_per_second": history[-1].images_per_second,
    }


def _weights(options: Any, folder: Path) -> tuple[str, Any]:
    """The teacher's own weights, or where they are not installed random ones, the same for all."""
    try:
        Teacher(LITE).load_weights()
    except UserError as error:
        torch.manual_seed(0)
        path = folder / "random.safetensors"
        state = {name: tensor.contiguous() for name, tensor in Teacher(LITE).net.state_dict().items()}
        safetensors.torch.save_file(state, path)
        return f"random ({error})", dataclasses.replace(options, teacher_weights=str(path))
    return "ImageNet", options
