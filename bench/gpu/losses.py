"""The losses: their errors, times, memory, and other block sizes than the table's."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import accuracy, memory
from bench.contestants import AFFINITY, COSINE, EAGER, Contestant
from bench.gpu.measure import Session, clock, rotating
from bench.work import UNITS, features, run
from dskd_fast.backends import native_build
from dskd_fast.device import numerics
from dskd_fast.ops import dispatch

MODES = ("scoring", "forward+backward")
LAYOUTS = ("contiguous", "channels_last")


# Errors


class Case(NamedTuple):
    """A contestant of ours on a shape, in a layout; `what`: its errors, or whether the same comes again."""

    kind: str
    contestant: Contestant
    shape: tuple[int, ...]
    layout: str
    what: str = "errors"

    def row(self) -> dict[str, Any]:
        named = {"backend": self.contestant.name, "precision": self.contestant.precision}
        return {"what": self.what, "kind": self.kind, **named, "shape": list(self.shape), "layout": self.layout}


def cases(session: Session, backend: str) -> list[Case]:
    """The paper's levels in all precisions and both layouts, then sizes that fill no block, then repetition.

    Each size, precision and layout may have to be compiled, so that not all are met by all.
    """
    plan = session.plan
    ours = [c for c in AFFINITY if c.name == backend]
    cosine = [c for c in COSINE if c.name == backend]
    found = []
    for level, shape in enumerate(plan.shapes):
        for k, contestant in enumerate(ours):
            found += [Case("affinity", contestant, shape, LAYOUTS[(k + level + i) % 2]) for i in range(2 - (level > 0))]
        found += [Case("cosine", contestant, shape, LAYOUTS[level % 2]) for contestant in cosine]
    for k, shape in enumerate(plan.odd_shapes):
        found += [Case("affinity", ours[(k + i) % len(ours)], shape, LAYOUTS[(k + i) % 2]) for i in range(2)]
        found += [Case("cosine", contestant, shape, LAYOUTS[k % 2]) for contestant in cosine if k < 2]
    repeated = [Case("affinity", c, plan.odd_shapes[-1], LAYOUTS[k % 2], "again") for k, c in enumerate(ours)]
    repeated += [Case("cosine", c, plan.odd_shapes[-1], LAYOUTS[0], "again") for c in cosine]
    return (found + repeated)[:: plan.every]


def correct(session: Session) -> None:
    """The last process waits for the extension that is being built, the others share what there is at once."""
    *ready, last = session.plan.backends
    others = session.processes - 1
    if session.process < others:
        # Those of a level take longest: dealt out one by one, each process gets as many of them.
        mine = [case for backend in ready for case in cases(session, backend)][session.process :: others]
    elif (reason := session.is_built(last, patience=1e9)) is None:
        mine = cases(session, last)
    else:
        session.note(what="errors", backend=last, reason=reason)
        mine = []
    session.each((case.row(), functools.partial(_correct, session, case)) for case in mine)


def _correct(session: Session, case: Case) -> dict[str, Any]:
    if reason := refusal(session, case.contestant, case.shape):
        return {"reason": reason}
    function = _in_layout(case.contestant.make(), case.layout)
    if case.what == "again":
        return _again(function, case.shape, session.device)
    found = accuracy.errors(function, case.kind, case.shape, session.device)
    complaint = accuracy.complaint(case.contestant, found, case.shape)
    limit = accuracy.allowed(case.contestant, case.shape)
    return {"errors": found, "limit": limit, "passed": complaint is None, "complaint": complaint}


def _in_layout(function: Callable, layout: str) -> Callable:
    if layout == "contiguous":
        return function

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        return function(*(x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)))

    return call


def _again(function: Callable, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """A second backward and a second call have to give the same bits; a second derivative has to be refused."""
    student, teacher = features(shape, 0.1, device)
    student.requires_grad_()
    values = function(student, teacher)
    first, second = (torch.autograd.grad(values.sum(), student, retain_graph=True)[0] for _ in range(2))
    (other,) = torch.autograd.grad(function(student, teacher).sum(), student)
    try:
        (twice,) = torch.autograd.grad(function(student, teacher).square().sum(), student, create_graph=True)
        twice.sum().backward()
        refused = False
    except RuntimeError as error:
        refused = "second derivative" in str(error)
    wrong = [
        name
        for name, is_right in (
            ("backward twice gives other bits", torch.equal(first, second)),
            ("a second call gives other bits", torch.equal(first, other)),
            ("a second derivative is not refused", refused),
            ("the gradient is not finite, or 0", bool(first.isfinite().all() and first.any())),
        )
        if not is_right
    ]
    return {"passed": not wrong, "complaint": "; ".join(wrong) or None}


def refusal(session: Session, contestant: Contestant, shape: tuple[int, ...]) -> str | None:
    """Why a contestant cannot run here; unlike in the benchmarks, Triton's interpreter is welcome in a rehearsal."""
    if not contestant.ours:
        return contestant.refusal(shape, session.device, _free(session.device))
    is_built_here = contestant.name in native_build.EXTENSIONS
    if is_built_here and (reason := session.is_built(contestant.name)):
        return reason
    x = torch.empty(1, shape[1], 1, 1, device=session.device)
    return dispatch.refusal(contestant.name, x, x, contestant.precision)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8 << 30


# Times


def contestants(session: Session) -> list[Contestant]:
    """What is timed, the most telling first; what is not ours in tf32, too, which is a setting of PyTorch's."""
    by_name = {c[:2]: c for c in AFFINITY}
    compiled = by_name["torch.compile of eager", "fp32"]
    *ready, last = session.plan.backends
    chosen = [by_name["triton", "bf16"], EAGER, by_name["triton", "tf32"], by_name["fused attention", "fp32"]]
    chosen += [
        EAGER._replace(precision="tf32"),
        compiled,
        compiled._replace(precision="tf32"),
        by_name["eager", "bf16"],
    ]
    chosen += [by_name[name, p] for name in (*ready[1:], last) for p in ("bf16", "tf32")]
    return chosen


def timed(session: Session) -> Iterator[tuple[tuple[int, ...], Contestant, str]]:
    """All that is timed, in order: the first batch of all levels, then the next."""
    for batch, shape in itertools.product(session.plan.batches, session.plan.shapes):
        for contestant, mode in itertools.product(contestants(session), MODES):
            yield (batch, *shape[1:]), contestant, mode


def times(session: Session) -> None:
    """The map and its gradient; what is wrong is timed too, and says so."""
    session.each(
        (
            {"contestant": c.name, "precision": c.precision, "ours": c.ours, "shape": list(shape), "mode": mode},
            functools.partial(_time, session, shape, c, mode),
        )
        for shape, c, mode in timed(session)
    )


@functools.lru_cache(maxsize=1)
def _inputs(session: Session, shape: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    # As in training, once it has begun to converge.
    return rotating(features(shape, 0.1, session.device), session.plan)


def _time(session: Session, shape: tuple[int, ...], contestant: Contestant, mode: str) -> dict[str, Any]:
    if reason := refusal(session, contestant, shape):
        return {"reason": reason}
    memory.give_back(session.device)
    function, inputs = contestant.make(), _inputs(session, shape)
    with settings(contestant, session.device):
        complaint = _complaint(session, contestant, shape)
        found = clock(lambda k: run(function, *inputs[k % len(inputs)], mode), session.plan)
    operations = UNITS[mode] * 2 * shape[0] * shape[1] * (shape[2] * shape[3]) ** 2
    found["tflops"] = operations / found["ms"] / 1e9
    products = {r["precision"]: r["tflops"] for r in session.results("device") if r.get("tflops")}
    if contestant.precision in products:
        found["percent_of_product"] = 100 * found["tflops"] / products[contestant.precision]
    if contestant in AFFINITY and not session.plan.is_rehearsal:
        index = AFFINITY.index(contestant)
        found["extra_bytes"], _ = memory.extra_bytes(memory.call_of, ("affinity", index, shape, mode), session.device)
    return found | {"complaint": complaint}


def settings(contestant: Contestant, device: torch.device) -> contextlib.AbstractContextManager:
    """PyTorch's setting for float32 products that a contestant wants."""
    return numerics("tf32" if contestant.precision == "tf32" and not contestant.ours else "fp32", device)


def _complaint(session: Session, contestant: Contestant, shape: tuple[int, ...]) -> str | None:
    """What the gate says, of two images: where the step before has said it already, that."""
    shape = (min(2, shape[0]), *shape[1:])
    key = {"what": "errors", "kind": "affinity", "backend": contestant.name, "precision": contestant.precision}
    for result in session.results("correct"):
        if "passed" in result and result["shape"][1:] == list(shape[1:]) and key.items() <= result.items():
            return result["complaint"]
    return _gate(contestant, shape, session.device)


@functools.cache
def _gate(contestant: Contestant, shape: tuple[int, ...], device: torch.device) -> str | None:
    found = accuracy.errors(contestant.make(), "affinity", shape, device)
    return accuracy.complaint(contestant, found, shape)


# Blocks

# Besides the table's, of all architectures: taller and wider tiles, other warps and stages. (rows, keys, channels of a
# product, warps, stages) of the map, of the gradient, and its columns at a time.
_OTHER_BLOCKS = {
    "bf16": (
        ((128, 64, 256, 8, 1), (64, 32, 256, 8, 2), 256),
        ((128, 32, 256, 8, 2), (128, 32, 256, 8, 2), 256),
        ((64, 64, 256, 4, 2), (128, 16, 256, 8, 3), 256),
        ((64, 128, 256, 8, 1), (64, 64, 256, 8, 2), 256),
        ((128, 128, 64, 8, 3), (64, 64, 128, 8, 2), 256),
        ((64, 32, 256, 4, 3), (64, 16, 256, 4, 3), 256),
        ((128, 64, 128, 8, 2), (128, 64, 256, 8, 1), 128),
    ),
    "tf32": (
        ((64, 64, 64, 4, 2), (64, 32, 64, 4, 2), 256),
        ((64, 64, 256, 8, 1), (64, 32, 256, 8, 1), 256),
        ((128, 64, 32, 8, 3), (64, 64, 32, 8, 2), 128),
        ((128, 32, 64, 8, 2), (64, 32, 128, 8, 2), 256),
    ),
}


def blocks(session: Session) -> None:
    """`bench.triton_tune` with these and the table's blocks; each is checked before it is timed."""
    precisions = list(_OTHER_BLOCKS)[: 1 if session.plan.is_rehearsal else None]
    session.each(({"precision": p, "what": "fastest"}, functools.partial(_tune, session, p)) for p in precisions)


def compile_blocks(session: Session, precision: str) -> dict[str, Any]:
    """Run all candidates once, so that `blocks` finds them compiled."""
    return _tune(session, precision, is_timed=False)


def _tune(session: Session, precision: str, is_timed: bool = True) -> dict[str, Any]:
    # Imported late: without Triton all other steps still have something to do.
    from bench import triton_tune
    from dskd_fast.backends import triton as triton_fused
    from dskd_fast.kernels import configs

    shape = session.plan.shapes[0]
    student, teacher = features(shape, 0.1, session.device)
    rows = torch.arange(min(512, shape[2] * shape[3]), device=session.device)
    true_map, true_gradient = accuracy.truth("affinity", student[0], teacher[0], rows)
    limit = accuracy.allowed(next(c for c in AFFINITY if c[:2] == ("triton", precision)), shape)

    def checked(call: Callable[[], object]) -> float:
        kl, gradient = call()
        errors = [accuracy.relative(kl[0].flatten()[rows], true_map)]
        if gradient is not None:
            errors.append(accuracy.relative(gradient[0].flatten(1).mT[rows], true_gradient))
        if not max(errors) <= limit:
            raise RuntimeError(f"it is wrong: off by {max(errors):.2g}, {limit:.2g} allowed")
        return clock(lambda k: call(), session.plan)["ms"] if is_timed else 0.0

    before = configs.config(triton_fused.architecture(session.device), precision, configs.padded_channels(shape[1]))

    def note(trial: triton_tune.Trial) -> None:
        known = trial.blocks == getattr(before, trial.kernel) and trial.chunk in (None, before.chunk)
        found = {"precision": precision, "kernel": trial.kernel, "blocks": tuple(trial.blocks), "chunk": trial.chunk}
        session.note(what="trial", **found, ms=trial.milliseconds, reason=trial.reason, is_in_use=known)

    width = configs.padded_channels(shape[1])
    besides = [
        configs.Config(configs.Blocks(*forward), configs.Blocks(*gradient), chunk)
        for forward, gradient, chunk in _OTHER_BLOCKS[precision]
        if all(width % size == 0 for size in (forward[2], gradient[2], chunk))
    ]
    chosen, _ = triton_tune.tune(
        student, teacher, 1.0, precision, checked, besides, note if is_timed else lambda trial: None
    )
    return {"shape": list(shape), "chosen": str(chosen), "table": str(before)}
