"""Opt-in autotuning of the Triton kernels: `python -m bench.triton_tune 4096x256 1024x512 256x65536x128`.

NxC is the contextual affinity of N positions, NxKxC the distillation of N rows against K keys, with C channels.

The fixed table of `dskd_fast.kernels.configs` was made without running anything. This times its entries, those made for
other architectures too, on the GPU that is there. It never happens by itself: not in a training step, not at import.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dskd_fast.backends import triton as triton_fused
from dskd_fast.backends.common import PreparedKeys
from dskd_fast.kernels import configs
from dskd_fast.kernels.configs import Blocks, Config


class Trial(NamedTuple):
    """One way to run one kernel: milliseconds per call, or why it cannot run here."""

    kernel: str
    blocks: Blocks
    chunk: int | None
    milliseconds: float | None
    reason: str | None


def tune(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    precision: str = "bf16",
    clock: Callable[[Callable[[], object]], float] = triton.testing.do_bench,
    besides: Iterable[Config] = (),
    note: Callable[[Trial], object] = lambda trial: None,
    keys: Tensor | None = None,
) -> tuple[Config, list[Trial]]:
    """Put the fastest blocks for inputs like these into the table, for the rest of this process.

    Args:
        student, teacher: (B, C, H, W), typical of what will be trained on, on the GPU.
        temperature, precision: of the loss.
        clock: gives the milliseconds that a function takes, which returns the map and, of the gradient kernel, it.
        besides: entries to try that are not in the table.
        note: is told each trial, in case the next one never ends.
        keys: (B or 1, K, C), of the distillation, whose kernels are then tuned; None for the contextual affinity's.

    Returns:
        The new entry of the table and all trials.

    Raises:
        RuntimeError: the backend cannot serve the inputs, or none of the candidates runs.
    """
    if (reason := triton_fused.refusal(student, teacher, precision)) is not None:
        raise RuntimeError(f"the triton backend cannot serve these inputs: {reason}")
    architecture = triton_fused.architecture(student.device)
    width = configs.padded_channels(student.shape[1])
    operands, widest = configs.operand_class(precision), min(width, configs.WIDE)
    entries = configs.TABLE[architecture][operands]
    before = (configs.config if keys is None else configs.distillation_config)(architecture, precision, width)
    candidates = [*_candidates(precision, width), *besides]
    trials: list[Trial] = []
    prepared = keys
    if keys is not None:
        packed = triton_fused.prepare_keys(keys, True, precision)
        prepared = PreparedKeys(packed, tuple(keys.shape), True, precision, "triton")

    def put(entry: Config) -> None:
        if keys is None:
            entries[widest] = entry
        else:
            configs.DISTILLATION[architecture, operands, widest] = entry._asdict()

    def attempt(kernel: str, entry: Config, chunk: int | None) -> None:
        put(entry)
        with_gradient = kernel == "gradient"

        def call() -> object:
            if keys is None:
                return triton_fused.contextual_affinity(student, teacher, temperature, precision, with_gradient)
            return triton_fused.affinity_distillation(
                student, teacher, prepared, temperature, temperature, None, None, True, precision, with_gradient
            )

        blocks = getattr(entry, kernel)
        try:
            call()
            trials.append(Trial(kernel, blocks, chunk, clock(call), None))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what does not fit fails in the compiler, the assembler or the launcher
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            trials.append(Trial(kernel, blocks, chunk, None, reason))
        note(trials[-1])

    def fastest(kernel: str) -> Trial:
        timed = [trial for trial in trials if trial.kernel == kernel and trial.milliseconds is not None]
        if not timed:
            reasons = "; ".join(sorted({str(trial.reason) for trial in trials}))
            raise RuntimeError(f"no blocks for the {kernel} kernel can run here: {reasons}")
        return min(timed, key=lambda trial: trial.milliseconds)

    chosen = None
    try:
        for blocks in dict.fromkeys(entry.forward for entry in candidates):
            attempt("forward", before._replace(forward=blocks), None)
        forward = fastest("forward").blocks
        for blocks, chunk in dict.fromkeys((entry.gradient, entry.chunk) for entry in candidates):
            attempt("gradient", Config(forward, blocks, chunk), chunk)
        gradient = fastest("gradient")
        chosen = Config(forward, gradient.blocks, gradient.chunk)
    finally:
        put(chosen or before)
    return chosen, trials


def _candidates(precision: str, width: int) -> Iterable[Config]:
    """The entries of all architectures for these operands, of any width whose blocks divide this one."""
    for operands in configs.TABLE.values():
        for entry in operands[configs.operand_class(precision)].values():
            if all(width % size == 0 for size in (entry.forward.c, entry.gradient.c, entry.chunk)):
                yield entry


def _level(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"0*[1-9]\d*(x0*[1-9]\d*){1,2}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NxC or NxKxC, two or three whole numbers from 1 up as in 4096x256"
        )
    return tuple(map(int, text.split("x")))


def _batch(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Time each level given as NxC and print what is fastest."""
    parser = argparse.ArgumentParser(prog="python -m bench.triton_tune", description=__doc__)
    parser.add_argument(
        "levels", nargs="+", type=_level, metavar="NxC", help="or NxKxC: positions, keys if any, channels"
    )
    parser.add_argument("--batch", type=_batch, default=8, metavar="B", help="images per call (default: 8)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="bf16")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("triton_tune: torch finds no usable GPU here, and there is nothing to time without one", file=sys.stderr)
        return 2
    for n, *counts, c in arguments.levels:
        level = "x".join(map(str, (n, *counts, c)))
        keys = torch.randn((1, counts[0], c), device="cuda") if counts else None
        teacher, noise = torch.randn((2, arguments.batch, c, n, 1), device="cuda")
        student = teacher + 0.1 * noise  # as in training, once it has begun to converge
        try:
            chosen, trials = tune(student, teacher, precision=arguments.precision, keys=keys)
        except RuntimeError as error:
            print(f"triton_tune: {level}: {error}", file=sys.stderr)
            return 2
        for trial in trials:
            result = trial.reason or f"{trial.milliseconds:.3f} ms"
            print(f"{level} {trial.kernel:8} {tuple(trial.blocks)} {trial.chunk or ''}: {result}")
        print(f"{level} {arguments.precision}: {chosen}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
