"""The run on a GPU, without one: whatever its steps do, it ends in time and with what there was."""

import json
import subprocess
import sys
import time

import pytest

from bench.gpu import plan
from bench.gpu.driver import LOST_DEVICE, Driver
from bench.gpu.measure import LostDevice, Session, exit_code
from bench.gpu.plan import Step

# What a step's process may do: `out` is the file of results, `note` adds a line to it.
HEAD = """if True:
    import os, signal, subprocess, sys, time
    process, begin, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    def note(name, case):
        with open(path, "a") as file:
            file.write(f'\\n{{"step": "{name}", "process": {process}, "case": {case}}}\\n')
"""
CODE = {
    "good": "note('good', 0)",
    "fails": "note('fails', 0); sys.exit('no such GPU')",
    "hangs": "note('hangs', 0); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
    "over": "print('working', flush=True); [(note('over', k), time.sleep(0.05)) for k in range(1000)]",
    "garbage": r"note('garbage', 0); os.write(1, bytes(range(256)) * 99); open(path, 'ab').write(b'\xff{\n[1]\n{'); "
    "sys.exit(9)",
    "silent": "pass",
    "crashes": "[(note('crashes', k) if k != 1 else os.kill(os.getpid(), 11)) for k in range(begin, 4)]",
    "loses": f"note('loses', begin); sys.exit({LOST_DEVICE} if begin < 2 else 0)",
    "leaves": "note('leaves', 0); [subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)', path], "
    "start_new_session=apart) for apart in (False, True)]",
    "last": "note('last', 0)",
}


@pytest.fixture
def drive(tmp_path):
    """Runs steps by the names of what they do: drive(seconds, *steps) -> (whether all have results, the summary)."""

    def run(seconds, *steps):
        def command(step, process, begin):
            code = HEAD + "    " + CODE[step.name]
            return [sys.executable, "-I", "-S", "-c", code, str(process), str(begin), str(tmp_path / "results.jsonl")]

        has_all = Driver(tmp_path, seconds, command, {"rehearsal": True}).run(steps, Step("good", "Build", 0))
        summary = json.loads((tmp_path / "summary.json").read_text())
        return has_all, {step["name"]: step for step in summary["steps"]}, (tmp_path / "table.md").read_text()

    return run


def test_a_step_that_goes_wrong_is_passed_over_and_named_and_what_there_was_stays(drive, tmp_path):
    names = ("fails", "hangs", "over", "garbage", "silent", "crashes", "loses", "leaves", "last")
    shares = {"hangs": 0.7, "over": 0.7}
    started = time.monotonic()
    has_all, found, table = drive(30, *(Step(name, f"Step {name}", shares.get(name, 4)) for name in names))
    assert time.monotonic() - started < 15
    assert not has_all
    assert {name: step["state"].split()[0] for name, step in found.items()} == {
        "good": "done", "fails": "failed", "hangs": "stopped", "over": "stopped", "garbage": "failed",
        "silent": "failed", "crashes": "done", "loses": "done", "leaves": "done", "last": "done",
    }  # fmt: skip
    assert found["fails"]["why"] == "no such GPU"
    assert found["fails"]["results"] == found["hangs"]["results"] == found["garbage"]["results"] == 1
    assert found["over"]["results"] > 1
    assert found["silent"]["why"] == "it ended without a result"
    assert found["crashes"]["results"] == 4
    assert found["crashes"]["restarts"] == 1
    assert found["loses"]["results"] == 3
    assert "died of signal 11" in (tmp_path / "results.jsonl").read_text(errors="replace")
    assert all(f"| Step {name} |" in table for name in names)
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 4  # more than 8 do not come back
    # Nothing that a step has started outlives it.
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout == b""


def test_steps_without_time_are_named_and_time_that_is_left_goes_to_the_next(drive):
    has_all, found, table = drive(1.2, Step("last", "Quick", 1), Step("over", "Long", 1), Step("good", "Late", 0.001))
    assert not has_all
    assert found["over"]["limit"] > 0.7
    assert "| Late | not run: no time left |" in table
    assert has_all is False


def test_a_case_that_fails_does_not_keep_others_and_a_lost_device_ends_the_process(tmp_path, monkeypatch):
    session = Session("correct", plan.REHEARSAL, tmp_path, process=2, begin=1)

    def fail():
        raise ValueError("one\ntwo")

    work = [({"name": name}, fail if name == "b" else dict) for name in "abc"]
    session.each(work)
    found = [(r["case"], r["name"], r.get("error")) for r in session.results("correct")]
    assert found == [(1, "b", "ValueError: one"), (2, "c", None)]

    def lost():
        raise LostDevice("illegal access")

    monkeypatch.setattr(session, "check", lost)
    assert exit_code(lambda: session.each(work)) == LOST_DEVICE
    assert len(session.results("correct")) == 3
