"""Options of the benchmarks, and what their JSON has besides pytest-benchmark's own."""

import functools
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
from bench.work import BATCH, N_PHOTOGRAPHS
from dskd_fast import DSKD
from dskd_fast.data.synthetic import CATEGORY, make_screw_bag
from dskd_fast.detection.detector import Detector
from dskd_fast.device import keep_freed_memory
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.workers import n_threads

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


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Callable[[tuple[int, int]], list[Path]]:
    """Gives PNGs of a size: drawn small, enlarged, and with a camera's noise, without which they were small files."""

    @functools.cache
    def make(size: tuple[int, int]) -> list[Path]:
        folder = tmp_path_factory.mktemp("predict")
        make_screw_bag(folder, n_train=1, n_validation=1, n_test_good=N_PHOTOGRAPHS, n_structural=0, n_logical=0)
        paths = sorted((folder / CATEGORY / "test" / "good").iterdir())
        noise = np.random.default_rng(0).normal(0, 2, (size[1], size[0], 3)).astype(np.float32)

        def enlarge(i: int) -> None:
            with Image.open(paths[i]) as image:
                pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
            noisy = (pixels + np.roll(noise, 997 * i)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(paths[i])

        with ThreadPoolExecutor(n_threads()) as pool:
            list(pool.map(enlarge, range(len(paths))))
        return paths

    return make


@pytest.fixture(scope="session")
def detectors() -> Callable[[int, torch.device], Detector]:
    """Gives a calibrated detector for images of S x S."""

    @functools.cache
    def make(side: int, device: torch.device) -> Detector:
        model = DSKD("lite", image_size=side, pretrained=False).to(device, memory_format=torch.channels_last)
        detector = TrainingOptions("lite", image_size=side).detector(model)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=generator)
        detector.calibrate([images], "train")
        return detector

    return make


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
