"""`python -m dskd_fast.kernels.report`: what the compiler makes of every entry of the table, without a GPU.

Every kernel is compiled ahead of time for every architecture. Registers, spills, shared memory and the instructions of
the loop over keys are read from the binary. What follows from them about speed is a static estimate, not a measurement.
"""

import argparse
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dskd_fast.kernels import affinity, configs, cosine, distillation, prepare, prepare_distillation
from dskd_fast.kernels.binary import Instruction, read_amdgcn, read_cubin

# Channels after padding, one for each row of the table.
WIDTHS = (64, 128, 256, 512, 1024)

NOTE = """\
This is a static estimate, not a measurement: nothing was run. Clocks are those of one multiprocessor for one tile of
the loop over keys, from the instructions in the binary and the vendors' figures for the chip. "products" is what the
matrix units need at their peak, "issue" all instructions at the schedulers' rate, "exp" the exponentials, "cache" the
keys from the second-level cache. The largest is the bound; "peak" is the share of the matrix units' peak that it leaves
at best, with everything else hidden behind it and counting only the products that the formula asks for."""


class Machine(NamedTuple):
    """An architecture's largest chip, one multiprocessor (AMD: compute unit), per clock.

    Attributes:
        target: what to compile for.
        half, tf32, fp32: floating-point operations of products, by operand type.
        issue: instructions of a whole warp.
        exponentials: single ones.
        cache: bytes from the second-level cache, its share of the device's.
        shared: bytes of shared memory that one block may have.
        registers: registers of 32 bits.
        matrix: the matrix instruction in disassembly.
    """

    target: GPUTarget
    half: int
    tf32: int
    fp32: int
    issue: float
    exponentials: int
    cache: int
    shared: int
    registers: int
    matrix: str


def _nvidia(capability: int, half: int, fp32: int, cache: int, shared: int, matrix: str) -> Machine:
    return Machine(GPUTarget("cuda", capability, 32), half, half // 2, fp32, 4, 16, cache, shared, 65536, matrix)


MACHINES = {
    "sm_80": _nvidia(80, 2048, 128, 32, 166_912, "HMMA"),
    "sm_89": _nvidia(89, 512, 256, 16, 101_376, "HMMA"),
    "sm_90": _nvidia(90, 4096, 256, 24, 232_448, "HGMMA"),
    "sm_100": _nvidia(100, 8192, 256, 24, 232_448, "UTCHMMA"),
    "sm_120": _nvidia(120, 512, 256, 16, 101_376, "HMMA"),
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), 2048, 1024, 256, 1, 16, 24, 65_536, 131_072, "v_mfma"),
}


class Case(NamedTuple):
    """One kernel as it would be launched.

    `kind` is "near", "other" or "far" (see `dskd_fast.kernels.affinity`) of the kernels over pairs of positions,
    "memory" of the prepare kernel where the temperature is in the device's memory, and "keys" of all those of
    `dskd_fast.kernels.distillation`.
    """

    architecture: str
    precision: str
    width: int
    kernel: str
    kind: str


def cases(architectures: Iterable[str], precisions: Iterable[str]) -> Iterator[Case]:
    """Everything that the backend can launch on these."""
    for architecture in architectures:
        for precision in precisions:
            for kinds, config in ((("near", "other", "far"), configs.config), (("keys",), configs.distillation_config)):
                entries = {width: config(architecture, precision, width) for width in WIDTHS}
                for width, entry in entries.items():
                    # Where the channels come in pieces, more of them are more rounds of the same loop.
                    if width == 1024 and entry == entries[512] and max(entry.forward.c, entry.gradient.c) < 512:
                        continue
                    for kernel in ("forward", "gradient"):
                        for kind in kinds:
                            yield Case(architecture, precision, width, kernel, kind)
            # Likewise for the kernels over positions, of any width.
            kernels = [("prepare", "memory"), ("prepare", ""), ("project", "")]
            for kernel, kind in (*kernels, *((kernel, "keys") for kernel in ("keys", "rows", "merge"))):
                yield Case(architecture, precision, 256, kernel, kind)
        kernels = [("centre", ""), ("cosine", "")]
        for kernel, kind in (*kernels, *((kernel, "keys") for kernel in ("centre", "bias", "sum", "project"))):
            yield Case(architecture, "fp32", 256, kernel, kind)


def inspect(case: Case, config: configs.Config | None = None) -> dict[str, Any]:
    """Compile a case, with the table's blocks unless others are given, and read the binary."""
    row: dict[str, Any] = case._asdict()
    machine = MACHINES[case.architecture]
    of_table = configs.distillation_config if case.kind == "keys" else configs.config
    config = config or of_table(case.architecture, case.precision, case.width)
    source, options, blocks = _source(case, config)
    try:
        kernel = triton.compile(source, target=machine.target, options=options)
    except Exception as error:  # whatever Triton, LLVM and the assembler raise
        return row | {"error": repr(error.__cause__ or error)[:300]}
    if machine.target.backend == "cuda":
        usage, instructions, labels = read_cubin(kernel.asm["cubin"])
    else:
        usage, instructions, labels = read_amdgcn(kernel.asm["amdgcn"])
    row |= usage | {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    row["fits"] = row["shared"] <= machine.shared
    threads = row["warps"] * machine.target.warp_size
    row["blocks_per_sm"] = min(
        machine.shared // max(1, row["shared"]), machine.registers // (usage["registers"] * threads)
    )
    if blocks is not None:
        row |= {"blocks": list(blocks), "chunk": config.chunk if case.kernel == "gradient" else None}
        row |= _estimate(case, machine, config, blocks, row["warps"], instructions, labels)
    return row


_OPERANDS = {"bf16": "bf16", "fp16": "fp16", "tf32": "fp32", "fp32": "fp32"}
_KERNELS = {
    "forward": affinity.forward_kernel,
    "gradient": affinity.gradient_kernel,
    "centre": prepare.centre_kernel,
    "prepare": prepare.prepare_kernel,
    "project": prepare.project_kernel,
    "cosine": cosine.cosine_kernel,
}
_KERNELS_OF_KEYS = {
    "forward": distillation.forward_kernel,
    "merge": distillation.merge_kernel,
    "gradient": distillation.gradient_kernel,
    "centre": prepare_distillation.centre_kernel,
    "keys": prepare_distillation.keys_kernel,
    "bias": prepare_distillation.bias_kernel,
    "rows": prepare_distillation.rows_kernel,
    "sum": prepare_distillation.sum_kernel,
    "project": prepare_distillation.project_kernel,
}
_WHOLE_NUMBERS = (
    "n",
    "n_out",
    "first",
    "n_pad",
    "k_pad",
    "n_channels",
    "width",
    "split_keys",
    "splits",
    "images",
    "elements",
)


def _source(case: Case, config: configs.Config) -> tuple[ASTSource, dict[str, int], configs.Blocks | None]:
    """The source of a case with the types of its arguments, as a launch on float32 images (B, C, H, W) has them."""
    constants: dict[str, Any] = {"C_PAD": case.width, "PRECISION": case.precision, "WITH_GRADIENT": True}
    constants |= {"IN_MEMORY": case.kind == "memory", "OWN_SHIFT": True, "NORMALIZE": True, "WITH_MASK": True}
    blocks = None
    if case.kernel in ("forward", "gradient"):
        blocks = config.forward if case.kernel == "forward" else config.gradient
        constants |= {"NEAR": case.kind == "near", "WITH_FAR": case.kind == "far", "CHUNK": config.chunk}
        launch = blocks.launch()
    elif case.kernel == "merge":
        launch = dict(zip(("BLOCK_M", "BLOCK_S"), distillation.MERGE_BLOCK, strict=True))
    elif case.kernel == "bias":
        launch = {"BLOCK_P": prepare_distillation.BIAS_BLOCK}
    elif case.kernel == "sum":
        launch = dict(zip(("BLOCK_S", "BLOCK_E"), prepare_distillation.SUM_BLOCK, strict=True))
    elif case.kernel == "cosine":
        launch = configs.cosine_blocks(4096).launch()
    else:
        block_c = prepare.CENTRE_BLOCK_C if case.kernel == "centre" else prepare.BLOCK_C
        launch = {"BLOCK_P": prepare.BLOCK_P, "BLOCK_C": block_c}
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages") if name in launch}
    if blocks is None and case.kernel not in ("merge", "bias", "sum"):
        options |= prepare.EXACT
    constants |= launch
    is_of_keys = case.kind == "keys"
    kernel = (_KERNELS_OF_KEYS if is_of_keys else _KERNELS)[case.kernel]
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            kind = "constexpr"
        elif name == "temperature" and case.kind == "memory":
            kind = "*fp64"
        elif name in ("temperature", "inverse_temperature", "logit_scale", "is_far"):
            kind = "fp32"
        elif name in _WHOLE_NUMBERS or "stride" in name:
            kind = "i32"
        elif name in ("queries", "keys", "operands", "delta") and not (
            is_of_keys and name == "keys" and blocks is None
        ):
            kind = "*" + _OPERANDS[case.precision]
        elif name == "is_row":
            kind = "*i8"
        elif name in ("mask", "row_mask"):
            kind = "*u8"
        else:
            kind = "*fp64" if name == "inverse_norm" or name.endswith("_temperature") else "*fp32"
        signature[name] = kind
        # What the launcher finds out by itself: allocations, and padded numbers of rows, are multiples of 16.
        if kind.startswith("*") or name in ("n_pad", "k_pad", "split_keys"):
            attributes[index,] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in signature}
    return ASTSource(kernel, signature, constexprs=used, attrs=attributes), options, blocks


def _estimate(
    case: Case,
    machine: Machine,
    config: configs.Config,
    blocks: configs.Blocks,
    warps: int,
    instructions: list[Instruction],
    labels: dict[str, int],
) -> dict[str, Any]:
    """Instructions of one tile, and the clocks that they take at least."""
    is_amd = machine.target.backend == "hip"
    fma = "v_fma_f32" if is_amd else "FFMA"
    matrix = machine.matrix if case.precision != "fp32" else fma
    exponential = "v_exp_f32" if is_amd else "MUFU"
    body = _tile_loop(instructions, labels, matrix, exponential, case.width // blocks.c)
    if body is None:
        return {"error": f"no loop with {matrix} and {exponential} was found"}
    count = Counter()
    multiply_adds = 0
    for instruction, times in body:
        count[instruction.name] += times
        if instruction.name == matrix:
            multiply_adds += times * _multiply_adds(instruction)
    chunk = config.chunk if case.kernel == "gradient" else 0
    pairs = blocks.m * blocks.n
    flops = 2 * pairs * (2 * case.width + chunk)
    # Each chunk of the gradient needs both logits again; the formula asks for them once.
    wanted = 2 * pairs * (3 * chunk or 2 * case.width)
    operand = 2 if case.precision in ("bf16", "fp16") else 4
    is_resident = blocks.c == case.width
    loaded = blocks.n * case.width * (1 if is_resident else 1 + 2 * blocks.m / blocks.n)
    loaded += 0 if is_resident and chunk in (0, case.width) else blocks.n * chunk
    peak = {"tf32": machine.tf32, "fp32": machine.fp32}.get(case.precision, machine.half)
    exponentials = count[exponential] * warps * machine.target.warp_size
    # With few rows, several warps do the same products. How often a tile runs an inner loop is not in the binary, so
    # only without one is the count exact.
    is_counted = all(times == 1 for _, times in body)
    done = max(flops, 2 * multiply_adds * warps) if is_counted else flops
    clocks = {
        "products": done / peak,
        "issue": count.total() * warps / machine.issue,
        "exp": exponentials / machine.exponentials,
        "cache": loaded * operand / machine.cache,
    }
    bound = max(clocks, key=clocks.get)
    return {
        "multiply_adds": multiply_adds * warps if is_counted and multiply_adds else None,
        "matrix": matrix,
        "matrix_instructions": count[matrix],
        "instructions": count.total(),
        "exponentials_per_pair": exponentials / pairs,
        "bytes_per_kiloflop": 1024 * loaded * operand / flops,
        "clocks": {name: round(value) for name, value in clocks.items()},
        "bound": bound,
        "peak": wanted / peak / clocks[bound],
    }


def _multiply_adds(instruction: Instruction) -> int:
    """Multiply-adds of a matrix instruction, per warp; 0 where its name does not tell."""
    if shape := re.match(r"\.(16)(8)(4|8|16)\.", instruction.suffix):  # HMMA.16816: a warp
        return math.prod(int(size) for size in shape.groups())
    if shape := re.match(r"\.(64)x(\d+)x(\d+)\.", instruction.suffix):  # HGMMA.64x128x16: four warps
        return math.prod(int(size) for size in shape.groups()) // 4
    if shape := re.search(r"_(\d+)x(\d+)x(\d+)_", instruction.suffix):  # v_mfma_f32_32x32x8_bf16: a wave
        return math.prod(int(size) for size in shape.groups())
    return 0


def _tile_loop(instructions, labels, matrix, exponential, pieces) -> list[tuple[Instruction, int]] | None:
    """The instructions of the loop over keys, each with how often a tile runs it.

    That loop is the innermost one with both exponentials and products. Where the channels come in pieces it may have an
    inner loop over them, with products alone.
    """

    def has(start: int, end: int, name: str) -> bool:
        return any(instruction.name == name for instruction in instructions[start:end])

    loops = sorted(
        ((labels[x.target], at + 1) for at, x in enumerate(instructions) if labels.get(x.target, math.inf) <= at),
        key=lambda loop: loop[1] - loop[0],
    )
    with_products = [loop for loop in loops if has(*loop, matrix)]
    outer = next((loop for loop in with_products if has(*loop, exponential)), None)
    if outer is None:
        return None
    inner = [loop for loop in with_products if outer[0] <= loop[0] and loop[1] <= outer[1] and loop != outer]
    inner = [loop for loop in inner if not has(*loop, exponential)]
    times = {at: pieces for loop in inner[:1] for at in range(*loop)}
    return [(instructions[at], times.get(at, 1)) for at in range(*outer)]


def defects(row: dict[str, Any]) -> list[str]:
    """What disqualifies an entry of the table."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spilled"]:
        found.append(f"{row['spilled']} bytes of registers spilled")
    if not row["fits"]:
        found.append(f"{row['shared']} bytes of shared memory, more than a block may have")
    if row.get("matrix_instructions") == 0:
        found.append("no matrix instruction in the loop")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'':6} {'':4} {'C':>4} {'kernel':14} {'blocks m,n,c warps stages':25} {'reg':>3} {'spill':>5} {'shared':>6} "
        f"{'per SM':>6}  {'matrix / all':>20} {'exp/pair':>8} {'B/kflop':>7}  "
        f"{'products':>8} {'issue':>6} {'exp':>6} {'cache':>6}  {'bound':8} {'peak':>5}"
    ]
    for row in rows:
        head = f"{row['architecture']:6} {row['precision']:4} {row['width']:4} {row['kernel'] + ' ' + row['kind']:14} "
        if "error" in row:
            lines.append(f"{head}ERROR {row['error']}")
            continue
        blocks = row.get("blocks")
        shape = f"{blocks[0]:3},{blocks[1]:3},{blocks[2]:3} {blocks[3]:5} {blocks[4]:6}" if blocks else ""
        line = f"{head}{shape:25} {row['registers']:3} {row['spilled']:5} {row['shared']:6} {row['blocks_per_sm']:6}"
        if blocks:
            ratio = f"{row['matrix_instructions']} {row['matrix']} / {row['instructions']}"
            clocks = row["clocks"]
            line += (
                f"  {ratio:>20} {row['exponentials_per_pair']:8.2f} {row['bytes_per_kiloflop']:7.2f}  "
                f"{clocks['products']:8} {clocks['issue']:6} {clocks['exp']:6} {clocks['cache']:6}  "
                f"{row['bound']:8} {row['peak']:5.0%}"
            )
        lines.append(line + "".join(f"  << {defect}" for defect in defects(row)))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compile, print, and return 1 if an entry is disqualified."""
    parser = argparse.ArgumentParser(prog="python -m dskd_fast.kernels.report", description=__doc__)
    parser.add_argument("--architecture", nargs="+", choices=MACHINES, default=list(MACHINES), metavar="A")
    parser.add_argument("--precision", nargs="+", choices=_OPERANDS, default=list(_OPERANDS), metavar="P")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the rows there")
    arguments = parser.parse_args(argv)
    if not isinstance(affinity.forward_kernel, triton.runtime.JITFunction):
        print("report: TRITON_INTERPRET is set, under which Triton compiles nothing: unset it", file=sys.stderr)
        return 2
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        print(f"report: the folder of {arguments.json} does not exist: make it first", file=sys.stderr)
        return 2
    wanted = list(cases(arguments.architecture, arguments.precision))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(inspect, wanted, chunksize=4))
    print(table(rows))
    print()
    print(NOTE)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    bad = [row for row in rows if defects(row)]
    print(f"{len(rows)} kernels compiled for {', '.join(arguments.architecture)}, {len(bad)} of them disqualified")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
