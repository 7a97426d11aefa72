"""The benchmarks themselves: what is timed and what is refused, and that a run ends in a report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import (
    accuracy,
    contestants,
    lab,
    memory,
    test_affinity,
    test_cold_start,
    test_cosine,
    test_dskd,
    test_predict,
    test_spro,
)
from dskd_fast.device import has_fast_bf16

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SHAPE = (2, 24, 6, 6)
GROWTH = {(*c.contestant[:2], c.work.positions): c for c in test_affinity.cases(True) if c.kind == "growth"}


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


def leaves_out(call, *arguments):
    """The reason for which a case gets no time, None if it gets one."""
    try:
        call(*arguments)
    except pytest.skip.Exception as skipped:
        return str(skipped)
    return None


@pytest.mark.parametrize("module", [test_affinity, test_cosine, test_cold_start, test_dskd, test_predict, test_spro])
@pytest.mark.parametrize("fast_bf16", [True, False])
def test_the_quick_run_accounts_for_all_of_the_full_one(module, fast_bf16, monkeypatch):
    """Each case is timed, or a row with the reason, or in a table that is named; none begins after four minutes."""
    monkeypatch.setattr(lab, "has_fast_bf16", lambda device: fast_bf16)
    quick, full = module.cases(False), module.cases(True)
    run = lab.Lab(CPU, is_full=False)
    chosen = run.choose(quick, full)
    assert set(quick) < set(full)
    assert len({case.id for case in full}) == len(full)
    assert {*run.only_full, *(case.group for case in chosen)} == {case.group for case in full}
    assert not set(run.only_full) & {case.group for case in chosen}
    run.started -= 230
    for case in chosen:
        expected = None if case in quick else "not in the quick run: --bench-full"
        if case in quick and case.row()["precision"] == "bf16" and not fast_bf16:
            expected = lab._SLOW_BF16
        assert leaves_out(run.leave_out_of_quick, case) == expected
        if expected:
            assert run.not_timed[-1] == {**case.row(), "group": case.group, "reason": expected}
    run.started -= 11
    over = {leaves_out(run.leave_out_of_quick, case) for case in quick}
    assert over <= {"the quick run's time is over, on this machine: --bench-full", lab._SLOW_BF16}
    everything = lab.Lab(CPU, is_full=True)
    everything.started -= 10_000
    assert everything.choose(quick, full) == full
    assert {leaves_out(everything.leave_out_of_quick, case) for case in full} == {None}
    if module is test_affinity:  # the plots over the number of positions need these
        assert {GROWTH["cpu", "bf16", n] for n in (1024, 4096, 16384)} <= set(quick)
        assert {GROWTH["eager", "fp32", n] for n in (1024, 4096)} <= set(quick)


class Rounds:
    """Stands for pytest-benchmark, with the clock of a machine that slows down by half until the rounds end."""

    stats = SimpleNamespace(stats=SimpleNamespace(median=1.0))

    def __init__(self, monkeypatch):
        self.now, self.slowness, self.seconds = 0.0, 1.0, []
        monkeypatch.setattr(lab.time, "perf_counter", lambda: self.now)

    def takes(self, duration):
        def call():
            self.now += duration * self.slowness

        return call

    def pedantic(self, function, args, setup, rounds):
        for round_ in range(rounds):
            self.slowness = 1 + 0.5 * round_ / rounds
            setup()
            before = self.now
            function(*args)
            self.seconds.append(self.now - before)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 100), (0.3, 3), (2.0, 3), (9.0, 1)])
@pytest.mark.parametrize("reference_seconds", [0.001, 0.02, 2.0])
def test_a_machine_that_slows_down_does_not_change_a_speed_up(monkeypatch, seconds, rounds, reference_seconds):
    """In rows of their own, the reference's first, the ratio would be off by half."""
    benchmark, info = Rounds(monkeypatch), {}
    reference = benchmark.takes(reference_seconds)
    lab.Lab(CPU, is_full=True).time(benchmark, "a group", info, benchmark.takes(seconds), reference=reference)
    assert len(benchmark.seconds) == rounds
    median = sorted(benchmark.seconds)[rounds // 2]
    assert info["reference_seconds"] / median == pytest.approx(reference_seconds / seconds, rel=0.1)


def test_a_loss_takes_turns_with_the_reference_and_what_fails_or_is_too_slow_says_so(monkeypatch):
    run, benchmark, references = lab.Lab(CPU, is_full=True), Rounds(monkeypatch), []
    monkeypatch.setattr(memory, "extra_bytes", lambda *arguments: (0, None))
    run.time = lambda *arguments, reference: references.append(reference) or 2.0
    for name in (("eager", "fp32"), ("torch", "fp32")):
        run.compare(benchmark, GROWTH[*name, 1024])
    assert [reference is None for reference in references] == [True, False]  # the reference itself takes no turns
    # Two seconds for 1,024 positions: the reference of the next table would be too slow, and so would the largest.
    assert run._reference(GROWTH["torch", "fp32", 4096], *torch.ones(2, 1, 1, 1, 1)) is None
    assert leaves_out(run.compare, benchmark, GROWTH["torch", "fp32", 65536]) == (
        "it would take about 2.3 h a call (from 2 s for 1 x 256 x 32 x 32)"
    )
    case = GROWTH["tiles of rows, checkpointed", "fp32", 1024]
    broken = case.contestant._replace(make=lambda: lambda student, teacher: student.no_such_attribute)
    field = contestants.AFFINITY
    monkeypatch.setattr(lab, "AFFINITY", (*field[: case.index], broken, *field[case.index + 1 :]))
    assert leaves_out(run.compare, benchmark, case).startswith("it failed: AttributeError: ")
    monkeypatch.setattr(run, "_free_memory", lambda: 2**30)
    assert leaves_out(run.compare, benchmark, GROWTH["eager", "fp32", 16384]).startswith("it would take about 14 GiB")
    assert [entry["work"] for entry in run.not_timed] == ["N = 65,536", "N = 1,024", "N = 16,384"]


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
