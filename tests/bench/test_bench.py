"""The benchmarks themselves: that the gate gates, that memory is measured, and that a run ends in a report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """The package, which lies beside the installed one."""
    sys.path.insert(0, str(PROJECT))
    try:
        from bench import accuracy, contestants, lab, memory, work
    finally:
        sys.path.remove(str(PROJECT))
    return {"accuracy": accuracy, "contestants": contestants, "lab": lab, "memory": memory, "work": work}


SHAPE = (2, 24, 6, 6)


def verdict(bench, contestant, kind="affinity"):
    found = bench["accuracy"].errors(contestant.make(), kind, SHAPE, CPU)
    return bench["accuracy"].complaint(contestant, found, SHAPE), found


def test_every_contestant_that_can_run_here_passes_the_gate_but_the_one_that_loses_its_digits(bench):
    field = bench["contestants"]
    seen = set()
    for kind, contestants in (("affinity", field.AFFINITY), ("cosine", field.COSINE)):
        for contestant in contestants:
            if contestant.name.startswith(("torch.compile", "KeOps")) or contestant.refusal(SHAPE, CPU, True, 2**40):
                continue
            complaint, _ = verdict(bench, contestant, kind)
            assert (complaint is None) == ((contestant.name, contestant.precision) != ("eager", "bf16"))
            seen.add((kind, contestant.name, contestant.precision))
    assert {("affinity", "eager", "float32"), ("affinity", "torch", "bf16"), ("cosine", "torch", "ieee")} <= seen


@pytest.mark.parametrize("wrong", ["map", "gradient", "small noise", "nan"])
def test_a_backend_that_is_wrong_gets_no_time(bench, wrong):
    field = bench["contestants"]
    right = field.difference_form

    def function(student, teacher):
        if wrong == "small noise" and (student - teacher).abs().mean() > 0.1:
            return right(student, teacher)
        values = right(student, teacher)
        if wrong == "gradient":
            return values.detach() + 1.001 * (values - values.detach())
        return values * (float("nan") if wrong == "nan" else 1.001)

    contestant = field.Contestant("cpu", "ieee", lambda: function, ours=True)
    complaint, _ = verdict(bench, contestant)
    assert complaint.startswith("it is wrong: the ")
    assert ("gradient" if wrong == "gradient" else "map") in complaint


def test_what_does_not_fit_into_memory_is_refused_with_its_size(bench):
    eager = bench["contestants"].EAGER
    assert eager.refusal((1, 256, 64, 64), CPU, True, 2**33) is None
    told = eager.refusal((1, 256, 256, 256), CPU, True, 2**34)
    assert told == "it would take about 96 GiB of memory, 16 GiB are free"


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux alone")
def test_extra_memory_is_what_a_call_takes(bench):
    """Eager stores several N x N matrices, a slab-wise form does not."""
    field, shape = bench["contestants"], (1, 16, 40, 40)
    matrix = 4 * 1600**2
    index = {contestant[:2]: i for i, contestant in enumerate(field.AFFINITY)}
    dense, note = bench["memory"].extra_bytes("affinity", index["eager", "float32"], shape, "scoring", CPU)
    assert note is None
    assert 3 * matrix < dense < 7 * matrix
    slabs, _ = bench["memory"].extra_bytes("affinity", index["torch", "ieee"], shape, "scoring", CPU)
    assert slabs < dense


def test_a_run_ends_in_a_report(tmp_path):
    """The smallest works, as a user runs them; times are not looked at."""
    results = tmp_path / "results.json"
    chosen = "level_3 and scoring and (eager or triton or torch or cpu) and not compile"
    command = [sys.executable, "-m", "pytest", "bench/test_affinity.py", "bench/test_cosine.py", "--benchmark-only"]
    command += ["-p", "no:cacheprovider", "-k", chosen, f"--benchmark-json={results}"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "### 256 px, level 3, 2 x 1024 x 16 x 16, scoring" in done.stdout
    content = json.loads(results.read_text())
    timed = {(e["extra_info"]["kind"], e["extra_info"]["contestant"]): e["extra_info"] for e in content["benchmarks"]}
    assert {("affinity", "eager"), ("affinity", "torch"), ("cosine", "eager"), ("cosine", "torch")} <= timed.keys()
    assert timed["affinity", "torch"]["percent_of_product"] > 0
    assert max(timed["affinity", "torch"]["errors"]["1 %"]) < 1e-5
    reasons = {(e["contestant"], e["precision"]): e["reason"] for e in content["not_timed"] if e["kind"] == "affinity"}
    assert "interpreter" in reasons["triton", "bf16"]
    assert "it is wrong" in reasons["eager", "bf16"]
    errors = {(p["contestant"], p["precision"], p["noise"]): p["error"] for p in content["convergence"]}
    assert errors["eager", "float32", 0.001] > 1

    report = [sys.executable, "-m", "bench.report", results, "--out", tmp_path / "report"]
    written = subprocess.run(report, cwd=PROJECT, capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    assert "not timed: it is wrong" in (tmp_path / "report" / "benchmarks.md").read_text()
    assert (tmp_path / "report" / "convergence.svg").exists()


def test_a_gpu_that_is_not_there_is_said(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--bench-device", "cuda"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "--bench-device=cuda: PyTorch finds no GPU here" in done.stderr
