"""Every entry of the table, compiled ahead of time for every architecture, without a GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
PRECISIONS = ("bf16", "fp16", "tf32", "ieee")
WIDTHS = (64, 128, 256, 512, 1024)
# Warp-group products on sm_90, tcgen05 on sm_100, warp products on the others.
MATRIX = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}


def run_report(*arguments, **environment):
    """In a process of its own: in this one the kernels may be interpreted, which Triton decides once."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dskd_fast.kernels.report", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "rows.json"
    result = run_report("--json", str(file))
    return result, json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loops(report):
    return [row for row in report[1] if row["kernel"] in ("forward", "gradient")]


def name_of(row):
    return " ".join(str(row[key]) for key in ("architecture", "precision", "width", "kernel", "kind"))


def test_every_entry_is_compiled(report):
    result, rows = report
    expected = {
        (architecture, precision, width, kernel, kind)
        for architecture in ARCHITECTURES
        for precision in PRECISIONS
        for width in WIDTHS
        for kernel, kind in [
            *((kernel, kind) for kernel in ("forward", "gradient") for kind in ("near", "other", "far")),
            *((kernel, "") for kernel in ("centre", "prepare", "project", "cosine")),
        ]
    }
    assert {
        tuple(row[key] for key in ("architecture", "precision", "width", "kernel", "kind")) for row in rows
    } == expected
    assert [f"{name_of(row)}: {row['error']}" for row in rows if "error" in row] == []
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_nothing_is_spilled(report):
    assert [f"{name_of(row)}: {row['spilled']}" for row in report[1] if row["spilled"]] == []


def test_shared_memory_and_registers_suffice_for_a_block(report):
    """The most shared memory that one block may have, in bytes (CUDA's programming guide, AMD's CDNA3 manual)."""
    most = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    for row in report[1]:
        assert row["shared"] <= most[row["architecture"]] * 1024, name_of(row)
        assert row["blocks_per_sm"] >= 1, name_of(row)
        assert 16 <= row["registers"] <= (512 if row["architecture"] == "gfx942" else 255), name_of(row)


def test_the_products_are_done_by_matrix_units(loops):
    """All of them, and no more: the instructions of a tile multiply as often as the formula says. (tcgen05's do not
    tell their shape.)"""
    for row in loops:
        if row["precision"] == "ieee":
            assert row["matrix"] in ("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma_f32"), name_of(row)
            continue
        assert row["matrix"] == MATRIX[row["architecture"]], name_of(row)
        assert row["matrix_instructions"] > 0, name_of(row)
        if row["multiply_adds"]:
            m, n, _, warps, _ = row["blocks"]
            wanted = m * n * (2 * row["width"] + (row["chunk"] or 0))
            assert row["multiply_adds"] * warps == wanted, name_of(row)
    told = {row["architecture"] for row in loops if row.get("multiply_adds")}
    assert told == {"sm_80", "sm_89", "sm_90", "sm_120", "gfx942"}


def test_exponentials_are_as_few_as_the_kind_of_row_needs(loops):
    """One where |c| <= 1; one more for the student; one more for far rows' sum in the forward kernel. More only where
    several warps hold the same pair."""
    for row in loops:
        least = {"near": 1, "other": 2, "far": 3 if row["kernel"] == "forward" else 2}[row["kind"]]
        assert row["exponentials_per_pair"] >= least, name_of(row)
    typical = [
        row for row in loops if row["architecture"] == "sm_80" and row["width"] == 64 and row["precision"] == "bf16"
    ]
    assert {row["exponentials_per_pair"] for row in typical if row["kind"] == "near"} == {1}
    assert {row["exponentials_per_pair"] for row in typical if row["kind"] == "other"} == {2}


def test_the_estimate_hangs_together(loops):
    for row in loops:
        clocks = row["clocks"]
        assert clocks[row["bound"]] == max(clocks.values()) > 0, name_of(row)
        assert 0 < row["peak"] <= 1, name_of(row)
        assert row["matrix_instructions"] < row["instructions"], name_of(row)
        assert row["bytes_per_kiloflop"] > 0, name_of(row)


def test_the_output_says_what_it_is(report):
    result, rows = report
    assert "static estimate, not a measurement" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith(ARCHITECTURES)]
    assert len(lines) == len(rows)
    assert f"{len(rows)} kernels compiled" in result.stdout
    assert "0 of them disqualified" in result.stdout


def test_under_the_interpreter_it_says_so():
    result = run_report("--architecture", "sm_80", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "unset it" in result.stderr


def test_a_bad_entry_is_disqualified():
    """Blocks that do not fit: the gate can close."""
    code = (
        "from dskd_fast.kernels import configs, report\n"
        "big = configs.Blocks(128, 128, 256, 4, 2)\n"
        "case = report.Case('sm_80', 'bf16', 256, 'forward', 'other')\n"
        "row = report.inspect(case, configs.Config(big, big, 256))\n"
        "print(report.defects(row)); print(report.table([row]))\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert "spilled" in result.stdout
    assert "<<" in result.stdout
