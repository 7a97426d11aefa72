"""The benchmarks themselves: that the gate gates, that memory is measured, and that a run ends in a report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dskd_fast.workflow.device import has_fast_bf16

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """The package, which lies beside the installed one."""
    sys.path.insert(0, str(PROJECT))
    try:
        from bench import accuracy, contestants, lab, memory, test_affinity, test_cold_start, test_dskd, test_spro, work
    finally:
        sys.path.remove(str(PROJECT))
    return {
        "accuracy": accuracy,
        "contestants": contestants,
        "lab": lab,
        "memory": memory,
        "work": work,
        "affinity": test_affinity,
        "cold": test_cold_start,
        "dskd": test_dskd,
        "spro": test_spro,
    }


SHAPE = (2, 24, 6, 6)


def verdict(bench, contestant, kind="affinity"):
    found = bench["accuracy"].errors(contestant.make(), kind, SHAPE, CPU)
    return bench["accuracy"].complaint(contestant, found, SHAPE), found


def test_every_contestant_that_can_run_here_passes_the_gate_but_the_one_that_loses_its_digits(bench):
    field = bench["contestants"]
    seen = set()
    for kind, contestants in (("affinity", field.AFFINITY), ("cosine", field.COSINE)):
        for contestant in contestants:
            if contestant.name.startswith(("torch.compile", "KeOps")) or contestant.refusal(SHAPE, CPU, 2**40):
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
    assert eager.refusal((1, 256, 64, 64), CPU, 2**33) is None
    told = eager.refusal((1, 256, 256, 256), CPU, 2**34)
    assert told == "it would take about 224 GiB of memory, 16 GiB are free"


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


_KEPT = """
import torch
from bench import memory
from dskd_fast.workflow.device import keep_freed_memory
keep_freed_memory()
blocks = [torch.ones(2**18) for _ in range(400)]
last = torch.ones(1)
full = memory._status("VmRSS")
del blocks
kept = memory._status("VmRSS")
memory.give_back(torch.device("cpu"))
print(full - kept, full - memory._status("VmRSS"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux alone")
def test_what_a_case_keeps_is_given_back_before_the_next():
    """400 MiB in small blocks; what was kept once added up over a full run until the system killed it."""
    done = subprocess.run([sys.executable, "-c", _KEPT], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    at_once, given_back = map(int, done.stdout.split())
    assert at_once < 40 * 2**20
    assert given_back > 360 * 2**20


def test_a_run_ends_in_a_report(tmp_path):
    """The smallest works, as a user runs them; times are not looked at."""
    results = tmp_path / "results.json"
    chosen = "level_3 and scoring and (eager or triton or torch or cpu) and not compile"
    command = [sys.executable, "-m", "pytest", "bench/test_affinity.py", "bench/test_cosine.py", "--benchmark-only"]
    command += ["-p", "no:cacheprovider", "-k", chosen, f"--benchmark-json={results}"]
    # As from a shell: pytest-benchmark refuses to measure where it believes to be one of several processes.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env={**environment, "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "### 256 px, level 3, 2 x 1024 x 16 x 16, scoring" in done.stdout
    content = json.loads(results.read_text())
    assert f"-k '{chosen}' " in content["environment"]["command"]
    timed = {(e["extra_info"]["kind"], e["extra_info"]["contestant"]): e["extra_info"] for e in content["benchmarks"]}
    assert {("affinity", "eager"), ("affinity", "torch"), ("cosine", "eager"), ("cosine", "torch")} <= timed.keys()
    assert timed["affinity", "torch"]["percent_of_product"] > 0
    assert max(timed["affinity", "torch"]["errors"]["1 %"]) < 1e-5
    assert {who: e["reference_seconds"] is None for who, e in timed.items()} == {
        who: who[1] == "eager" for who in timed
    }
    reasons = {(e["contestant"], e["precision"]): e["reason"] for e in content["not_timed"] if e["kind"] == "affinity"}
    assert "interpreter" in reasons["triton", "bf16"]
    assert reasons["torch", "fp16"] == "not in the quick run: --bench-full"
    told = "it is wrong" if has_fast_bf16(CPU) else "no bf16 multiplication"
    assert told in reasons["eager", "bf16"]
    if has_fast_bf16(CPU):
        rejected = [e for e in content["not_timed"] if e["kind"] == "affinity" and e["contestant"] == "eager"]
        assert [e["precision"] for e in rejected] == ["bf16"]
        assert rejected[0]["errors"]["100 %"][0] > 0.05
    assert ("growth", "N = 65,536") in {(e["kind"], e["work"]) for e in content["only_full"]}
    errors = {(p["contestant"], p["precision"], p["noise"]): p["error"] for p in content["convergence"]}
    assert errors["eager", "float32", 0.001] > 1

    report = [sys.executable, "-m", "bench.report", results, "--out", tmp_path / "report"]
    written = subprocess.run(report, cwd=PROJECT, capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    text = (tmp_path / "report" / "benchmarks.md").read_text()
    assert f"not timed: {reasons['eager', 'bf16']}" in text
    assert "N = 65,536, 1 x 256 x 256 x 256 (forward+backward)" in text.split("## Not in the quick run")[1]
    assert (tmp_path / "report" / "convergence.svg").exists()


class NoBenchmark:
    """Stands in for pytest-benchmark's fixture: calls once and keeps no time."""

    enabled = False

    def __call__(self, function, *arguments):
        function(*arguments)

    def pedantic(self, function, args=(), **settings):
        function(*args)


@pytest.mark.parametrize("module", ["affinity", "cold", "dskd", "spro"])
def test_the_quick_run_accounts_for_all_of_the_full_one(bench, module, monkeypatch):
    """Each case is timed, or a row with the reason, or in a group that is named."""
    monkeypatch.setattr(bench["lab"], "has_fast_bf16", lambda device: True)
    quick, full = bench[module].cases(False), bench[module].cases(True)
    lab = bench["lab"].Lab(CPU, is_full=False)
    chosen = lab.choose(quick, full)
    assert set(quick) < set(full)
    assert set(quick) <= set(chosen)
    assert len(chosen) == len(set(chosen))
    assert len({case.id for case in full}) == len(full)
    named = [str([entry["kind"], entry["work"], entry["shape"], entry["mode"]]) for entry in lab.only_full]
    assert len(set(named)) == len(named) == len({case.group for case in full} - {case.group for case in quick})
    for case in chosen:
        if case in quick:
            lab.leave_out_of_quick(case)
        else:
            with pytest.raises(pytest.skip.Exception):
                lab.leave_out_of_quick(case)
    assert [(e["group"], e["contestant"], e["precision"]) for e in lab.not_timed] == [
        (case.group, case.row()["contestant"], case.row()["precision"]) for case in chosen if case not in quick
    ]
    assert {e["reason"] for e in lab.not_timed} <= {"not in the quick run: --bench-full"}


@pytest.mark.parametrize("module", ["affinity", "cold", "dskd"])
def test_the_quick_run_ends_in_time_and_says_what_it_left_out(bench, module, monkeypatch):
    monkeypatch.setattr(bench["lab"], "has_fast_bf16", lambda device: True)
    case = bench[module].cases(False)[0]
    quick, full = (bench["lab"].Lab(CPU, is_full=is_full) for is_full in (False, True))
    quick.started -= 230
    quick.leave_out_of_quick(case)
    quick.started -= 11
    full.started -= 10_000
    full.leave_out_of_quick(case)
    with pytest.raises(pytest.skip.Exception, match="time is over, on this machine: --bench-full"):
        quick.leave_out_of_quick(case)
    assert len(quick.not_timed) == 1


@pytest.mark.parametrize("module", ["affinity", "cold", "dskd"])
def test_without_bf16_multiplication_the_quick_run_does_without_bf16(bench, module, monkeypatch):
    monkeypatch.setattr(bench["lab"], "has_fast_bf16", lambda device: False)
    quick, full = bench[module].cases(False), bench[module].cases(True)
    lab = bench["lab"].Lab(CPU, is_full=False)
    lab.choose(quick, full)
    for case in quick:
        if case.row()["precision"] == "bf16":
            with pytest.raises(pytest.skip.Exception, match="no bf16 multiplication"):
                lab.leave_out_of_quick(case)
        else:
            lab.leave_out_of_quick(case)
    assert len(lab.not_timed) == sum(case.row()["precision"] == "bf16" for case in quick)
    assert lab.not_timed or module == "cold"


def test_the_full_run_leaves_nothing_out(bench, monkeypatch):
    monkeypatch.setattr(bench["lab"], "has_fast_bf16", lambda device: False)
    quick, full = bench["affinity"].cases(False), bench["affinity"].cases(True)
    lab = bench["lab"].Lab(CPU, is_full=True)
    assert lab.choose(quick, full) == full
    for case in full:
        lab.leave_out_of_quick(case)
    assert lab.not_timed == lab.only_full == []


def test_what_would_take_too_long_is_predicted_from_the_largest_that_was_timed(bench):
    lab = bench["lab"].Lab(CPU, is_full=True)
    key = ("affinity", 0)
    assert lab.too_long(key, 1e30) is None
    lab.note_time(key, 2.0, 64.0, "N = 4,096")
    lab.note_time(key, 1.0, 1000.0, "N = 2,048")
    assert lab.too_long(key, 0.9) is None
    assert lab.too_long(key, 32.0) == "it would take about 17 min a call (from 64 s for N = 4,096)"
    assert lab.too_long(("affinity", 1), 32.0) is None


def growth(bench, name, positions):
    """The case of a contestant with so many positions."""
    return next(
        case
        for case in bench["affinity"].cases(True)
        if (case.kind, case.contestant[:2], case.work.positions) == ("growth", name, positions)
    )


def test_a_contestant_is_probed_on_small_images_and_never_run_on_those_that_would_take_too_long(bench, monkeypatch):
    """With one that takes N^2 / 400,000 seconds: 0.16 s at 256 positions, 2.6 s at 1,024."""
    lab, now, seen = bench["lab"].Lab(CPU, is_full=True), [0.0], []
    monkeypatch.setattr(bench["lab"].time, "perf_counter", lambda: now[0])

    def slow(student, teacher):
        n = student.shape[2] * student.shape[3]
        now[0] += n**2 / 400_000
        seen.append(n)
        return bench["contestants"].tiled(student, teacher)

    case = growth(bench, ("tiles of rows, checkpointed", "float32"), 16384)
    field = list(bench["contestants"].AFFINITY)
    field[case.index] = field[case.index]._replace(make=lambda: slow)
    monkeypatch.setattr(bench["lab"], "AFFINITY", tuple(field))
    with pytest.raises(pytest.skip.Exception):
        lab.compare(NoBenchmark(), case)
    assert set(seen) == {256, 1024}
    [entry] = lab.not_timed
    assert entry["reason"] == "it would take about 11 min a call (from 2.6 s for 1 x 256 x 32 x 32)"
    assert (entry["group"], entry["errors"]) == (case.group, None)


def test_a_fast_contestant_is_probed_and_run(bench, monkeypatch):
    lab = bench["lab"].Lab(CPU, is_full=True)
    monkeypatch.setattr(bench["memory"], "extra_bytes", lambda *arguments: (0, None))
    lab.compare(NoBenchmark(), growth(bench, ("torch", "ieee"), 1024))
    assert lab.not_timed == []


@pytest.mark.parametrize("seconds", [0.001, 0.3, 2.0, 9.0])
def test_long_calls_are_made_twice_and_short_ones_several_times(bench, monkeypatch, seconds):
    now, rounds = [0.0], []
    monkeypatch.setattr(bench["lab"].time, "perf_counter", lambda: now[0])

    class Benchmark(NoBenchmark):
        def pedantic(self, function, args=(), **settings):
            rounds.append(settings["rounds"])
            for _ in range(settings["rounds"]):
                function(*args)

    calls = []

    def call():
        calls.append(1)
        now[0] += seconds

    told = bench["lab"].Lab(CPU, is_full=True).time(Benchmark(), "a group", {}, call)
    assert told == pytest.approx(seconds)
    assert rounds == [{0.001: 100, 0.3: 3, 2.0: 3, 9.0: 1}[seconds]]
    assert len(calls) == rounds[0] + (1 if seconds > 1 else 2)


class Rounds(NoBenchmark):
    """Calls as pytest-benchmark does, and keeps the times by a clock."""

    enabled = True

    def __init__(self, clock):
        self.clock, self.seconds = clock, []

    def pedantic(self, function, args=(), setup=lambda: None, rounds=1):
        for _ in range(rounds):
            setup()
            before = self.clock[0]
            function(*args)
            self.seconds.append(self.clock[0] - before)


@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.3, 2.0, 9.0])
@pytest.mark.parametrize("reference_seconds", [0.001, 0.02, 0.3, 2.0])
def test_a_machine_that_slows_down_does_not_change_a_speed_up(bench, monkeypatch, seconds, reference_seconds):
    """By half until the rounds end: in rows of their own, the reference's first, the ratio would be off by as much."""
    now, calls, info = [0.0], [], {}
    monkeypatch.setattr(bench["lab"].time, "perf_counter", lambda: now[0])
    slowness = [1.0]

    def takes(duration):
        def call():
            calls.append(duration)
            now[0] += duration * slowness[0]

        return call

    class Slower(Rounds):
        def pedantic(self, function, args, setup, rounds):
            def slow_down():
                slowness[0] += 0.5 / rounds
                setup()

            super().pedantic(function, args, slow_down, rounds)

    benchmark, call, reference = Slower(now), takes(seconds), takes(reference_seconds)
    bench["lab"].Lab(CPU, is_full=True).time(benchmark, "a group", info, call, reference=reference)
    median = sorted(benchmark.seconds)[len(benchmark.seconds) // 2]
    assert info["reference_seconds"] / median == pytest.approx(reference_seconds / seconds, rel=0.1)
    assert 3 <= calls.count(reference_seconds) - (len(benchmark.seconds) if seconds == reference_seconds else 0) <= 110


def test_a_reference_takes_turns_but_with_itself_or_where_it_is_slow(bench, monkeypatch):
    lab, now = bench["lab"].Lab(CPU, is_full=True), [0.0]
    ours, eager = (growth(bench, name, 1024) for name in (("torch", "ieee"), ("eager", "float32")))
    monkeypatch.setattr(bench["memory"], "extra_bytes", lambda *arguments: (0, None))
    assert ours.reference == eager
    cosine = bench["lab"].Comparison("cosine", ours.work, "scoring", 1)
    assert cosine.reference.contestant[:2] == ("eager", "float32")
    for case in (ours, eager):
        benchmark = Rounds(now)
        benchmark.stats = SimpleNamespace(stats=SimpleNamespace(median=1.0))
        lab.compare(benchmark, case)
        seconds = benchmark.extra_info["reference_seconds"]
        assert (seconds is None) if case == eager else (seconds > 0)

    # What is expected of it from its longest call so far.
    larger = growth(bench, ("torch", "ieee"), 4096)
    maps = bench["work"].features((1, 4, 8, 8), 1.0, CPU)
    assert lab._reference(larger, *maps) is not None
    lab.note_time(("affinity", eager.index), eager.cost((1, 256, 64, 64)), 3.1, "N = 4,096")
    assert lab._reference(larger, *maps) is None
    assert lab._reference(ours, *maps) is not None


def test_a_call_that_takes_too_long_is_not_made_again(bench, monkeypatch):
    """Of what no smaller shape has told anything, such as a training step."""
    lab, now, calls = bench["lab"].Lab(CPU, is_full=True), [0.0], []
    monkeypatch.setattr(bench["lab"].time, "perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 95

    with pytest.raises(pytest.skip.Exception):
        lab.time(NoBenchmark(), "a group", {"contestant": "slow"}, call, warm_up=2)
    assert len(calls) == 1
    assert lab.not_timed == [{"contestant": "slow", "group": "a group", "reason": "it takes 95 s a call"}]


def test_torch_compile_compiles_for_more_shapes_than_it_does_by_default(bench):
    """Beyond its limit it would run eagerly, and be timed so."""
    pytest.importorskip("torch._dynamo")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compile_ = torch.compile
    # The configuration's own patch: pytest's would delete the entry when it undoes itself.
    with torch._dynamo.config.patch(recompile_limit=8), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend, **options))

        def double(x):
            return 2 * x

        for size in range(2, 14):
            bench["contestants"]._compiled(double)(torch.ones(size))
    assert len(graphs) == 12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_first_call_is_made_on_the_device_of_the_run(bench, device, monkeypatch, tmp_path):
    cold, scripts = bench["cold"], {}
    lab = bench["lab"].Lab(torch.device(device), is_full=True)
    monkeypatch.setattr(cold, "refuse_backend", lambda *names: lambda shape, on: "no" if names[0] == "cpu" else None)

    def start(command, **options):
        scripts[case] = command[-1], options["env"]
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(cold.subprocess, "run", start)
    for case in cold.cases(True):
        if case.backend == "cpu":
            with pytest.raises(pytest.skip.Exception):
                cold.test_cold_start(NoBenchmark(), lab, case, tmp_path)
        else:
            cold.test_cold_start(NoBenchmark(), lab, case, tmp_path)
    assert {case.backend for case in scripts} == {None, "triton", "cuda", "torch"}
    assert {entry["reason"] for entry in lab.not_timed} == {"no"}
    for case, (script, environment) in scripts.items():
        compile(script, case.id, "exec")
        assert (f"device={device!r}" in script) == (case.call is not None)
        assert ("synchronize" in script) == (case.call is not None)
        assert (environment.get("TRITON_CACHE_DIR") == str(tmp_path)) == case.builds


def test_a_first_call_runs(bench):
    [case] = [case for case in bench["cold"].cases(True) if case.contestant == "first call, torch"]
    done = subprocess.run([sys.executable, "-c", case.script(CPU)], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_gpu_that_is_not_there_is_said(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "--bench-device", "cuda"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "--bench-device=cuda: PyTorch finds no GPU here" in done.stderr
