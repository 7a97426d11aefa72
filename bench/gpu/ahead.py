"""Compiling what later steps need, while nothing is timed: they then find it in the compilers' caches."""

import functools
from typing import Any

from bench.contestants import Contestant
from bench.gpu import losses
from bench.gpu.measure import Session
from bench.work import features, run


def warm(session: Session) -> None:
    """Run everything once that takes long to compile: the losses under torch.compile, the model, the blocks."""

    def loss(shape: tuple[int, ...], contestant: Contestant) -> dict[str, Any]:
        with losses.settings(contestant, session.device):
            for mode in losses.MODES:
                run(contestant.make(), *features(shape, 0.1, session.device), mode)
        return {}

    def step(name: str) -> dict[str, Any]:
        from bench.gpu import networks  # late: it needs more than the others do

        return networks.compile_step(session, is_ours=name == "ours")

    compiled = {c.precision: c for c in losses.contestants(session) if c.name.startswith("torch.compile")}
    shapes = dict.fromkeys(shape for shape, *_ in losses.timed(session))

    def of_precision(precision: str) -> list:
        what = f"{compiled[precision].name}, {precision}"
        return [
            ({"what": f"{what}, {'x'.join(map(str, s))}"}, functools.partial(loss, s, compiled[precision]))
            for s in shapes
        ]

    of_model = [
        ({"what": f"training step, {name} losses"}, functools.partial(step, name)) for name in ("ours", "eager")
    ]
    of_blocks = [
        ({"what": f"blocks, {precision}"}, functools.partial(losses.compile_blocks, session, precision))
        for precision in ("bf16", "tf32")
        if not session.plan.is_rehearsal  # there is no compiler in it
    ]
    lots = [of_precision("fp32"), of_model, of_blocks, of_precision("tf32")]
    session.each(case for lot in lots[session.process :: session.processes] for case in lot)
