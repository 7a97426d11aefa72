"""The distillation against any keys: its errors, and its times at three sizes."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from bench import memory
from bench.distillation import (
    CONTESTANTS,
    MODES,
    UNITS,
    WORKS,
    Contestant,
    Inputs,
    Work,
    call_of,
    complaint,
    errors,
    inputs,
    limits,
    run,
)
from bench.gpu.losses import refusal, settings
from bench.gpu.measure import Session, clock, rotating
from dskd_fast import functional
from dskd_fast.ops import dispatch

# Work, how the keys are given, and the temperatures, in turn.
KEYS = ("shared", "of each image", "prepared", "the teacher's own, masked")
TEMPERATURES = ((0.1, 0.1), (0.07, 0.01), (1.0, 1.0))
PRECISIONS = ("bf16", "tf32", "fp32", "fp16")
# Those of the benchmarks, the most telling first. torch.compile is left out: it would compile for most of the time.
TIMED = (
    ("triton, keys prepared", "bf16"), ("eager", "fp32"), ("triton", "bf16"), ("eager", "bf16"),
    ("fused attention", "fp32"), ("as published", "fp32"), ("triton", "fp32"), ("cuda, keys prepared", "bf16"),
    ("cpu", "bf16"), ("torch", "bf16"), ("tiles of rows, checkpointed", "fp32"),
)  # fmt: skip


class Case(NamedTuple):
    """A backend in a precision on keys that are given in one of the ways of `KEYS`."""

    backend: str
    precision: str
    work: Work
    keys: str

    def row(self) -> dict[str, Any]:
        return {
            "what": "errors", "kind": f"distillation, keys {self.keys}", "backend": self.backend,
            "precision": self.precision, "shape": list(self.work.shape),
            "temperatures": [self.work.student_temperature, self.work.teacher_temperature],
        }  # fmt: skip


def cases(session: Session, backend: str) -> list[Case]:
    """All precisions and ways to give keys, at sizes and temperatures that change from one to the next."""
    found = []
    for k, (batch, rows, count, channels) in enumerate(session.plan.key_sizes):
        for i, keys in enumerate(KEYS):
            own = keys == KEYS[-1]
            precision, temperatures = PRECISIONS[(k + i) % 4], TEMPERATURES[(k + i // 2) % 3]
            work = Work(keys, batch, rows, None if own else count, channels, *temperatures, masked=own / 3)
            found.append(Case(backend, precision, work, keys))
    # In a rehearsal each backend has one way to give keys, and each another one.
    first = 1 + session.plan.backends.index(backend) if session.plan.is_rehearsal else 0
    return found[first :: session.plan.every]


def keys(session: Session) -> None:
    """Errors against float64 of all backends, and whether a second call gives the same bits."""
    mine = [case for backend in session.plan.backends for case in cases(session, backend)]
    mine = mine[session.process :: session.processes]
    session.each((case.row(), functools.partial(_correct, session, case)) for case in mine)


def _correct(session: Session, case: Case) -> dict[str, Any]:
    contestant = _ours(case)
    if reason := refusal(session, contestant, (1, case.work.channels, 1, 1)):
        return {"reason": reason}
    found = errors(case.work, contestant, session.device, per_image=case.keys == "of each image")
    wrong = complaint(case.work, contestant, found)
    x = inputs(case.work, 0.1, session.device)
    first, second = (run(contestant.make(case.work, x), x.student, MODES[1]) for _ in range(2))
    if not all(map(torch.equal, first, second)):
        wrong = "; ".join(filter(None, (wrong, "a second call gives other bits")))
    limit = limits(case.work, contestant)
    return {"errors": found, "limit": limit, "passed": wrong is None, "complaint": wrong}


def _ours(case: Case) -> Contestant:
    def make(work: Work, x: Inputs) -> Callable:
        some: Any = x.keys
        if case.keys == "prepared":
            some = functional.prepare_keys(x.keys, precision=case.precision, backend=case.backend)
        return functools.partial(
            functional.affinity_distillation, teacher=x.teacher, keys=some, key_mask=x.mask, row_mask=x.mask,
            student_temperature=work.student_temperature, teacher_temperature=work.teacher_temperature,
            precision=case.precision, backend=case.backend,
        )  # fmt: skip

    return Contestant(case.backend, case.precision, make, ours=True)


def key_times(session: Session) -> None:
    """SEED's, CIRKD's and a ViT's sizes; what is wrong is timed too, and says so."""
    session.each(
        (
            {
                "contestant": c.name, "precision": c.precision, "ours": c.ours, "work": work.label,
                "shape": list(work.shape), "mode": mode,
            },
            functools.partial(_time, session, work, c, mode),
        )
        for work, c, mode in list(timed(session))[:: 3 if session.plan.is_rehearsal else 1]
    )  # fmt: skip


def timed(session: Session) -> Iterator[tuple[Work, Contestant, str]]:
    """All that is timed, in order: our fastest and eager at all sizes, then the others."""
    by_name = {c[:2]: c for c in CONTESTANTS}
    left_out = set(dispatch.BACKENDS) - set(session.plan.backends)
    chosen = [by_name[name] for name in TIMED if name[0].split(",")[0] not in left_out]
    for lot in (chosen[:3], chosen[3:]):
        for work, contestant, mode in itertools.product(_works(session), lot, MODES):
            if contestant.unfit(work) is None:
                yield work, contestant, mode


def _works(session: Session) -> list[Work]:
    if not session.plan.is_rehearsal:
        return list(WORKS)
    return [w._replace(batch=min(2, w.batch), rows=9, keys=w.keys and 70, channels=40) for w in WORKS]


def _time(session: Session, work: Work, contestant: Contestant, mode: str) -> dict[str, Any]:
    if contestant.ours:
        backend = contestant._replace(name=contestant.name.split(",")[0])
        if reason := refusal(session, backend, (1, work.channels, 1, 1)):
            return {"reason": reason}
    memory.give_back(session.device)
    wrong = _gate(work, contestant, session.device)
    given = inputs(work, 0.1, session.device)
    copies = rotating(tuple(x for x in given if x is not None), session.plan)
    sets = [Inputs(x[0], x[1], x[2] if work.keys else None, x[-1] if work.masked else None) for x in copies]
    with settings(contestant, session.device):
        calls = [contestant.make(work, x) for x in sets]
        found = clock(lambda k: run(calls[k % len(sets)], sets[k % len(sets)].student, mode), session.plan)
    batch, rows, count, channels = work.shape
    found["tflops"] = UNITS[mode] * 2 * batch * rows * count * channels / found["ms"] / 1e9
    products = {r["precision"]: r["tflops"] for r in session.results("device") if r.get("tflops")}
    if contestant.precision in products:
        found["percent_of_product"] = 100 * found["tflops"] / products[contestant.precision]
    if not session.plan.is_rehearsal:
        call = work, mode, CONTESTANTS.index(contestant)
        found["extra_bytes"], _ = memory.extra_bytes(call_of, call, session.device)
    return found | {"complaint": wrong}


@functools.cache
def _gate(work: Work, contestant: Contestant, device: torch.device) -> str | None:
    return complaint(work, contestant, errors(work, contestant, device))
