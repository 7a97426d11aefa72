"""The benchmarks themselves: what is timed and what is refused, and that a run ends in a report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import accuracy, contestants
from dskd_fast.device import has_fast_bf16

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = (2, 24, 6, 6)


def complaint(contestant, kind="affinity"):
    return accuracy.complaint(contestant, accuracy.errors(contestant.make(), kind, SHAPE, CPU), SHAPE)


def test_every_contestant_that_can_run_here_passes_the_gate_but_the_one_that_loses_its_digits():
    for kind, field in (("affinity", contestants.AFFINITY), ("cosine", contestants.COSINE)):
        runs = [c for c in field if not c.name.startswith(("torch.compile", "KeOps"))]
        passed = {c[:2] for c in runs if c.refusal(SHAPE, CPU, 2**40) is None and complaint(c, kind) is None}
        failed = {c[:2] for c in runs if c.refusal(SHAPE, CPU, 2**40) is None} - passed
        assert {("eager", "fp32"), ("torch", "fp32")} <= passed
        assert failed == ({("eager", "bf16")} if kind == "affinity" else set())


@pytest.mark.parametrize("wrong", [None, "map", "gradient", "small noise", "nan", "scoring"])
def test_a_backend_that_is_wrong_gets_no_time(wrong):
    def function(student, teacher):
        values = contestants.difference_form(student.double(), teacher.double()).float()
        if wrong == "gradient":
            return values.detach() + 1.001 * (values - values.detach())
        is_right = {None: True, "small noise": (student - teacher).abs().mean() > 0.1, "scoring": student.requires_grad}
        return values if is_right.get(wrong) else values * (float("nan") if wrong == "nan" else 1.001)

    found = complaint(contestants.Contestant("cpu", "fp32", lambda: function, ours=True))
    part = "1 % noise" if wrong == "small noise" else "100 % noise"
    expected = f"it is wrong: the {'gradient' if wrong == 'gradient' else 'map'} is off by .* at {part}, .* allowed"
    assert found is None if wrong is None else re.fullmatch(expected, found)


@pytest.mark.slow
def test_a_run_ends_in_a_report(tmp_path):
    """The smallest works, as a user runs them; times are not looked at."""
    results = tmp_path / "results.json"
    chosen = "level_3 and b2 and scoring and (eager or cpu) and not compile and not difference and not lite"
    command = [sys.executable, "-m", "pytest", "bench/test_affinity.py", "--benchmark-only", "-p", "no:cacheprovider"]
    # As from a shell: pytest-benchmark refuses to measure where it believes to be one of several processes.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command += ["-k", chosen, f"--benchmark-json={results}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "### 256 px, level 3, 2 x 1024 x 16 x 16, scoring" in done.stdout
    report = [sys.executable, "-m", "bench.tables", results, "--out", tmp_path / "report"]
    subprocess.run(report, cwd=PROJECT, capture_output=True, check=True)
    assert f"-k '{chosen}' " in (tmp_path / "report" / "benchmarks.md").read_text()
    content = json.loads((tmp_path / "report" / "results.json").read_text())
    rows = {(row["contestant"], row["precision"]): row for row in content["rows"]}
    matrix = 4 * 2 * 256**2  # eager stores several, slabs of rows none
    assert rows["cpu", "fp32"]["extra_bytes"] < rows["eager", "fp32"]["extra_bytes"]
    assert 2 * matrix < rows["eager", "fp32"]["extra_bytes"] < 20 * matrix
    assert "reference_seconds" not in rows["eager", "fp32"]
    assert rows["cpu", "fp32"]["reference_seconds"] > 0
    assert rows["cpu", "fp32"]["percent_of_product"] > 0
    assert max(rows["cpu", "fp32"]["errors"]["1 %"]) < 1e-5
    assert ("it is wrong" if has_fast_bf16(CPU) else "no bf16") in rows["eager", "bf16"]["reason"]
    assert {p["error"] > 1 for p in content["convergence"] if (p["contestant"], p["noise"]) == ("eager", 0.001)} == {
        True
    }
    assert any("N = 65,536" in group for group in content["only_full"])
