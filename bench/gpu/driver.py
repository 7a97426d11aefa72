"""Runs the steps, each in processes of its own and within its time, and writes down after each what there is.

Nothing that a step does can keep the next one from its turn: one that fails, hangs, crashes or runs over is recorded
and passed over. What it had written until then counts.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from bench.gpu import report
from bench.gpu.plan import Step

RESULTS, SUMMARY, TABLE, OUTPUT = "results.jsonl", "summary.json", "table.md", "output.txt"
DONE, FAILED, CUT, NOT_RUN = "done", "failed", "stopped when its time was over", "not run: no time left"
# The exit code of a process whose GPU answers no more: it can go on in a new one.
LOST_DEVICE = 3

_GRACE = 1.0  # from SIGTERM to SIGKILL, and for the system to end what was killed
_RESTARTS = 5
_MARK = "DSKD_FAST_GPU_PROCESS"
_TAIL = 1500
_LARGEST_OUTPUT = 1 << 20

# The command of a step's process, by the number of the process and of the first case that it has to do.
Command = Callable[[Step, int, int], Sequence[str]]


def add(out: Path, result: dict[str, Any]) -> None:
    """Add a result so that it stays, whatever happens next, and is a line of its own, whatever happened before."""
    # One write at the end of the file: those of other processes do not come between.
    file = os.open(out / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"\n{json.dumps(result)}\n".encode())
        os.fsync(file)
    finally:
        os.close(file)


def read(out: Path) -> list[dict[str, Any]]:
    """All results until now; a line that was cut off, or is something else, is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (out / RESULTS).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                result = json.loads(line)
                if isinstance(result, dict) and "step" in result:
                    found.append(result)
    return found


class Process(NamedTuple):
    """A running process of a step, alone in its group, the file of its output, and what its environment alone holds."""

    popen: subprocess.Popen
    output: IO[bytes]
    mark: str


class Driver:
    """Runs steps within a time.

    Args:
        out: the folder of all results, which exists.
        seconds: for everything.
        command: what a step's process runs.
        facts: what the summary says besides.
    """

    def __init__(self, out: Path, seconds: float, command: Command, facts: dict[str, Any]) -> None:
        self.out = out
        self.command = command
        self.started = time.monotonic()
        self.end = self.started + seconds
        self.facts = facts
        self.steps: list[dict[str, Any]] = []
        self._running: list[Running] = []

    def run(self, steps: Sequence[Step], background: Step) -> bool:
        """Run all of them in order; returns whether each has results and none failed."""
        try:
            built = self._start(background, self.end)
            groups = _groups(steps)
            for index, group in enumerate(groups):
                self._run(group, [of_group[0].seconds for of_group in groups[index:]])
            self._wait([built])
        finally:  # also where this process is told to end
            for running in self._running:
                running.stop()
            self.write()
        return all(step["state"] in (DONE, CUT) and step["results"] for step in self.steps)

    def _run(self, group: list[Step], shares: list[float]) -> None:
        left = self.end - time.monotonic()
        # What is less than this would not even import what it needs.
        if left < 0.02 * (self.end - self.started):
            self.steps += [{"name": s.name, "title": s.title, "state": NOT_RUN, "results": 0} for s in group]
            return self.write()
        until = time.monotonic() + left * shares[0] / sum(shares)
        self._wait([self._start(step, until) for step in group])
        return self.write()

    def _wait(self, group: list["Running"]) -> None:
        while any(running.is_running for running in group):
            for running in self._running:
                running.poll()
            time.sleep(0.02)

    def _start(self, step: Step, until: float) -> "Running":
        found: dict[str, Any] = {"name": step.name, "title": step.title, "state": "running", "results": 0}
        self.steps.append(found)
        self._running.append(Running(self, step, until, found))
        self.write()
        return self._running[-1]

    def write(self) -> None:
        """Write the summary and the table of what there is."""
        results = read(self.out)
        for step in self.steps:
            step["results"] = sum(result["step"] == step["name"] for result in results)
        summary = {**self.facts, "seconds": round(time.monotonic() - self.started, 1), "steps": self.steps}
        _replace(self.out / SUMMARY, json.dumps(summary, indent=1) + "\n")
        try:
            text = report.table(summary, results)
        except Exception as error:  # results of a kind that it does not know must not end the run
            text = f"The table could not be made ({type(error).__name__}: {error}): see {RESULTS}.\n"
        _replace(self.out / TABLE, text)


class Running:
    """The processes of a step: those that die in the middle of their cases go on with the next one."""

    def __init__(self, driver: Driver, step: Step, until: float, found: dict[str, Any]) -> None:
        self._driver, self._step, self._until, self._found = driver, step, until, found
        self._started = time.monotonic()
        self._restarts = 0
        self._processes = {k: self._open(k, 0) for k in range(step.processes)}
        self._codes: dict[int, int] = {}
        self._cut: set[int] = set()
        found["limit"] = round(until - self._started, 1)

    @property
    def is_running(self) -> bool:
        """Whether `stop` has not been called yet."""
        return self._found["state"] == "running"

    def poll(self) -> None:
        """Look after processes that have ended, and end the step once all have or its time is over."""
        if not self.is_running:
            return
        for k in [k for k, process in self._processes.items() if process.popen.poll() is not None]:
            self._ended(k)
        if not self._processes or time.monotonic() >= self._until:
            self.stop()

    def stop(self) -> None:
        """End what runs, and note how the step went."""
        if not self.is_running:
            return
        was_cut = bool(self._processes)
        self._cut = set(self._processes)
        for process in self._processes.values():
            _signal(process, signal.SIGTERM)
        patience = time.monotonic() + _GRACE
        while time.monotonic() < patience and any(p.popen.poll() is None for p in self._processes.values()):
            time.sleep(0.02)
        for k in list(self._processes):
            self._close(k)
        has_failed = any(self._codes.values())
        self._found["state"] = FAILED if has_failed else CUT if was_cut else DONE
        if not (was_cut or has_failed) and not any(r["step"] == self._step.name for r in read(self._driver.out)):
            self._found |= {"state": FAILED, "why": "it ended without a result"}
        self._found["seconds"] = round(time.monotonic() - self._started, 1)
        self._found["codes"] = self._codes
        if self._restarts:
            self._found["restarts"] = self._restarts

    def _ended(self, k: int) -> None:
        """Go on after a crash, with the case after the one in which it happened, or close it."""
        code = self._processes[k].popen.returncode
        self._close(k)
        if self._restarts == _RESTARTS or not (code < 0 or code == LOST_DEVICE):
            return
        mine = (r for r in read(self._driver.out) if (r["step"], r.get("process")) == (self._step.name, k))
        begin = 1 + max((r["case"] for r in mine if isinstance(r.get("case"), int)), default=-1)
        if code < 0:
            # Why there is no result of that case has to be seen; it counts as done.
            reason = f"its process died of signal {-code}"
            add(self._driver.out, {"step": self._step.name, "process": k, "case": begin, "error": reason})
            begin += 1
        del self._codes[k]
        self._restarts += 1
        self._processes[k] = self._open(k, begin)

    def _open(self, k: int, begin: int) -> Process:
        output = tempfile.TemporaryFile()  # noqa: SIM115, since it outlives this call
        command = self._driver.command(self._step, k, begin)
        mark = f"{os.getpid()}-{time.monotonic_ns()}"
        # In a session of its own, and marked, so that whatever it starts ends with it.
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {_MARK: mark},
        )
        return Process(popen, output, mark)

    def _close(self, k: int) -> None:
        """End a process and all that it has started; keep its code and the end of its output."""
        process = self._processes.pop(k)
        _signal(process, signal.SIGKILL)
        _kill_marked(process.mark)
        try:
            code = process.popen.wait(_GRACE)
        except subprocess.TimeoutExpired:  # it waits inside the driver, and cannot be killed
            code = None
        self._codes[k] = 0 if k in self._cut or code is None else code
        size = process.output.seek(0, os.SEEK_END)
        process.output.seek(max(0, size - 40 * _TAIL))
        text = process.output.read().decode(errors="replace").replace("\0", "")
        process.output.close()
        if self._codes[k]:
            self._found["tail"] = text[-_TAIL:]
            self._found["why"] = _last_line(text) or f"code {code}"
        log = self._driver.out / OUTPUT
        if text.strip() and not (log.exists() and log.stat().st_size > _LARGEST_OUTPUT):
            with log.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"\n===== {self._step.name}, process {k}, code {code}\n{text}")


def _groups(steps: Iterable[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in steps:
        if step.beside:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _signal(process: Process, number: int) -> None:
    # The group outlives the process where that has left others behind.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.popen.pid, number)


def _kill_marked(mark: str) -> None:
    """Kill what a process has started in sessions of its own, too: children inherit the environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if f"{_MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _replace(path: Path, text: str) -> None:
    """Write a file that is never half there."""
    new = path.with_name(f".{path.name}")
    new.write_text(text, encoding="utf-8", errors="replace")
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, path)
