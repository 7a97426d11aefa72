"""A tiny data set, runs trained on it once through the command line, and the command line itself."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

# Triton looks at this when kernels are defined, those of its own library with the first `import triton`. timm does
# that, so this comes before all other imports.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
import safetensors.torch
import timm
from filelock import FileLock
from PIL import Image

from dskd_fast.cli import main
from dskd_fast.data.category import Category
from dskd_fast.data.layout import DATA_ROOT_VARIABLE, open_category
from dskd_fast.data.synthetic import make_screw_bag
from dskd_fast.ops.dispatch import BACKEND_VARIABLE
from dskd_fast.runs.folder import load_run
from dskd_fast.runs.options import TrainingOptions

CHROMIUM_OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)

# Two threads that wait for each other on busy cores are many times slower than one.
torch.set_num_threads(1)

# Triton's interpreter looks through its whole language at every call of a function within a kernel, which is a third of
# its time, though it has replaced all of it where the kernel began.
with contextlib.suppress(ImportError, AttributeError):
    from triton.runtime import interpreter as triton_interpreter

    def _patch_once(fn, tl=triton_interpreter.tl, patch=triton_interpreter._patch_lang):
        originals = [language for language in (tl, tl.core) if tl.core.is_builtin(language.load)]
        if any(x is language for language in originals for x in fn.__globals__.values()):
            return patch(fn)
        return getattr(triton_interpreter, "_LangPatchScope", lambda: None)()  # older versions never put it back

    triton_interpreter._patch_lang = _patch_once

# In the background of a script Ctrl-C is ignored, by the processes that tests start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The smallest ResNet that timm has.
TINY_TEACHER = "test_resnet"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    # Before the compiler's tests: what fake tensors leave behind in autograd's threads does not survive a fork.
    items.sort(key=lambda item: "fork" not in item.fixturenames)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for variable in (DATA_ROOT_VARIABLE, BACKEND_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Has the session's first process fill a folder that all others then read: made_once(name, fill) -> the folder."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name, fill):
        folder, done = base / name, base / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                folder.mkdir(exist_ok=True)
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def data_root(made_once) -> Path:
    """A data root with the category `screw_bag`: 12 + 4 good images, 4 + 3 + 3 test images of 120 x 96."""
    counts = {"n_train": 12, "n_validation": 4, "n_test_good": 4, "n_structural": 3, "n_logical": 3}
    return made_once("data", lambda root: make_screw_bag(root, **counts, size=(120, 96), seed=1))


@pytest.fixture(scope="session")
def category(data_root) -> Category:
    return open_category(data_root, "screw_bag")


@pytest.fixture(scope="session")
def tiny_weights(made_once) -> Path:
    """Weights for the smallest teacher there is, random but always the same."""

    def fill(folder):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = timm.create_model(TINY_TEACHER, pretrained=False).state_dict()
        safetensors.torch.save_file(state, folder / "teacher.safetensors")

    return made_once("weights", fill) / "teacher.safetensors"


@pytest.fixture(scope="session")
def tiny_arguments(tiny_weights) -> list[str]:
    """Options of `train` for a network that trains in a moment."""
    text = f"--teacher {TINY_TEACHER} --image-size 64 --gccb 8 --epochs 1 --batch-size 4"
    return [*text.split(), "--teacher-weights", str(tiny_weights)]


@pytest.fixture(scope="session")
def tiny_options(tiny_weights):
    """Makes the same as `TrainingOptions`, with what the test wants to be different."""

    def options(**different) -> TrainingOptions:
        tiny = {"teacher": TINY_TEACHER, "teacher_weights": str(tiny_weights), "image_size": 64, "gccb": 8}
        return TrainingOptions(**tiny | {"epochs": 1, "batch_size": 4} | different)

    return options


@pytest.fixture(scope="session")
def tiny_run(data_root, tiny_arguments, made_once) -> Path:
    """A run with the tiny teacher. Read only: tests that change a run copy it."""
    command = ["train", "--data-root", str(data_root), "--category", "screw_bag", *tiny_arguments, "--out"]

    def fill(folder):
        assert main([*command, str(folder / "run")]) == 0

    return made_once("tiny", fill) / "run"


@pytest.fixture(scope="session")
def tiny_detector(tiny_run):
    return load_run(tiny_run, "cpu")[0]


@pytest.fixture
def own_run(tiny_run, tmp_path) -> Path:
    """A copy of the run that a test may change."""
    return shutil.copytree(tiny_run, tmp_path / "own run")


@pytest.fixture
def own_data(data_root, tmp_path) -> Path:
    """A copy of the data root that a test may change."""
    return shutil.copytree(data_root, tmp_path / "own data")


@pytest.fixture(scope="session")
def dead_frames(data_root) -> dict[str, tuple[np.ndarray, str]]:
    """What a camera gives that is off, covered or badly exposed, (96, 120, 3), uint8, with why that is suspect."""
    image = np.asarray(Image.open(data_root / "screw_bag" / "test" / "good" / "000.png")).astype(np.float64)
    noise = np.random.default_rng(0).normal(0, 4, image.shape)
    frames = {
        "black": (0 * image, "too dark and too little contrast"),
        "white": (0 * image + 255, "too bright and too little contrast"),
        "grey": (0 * image + image.mean().round(), "too little contrast"),
        "an eighth of the exposure": (image / 8, "too dark and too little contrast"),
        "overexposed": (3 * image, "too bright"),
        "lens cap": (8 + noise, "too dark and too little contrast"),
        "out of focus": (image.mean() + noise, "too little contrast"),
        "no synchronisation": (np.tile(255 * (noise[:, :1, :1] > 0), (1, 120, 3)), "too much contrast"),
    }
    return {name: (frame.clip(0, 255).astype(np.uint8), reason) for name, (frame, reason) in frames.items()}


@pytest.fixture(scope="session")
def start_chromium(tmp_path_factory):
    """Starts headless Chromium: start_chromium(webdriver.Chrome), or with a class that is derived from that."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver (Debian's packages)")

    def start(kind):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for option in (*CHROMIUM_OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        return kind(options=options, service=Service(driver))

    return start


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys):
    """Runs a command line in this process: cli("info", run) -> (code, out, err)."""

    def run(*arguments) -> Result:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def cli_error(cli):
    """Runs a command line that has to end in a user error, and returns its message: one line, code 2."""

    def run(*arguments) -> str:
        code, _, err = cli(*arguments)
        assert code == 2, err
        assert err.startswith("dskd-fast: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return run


@pytest.fixture(scope="session")
def edit():
    """Changes the content of a JSON file: edit(path, lambda content: content.update(a=1))."""

    def run(path: Path, change) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return run


@pytest.fixture(scope="session")
def write_images():
    """Writes `n` different images of a bright disc on a grey ground into a folder, and returns their paths."""

    def write(folder: Path, n: int, size: tuple[int, int] = (80, 64), seed: int = 0) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        width, height = size
        y, x = np.mgrid[:height, :width]
        paths = []
        for i in range(n):
            centre = rng.uniform(0.4, 0.6, 2) * (height, width)
            disc = np.hypot(y - centre[0], x - centre[1]) < height / 4
            image = np.where(disc[..., None], (210, 180, 90), (70, 75, 80)) + rng.normal(0, 4, (height, width, 3))
            paths.append(folder / f"{i:03d}.png")
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(paths[-1])
        return paths

    return write


@pytest.fixture(scope="session")
def bilinear():
    """Weights (target, source) of bilinear interpolation: pixel centres at (i + 0.5) / n, the edges repeated."""

    def weights(source: int, target: int, align_corners: bool = False) -> np.ndarray:
        centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
        position = np.linspace(0, source - 1, target) if align_corners else centres
        return np.maximum(1 - np.abs(position[:, None] - np.arange(source)), 0)

    return weights


@pytest.fixture
def interpreter():
    """Skips what needs Triton's interpreter where that cannot run, through no fault of ours."""
    if (reason := pytest.importorskip("dskd_fast.backends.triton").interpreter_refusal()) is not None:
        pytest.skip(reason)


@pytest.fixture
def fork():
    """Does some work in a process of its own that has imported everything: fork(work) -> waits for its exit code."""

    def start(work):
        pid = os.fork()
        if pid == 0:
            signal.alarm(300)  # ends one that hangs
            code = 70
            try:
                result = work() or 0
                sys.stdout.flush()
                code = result
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return start


@pytest.fixture
def in_two(fork, tmp_path):
    """Does some work in two processes, as torchrun starts them: in_two(work) -> their exit codes, and what they say."""

    def run(work):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        ends, texts = [], [tmp_path / f"process {rank}.txt" for rank in range(2)]
        for rank, text in enumerate(texts):

            def child(rank=rank, text=text):
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
                os.environ["TORCHELASTIC_RUN_ID"] = "test"
                with text.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                    return work()

            ends.append(fork(child))
        return [end() for end in ends], [text.read_text() for text in texts]

    return run


@pytest.fixture
def below():
    """Lists all files and folders below a folder, hidden ones included, as sorted relative paths."""

    def list_all(folder: Path) -> list[str]:
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))

    return list_all
