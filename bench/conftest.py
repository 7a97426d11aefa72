"""Options of the benchmarks, and what their JSON has besides pytest-benchmark's own."""

import re
import sys
from pathlib import Path

import pytest
import torch

try:
    import matplotlib  # noqa: F401
    import psutil  # noqa: F401
    import pytest_benchmark  # noqa: F401
except ImportError as error:
    raise pytest.UsageError(f'the benchmarks need {error.name}: pip install -e ".[bench]"') from None

# The processes that measure memory import the package, too, wherever pytest was started.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import accuracy, memory
from bench.contestants import AFFINITY
from bench.lab import Lab, environment
from dskd_fast.device import keep_freed_memory

_LAB = pytest.StashKey[Lab]()
# The curves of the plot of errors: the textbook in both types, and the best backend of ours here.
_PRECISIONS_SHOWN = ("fp32", "bf16")


def pytest_addoption(parser):
    group = parser.getgroup("dskd-fast")
    group.addoption("--bench-full", action="store_true", help="all shapes and contestants: 2 to 3 hours on two cores")
    group.addoption("--bench-device", default="cpu", help="cpu (default) or cuda")


def pytest_configure(config):
    name = config.getoption("--bench-device")
    if name not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--bench-device={name} is not known: use cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device=cuda: PyTorch finds no GPU here")
    if name == "cpu":
        # For all contestants alike: by default half of a dense form's time is the system clearing memory anew.
        keep_freed_memory()
    config.stash[_LAB] = Lab(torch.device(name), config.getoption("--bench-full"))


@pytest.fixture
def lab(request):
    lab = request.config.stash[_LAB]
    # What the case before has left: without this, kept memory adds up until the system ends the run.
    memory.give_back(lab.device)
    return lab


def pytest_generate_tests(metafunc):
    """Parametrise `case` by what the module offers for a quick or a full run."""
    if (cases := getattr(metafunc.module, "cases", None)) and "case" in metafunc.fixturenames:
        found = metafunc.config.stash[_LAB].choose(cases(False), cases(True))
        metafunc.parametrize("case", found, ids=[re.sub(r"[^\w.+-]+", "_", case.id) for case in found])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    lab = config.stash[_LAB]
    output_json.update(_found(lab))
    best = "cpu" if lab.device.type == "cpu" else "triton"
    shown = [c for c in AFFINITY if c.name == "eager" or (c.name == best and c.precision in _PRECISIONS_SHOWN)]
    runnable = [c for c in shown if c.refusal((1, 256, 32, 32), lab.device, 2**40) is None]
    output_json["convergence"] = accuracy.convergence(runnable, lab.device)


def pytest_terminal_summary(terminalreporter, config):
    """The report's tables, where pytest-benchmark's have times alone."""
    from bench.tables import report, results_of

    session = getattr(config, "_benchmarksession", None)
    timed = [b.as_dict(include_data=False, stats=True) for b in session.benchmarks if b] if session else []
    lab = config.stash[_LAB]
    if timed or lab.not_timed:
        terminalreporter.write_line("")
        terminalreporter.write(report(results_of({"benchmarks": timed, **_found(lab)}), {}))


def _found(lab):
    """What the report needs besides the times."""
    return {"not_timed": lab.not_timed, "only_full": lab.only_full, "environment": environment(lab.device)}
