"""The report compiles for long: it is begun when the tests begin, on the cores that they leave idle."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_RUNNING = {}


def environment():
    """For a process in which Triton compiles, as it does not under TRITON_INTERPRET: it decides that once."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def begin_report(config):
    """(process, its output, its JSON) of the one report of this session, without --all of few cases."""
    if not _RUNNING:
        # Tests may run in several processes, which share one report.
        session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
        folder = Path(tempfile.gettempdir(), f"kernels-report-{session}")
        folder.mkdir(exist_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("report_once.py")), str(folder)]
        command += ["all"] if config.getoption("--all") else []
        _RUNNING.update(process=subprocess.Popen(command, env=environment(), start_new_session=True), folder=folder)
    folder = _RUNNING["folder"]
    return _RUNNING["process"], folder / "output.txt", folder / "rows.json"


@pytest.fixture
def compiling():
    return environment()


@pytest.fixture(scope="session")
def kernels_report(pytestconfig):
    return begin_report(pytestconfig)


def pytest_collection_finish(session):
    wanted = any("kernels_report" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        begin_report(session.config)


def pytest_sessionfinish():
    if _RUNNING:
        process = _RUNNING["process"]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if "PYTEST_XDIST_WORKER" not in os.environ:
            shutil.rmtree(_RUNNING["folder"])
