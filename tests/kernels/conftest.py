"""The report compiles for minutes: it is begun when the tests begin, on the cores that they leave idle."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_RUNNING = {}


def environment():
    """For a process in which Triton compiles, as it does not under TRITON_INTERPRET: it decides that once."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def begin_report():
    """(process, its output, its JSON) of the one report of this session."""
    if not _RUNNING:
        folder = tempfile.TemporaryDirectory()
        output, rows = (Path(folder.name) / name for name in ("output.txt", "rows.json"))
        with output.open("w", encoding="utf-8") as stream:
            command = [sys.executable, "-m", "dskd_fast.kernels.report", "--json", str(rows)]
            process = subprocess.Popen(command, env=environment(), stdout=stream, stderr=subprocess.STDOUT)
        _RUNNING.update(process=process, output=output, rows=rows, folder=folder)
    return _RUNNING["process"], _RUNNING["output"], _RUNNING["rows"]


@pytest.fixture
def compiling():
    return environment()


@pytest.fixture(scope="session")
def kernels_report():
    return begin_report()


def pytest_collection_finish(session):
    wanted = any("kernels_report" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly:
        begin_report()


def pytest_sessionfinish():
    if _RUNNING:
        _RUNNING["process"].kill()
        _RUNNING["process"].wait()
        _RUNNING["folder"].cleanup()
