"""The tests that a GPU alone can run, each noted as it ends."""

import os
from typing import Any

import pytest

from bench.gpu.measure import LostDevice, Session


def tests(session: Session) -> None:
    """Each process runs each n-th test; one that went on after a crash leaves out what had begun before."""
    if session.is_built("cuda"):
        # Not built, for whatever reason: tests that need it are skipped at once, and build nothing again.
        os.environ["CUDA_HOME"] = os.devnull
    recorder = _Recorder(session)
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *session.plan.tests], plugins=[recorder])
    if recorder.lost is not None:
        raise recorder.lost
    is_done = code == pytest.ExitCode.NO_TESTS_COLLECTED and bool(recorder.begun)  # by a process before this one
    if not is_done and code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code).name}")


class _Recorder:
    """A plugin of pytest's."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.lost: LostDevice | None = None
        self.begun = {r["begun"] for r in session.results("tests") if "begun" in r}

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = items[self._session.process :: self._session.processes]
        items[:] = [item for item in chosen if item.nodeid not in self.begun]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self._session.process == 0:
            self._session.note(test=report.nodeid, outcome="failed", reason=str(report.longrepr)[-300:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._session.note(begun=nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        if report.failed or report.skipped or report.when == "call":
            found: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            if report.skipped and isinstance(report.longrepr, tuple):
                found["reason"] = report.longrepr[2]
            elif report.failed:
                lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
                found["reason"] = " ".join(lines[0][1:].split())[:300] if lines else str(report.longrepr)[-300:]
            self._session.note(**found)
        if report.failed:
            try:
                self._session.check()
            except LostDevice as error:
                self.lost = error
                item.session.shouldstop = str(error)
        return report
