"""The whole model: a step, a scoring pass, a training beside the CPU's; and compiling ahead what takes long."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bench import memory
from bench.gpu import losses
from bench.gpu.measure import Session, clock
from bench.test_dskd import CALIBRATED, EAGER, OURS, PAPERS, Case, call_of
from bench.work import features, run
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


def warm(session: Session) -> None:
    """Compile what later steps need, while nothing is timed: it is then found in the compilers' caches."""

    def loss(shape: tuple[int, ...], contestant: losses.Contestant) -> dict[str, Any]:
        with losses.settings(contestant, session.device):
            for mode in losses.MODES:
                run(contestant.make(), *features(shape, 0.1, session.device), mode)
        return {}

    def step(contestant: str) -> dict[str, Any]:
        teacher, size, batch = session.plan.model
        call_of(Case(teacher, batch, _STEP, contestant, "bf16"), session.device, size, is_compiled=True)()
        return {}

    compiled = [c for c in losses.contestants(session) if c.name.startswith("torch.compile")]
    shapes = dict.fromkeys(shape for shape, *_ in losses.timed(session))
    of_precision = {
        c.precision: [
            ({"what": f"{c.name}, {c.precision}, {'x'.join(map(str, s))}"}, functools.partial(loss, s, c))
            for s in shapes
        ]
        for c in compiled
    }
    of_blocks = [
        ({"what": f"blocks, {p}"}, functools.partial(losses.compile_blocks, session, p))
        for p in ("bf16", "tf32")
        if not session.plan.is_rehearsal  # there is no compiler in it
    ]
    of_model = [({"what": f"{name}, training step"}, functools.partial(step, name)) for name in (OURS, EAGER)]
    lots = [
        of_precision["fp32"],
        of_model,
        of_blocks,
        of_precision["tf32"],
    ]
    session.each(case for lot in lots[session.process :: session.processes] for case in lot)


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
