"""The table's entries, compiled ahead of time for every architecture, without a GPU: a selection of them.

All are compiled by `python -m dskd_fast.kernels.report`, whoever changes a kernel or the table runs it.
"""

import itertools
import json
import subprocess
import sys
from typing import NamedTuple

import pytest
from packaging import version

from dskd_fast.kernels import configs

triton = pytest.importorskip("triton", reason="Triton is not installed")

from dskd_fast.kernels import report as report_module  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
# Warp-group products on sm_90, tcgen05 on sm_100, warp products on the others.
MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}


class Result(NamedTuple):
    returncode: int
    stdout: str


@pytest.fixture(scope="module")
def report(kernels_report):
    """The command's result, and the rows of its JSON."""
    process, output, rows = kernels_report
    returncode = process.wait(timeout=1800)
    text = output.read_text(encoding="utf-8")
    return Result(returncode, text), json.loads(rows.read_text(encoding="utf-8")) if rows.exists() else pytest.fail(
        text
    )


@pytest.fixture(scope="module")
def loops(report):
    return [row for row in report[1] if row["kernel"] in ("forward", "gradient")]


def name_of(row):
    return " ".join(str(row[key]) for key in ("architecture", "precision", "width", "kernel", "kind"))


def test_the_command_compiles_every_entry_of_the_table():
    """With every kind of row, and every operand type that uses the entry; and every other kernel, too."""
    command_cases, expected, found = list(report_module.cases(ARCHITECTURES, PRECISIONS)), set(), set()
    entries = ((("near", "other", "far"), configs.config), (("keys",), configs.distillation_config))
    for architecture, precision, (kinds, config) in itertools.product(configs.TABLE, PRECISIONS, entries):
        for width in (64, 128, 256, 512, configs.WIDE):
            entry = config(architecture, precision, width)
            for kind in kinds:
                expected.add((architecture, precision, "forward", kind, *entry.forward, None))
                expected.add((architecture, precision, "gradient", kind, *entry.gradient, entry.chunk))
    loops = [case for case in command_cases if case.kernel in ("forward", "gradient")]
    for architecture, precision, width, kernel, kind in loops:
        entry = (configs.distillation_config if kind == "keys" else configs.config)(architecture, precision, width)
        blocks = (*entry.forward, None) if kernel == "forward" else (*entry.gradient, entry.chunk)
        found.add((architecture, precision, kernel, kind, *blocks))
    assert found == expected
    others = {(case.architecture, case.kernel, case.kind) for case in command_cases if case not in loops}
    kinds = {("centre", ""), ("prepare", ""), ("prepare", "memory"), ("project", ""), ("cosine", "")}
    kinds |= {(name, "keys") for name in ("centre", "keys", "bias", "rows", "merge", "sum", "project")}
    assert others == {(a, *kind) for a in ARCHITECTURES for kind in kinds}
    for kernel in ("prepare", "keys", "rows", "merge"):
        assert {case.precision for case in command_cases if case.kernel == kernel} == set(PRECISIONS)


def test_all_compile_for_every_architecture(report):
    _, rows = report
    assert {row["architecture"] for row in rows} == set(ARCHITECTURES)
    assert {row["precision"] for row in rows} == set(PRECISIONS)
    assert [f"{name_of(row)}: {row['error']}" for row in rows if "error" in row] == []


def test_nothing_is_spilled_by_the_compiler_that_the_table_is_for(report):
    if version.parse(triton.__version__) < version.parse("3.8"):
        pytest.skip(f"the table's blocks are for the compiler of Triton 3.8, not {triton.__version__}")
    result, rows = report
    assert [f"{name_of(row)}: {row['spilled']}" for row in rows if row["spilled"]] == []
    assert result.returncode == 0, result.stdout[-2000:]
    assert "0 of them disqualified" in result.stdout


def test_shared_memory_and_registers_suffice_for_a_block(report):
    """The most shared memory that one block may have, in bytes (CUDA's programming guide, AMD's CDNA3 manual)."""
    most = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    for row in report[1]:
        assert row["shared"] <= most[row["architecture"]] * 1024, name_of(row)
        assert row["blocks_per_sm"] >= 1, name_of(row)
        assert 0 < row["registers"] <= (512 if row["architecture"] == "gfx942" else 255), name_of(row)


def test_the_products_are_done_by_matrix_units(loops):
    """All of them: the instructions of a tile multiply as often as the formula says, or more where the rows are too few
    for the warps to have some each. (tcgen05's do not tell their shape.)"""
    for row in loops:
        if row["precision"] == "fp32":
            assert row["matrix"] in ("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma_f32"), name_of(row)
            continue
        assert row["matrix"] == MATRIX[row["architecture"]], name_of(row)
        assert row["matrix_instructions"] > 0, name_of(row)
        if row["multiply_adds"]:
            m, n, _, warps, _ = row["blocks"]
            wanted = m * n * (2 * row["width"] + (row["chunk"] or 0))
            assert wanted <= row["multiply_adds"] <= 2 * wanted, name_of(row)
            if MATRIX[row["architecture"]] != "v_mfma" and warps == 4:
                assert row["multiply_adds"] == wanted, name_of(row)
    told = {row["architecture"] for row in loops if row.get("multiply_adds")}
    assert told == {"sm_80", "sm_89", "sm_90", "sm_120", "gfx942"}


def test_exponentials_are_as_few_as_the_kind_of_row_needs(loops):
    """One where |c| <= 1; one more for the student; one more for far rows' sum in the forward kernel. More only where
    several warps hold the same pair."""
    for row in loops:
        least = {"near": 1, "other": 2, "far": 3 if row["kernel"] == "forward" else 2, "keys": 2}[row["kind"]]
        assert row["exponentials_per_pair"] >= least, name_of(row)
    typical = [
        row for row in loops if row["architecture"] == "sm_80" and row["width"] == 64 and row["precision"] == "bf16"
    ]
    assert {row["exponentials_per_pair"] for row in typical if row["kind"] == "near"} == {1}
    assert {row["exponentials_per_pair"] for row in typical if row["kind"] == "other"} == {2}


CODE_FOR_SPECIAL_ARGUMENTS = """
from dskd_fast.kernels import configs, prepare, report
from triton.compiler import ASTSource
import triton

cases = [(kernel, "far") for kernel in ("centre", "prepare", "project", "cosine", "forward", "gradient")]
cases += [(kernel, "keys") for kernel in ("centre", "keys", "bias", "rows", "merge", "project", "forward", "gradient")]
for kernel, kind in (*cases, ("prepare", "memory")):
    case = report.Case("sm_90", "bf16", 64, kernel, kind)
    source, options, _ = report._source(case, configs.config("sm_90", "bf16", 64))
    ones = ("width", "n_channels", "stride_n", "images", "scale_stride")
    ones = {name: 1 for name in source.signature if name in ones or name.endswith("stride_c")}
    signature = {name: "constexpr" if name in ones else kind for name, kind in source.signature.items()}
    signature |= {name: "i64" for name in signature if name.endswith("stride_b")}
    constants = {source.fn.arg_names[index[0]]: value for index, value in source.constants.items()} | ones
    special = ASTSource(source.fn, signature, constexprs=constants, attrs=source.attrs)
    compiled = triton.compile(special, target=report.MACHINES["sm_90"].target, options=options)
    print(kernel, "n" in source.fn.arg_names and source.fn.params[source.fn.arg_names.index("n")].do_not_specialize)
    if kernel in ("prepare", "cosine", "rows"):
        print("fused:", compiled.asm["ptx"].count("fma.rn.f64"))
"""


def test_kernels_compile_for_what_the_launcher_turns_into_constants(compiling):
    """A launch makes constants of arguments that are 1 (n is kept from it), and 64-bit ones of those beyond 32 bits.
    And equal vectors must cancel to exactly 0: no multiply-add may be fused where they are subtracted."""
    command = [sys.executable, "-c", CODE_FOR_SPECIAL_ARGUMENTS]
    result = subprocess.run(command, env=compiling, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("fused")] == ["fused: 0"] * 4
    is_kept = [line.split()[1] for line in lines if not line.startswith("fused")]
    of_keys = ["True"] * 6 + ["False"] * 2  # the kernels over pairs with keys have no n
    assert is_kept == ["True"] * 5 + ["False"] + of_keys + ["True"]  # nor has the gradient kernel
