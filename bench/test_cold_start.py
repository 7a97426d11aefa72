"""What a new process pays before its first result."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import timm
import torch

from bench.contestants import refuse_backend
from bench.lab import row
from dskd_fast.data.layout import open_category
from dskd_fast.data.synthetic import CATEGORY, make_screw_bag
from dskd_fast.ops import dispatch
from dskd_fast.runs.options import TrainingOptions
from dskd_fast.training.session import start_run

_ROOT = Path(__file__).resolve().parents[1]
_SHAPE = (1, 64, 16, 16)
# A process has its result once the device has it.
_CALL = """
import torch
{imports}
x = torch.rand({shape}, device={device!r})
{call}
if x.is_cuda:
    torch.cuda.synchronize()
"""
_EAGER = ("from bench.contestants import textbook", "textbook(x, x)")
_COMPILED = ("from bench.contestants import textbook", "torch.compile(textbook)(x, x)")
_COMMAND = "from dskd_fast.cli import main\nraise SystemExit(main({arguments!r}))"
_HELP = _COMMAND.format(arguments=["--help"])
_PREDICT = "predict one image"
# What all else in a table is relative to.
_REFERENCES = ("import torch", "import torch, timm")
# Where compilers keep what they have built.
_CACHES = ("DSKD_FAST_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class Case(NamedTuple):
    """A contestant: a call with its imports, or an import or command alone; `backend` is ours that is called."""

    contestant: str
    imports: str
    call: str | None = None
    backend: str | None = None
    builds: bool = False
    work: str = "a new process"

    @property
    def id(self) -> str:
        return self.contestant

    @property
    def group(self) -> str:
        return f"cold start: {self.work}"

    def row(self) -> dict:
        ours = self.backend is not None or "dskd_fast" in self.imports
        return row("cold", self.work, "start", self.contestant, ours=ours, reference=self.contestant in _REFERENCES)

    def script(self, device: torch.device) -> str:
        """What the new process runs."""
        if self.call is None:
            return self.imports
        return _CALL.format(imports=self.imports, shape=_SHAPE, device=device.type, call=self.call)


def cases(is_full: bool) -> list[Case]:
    found = [
        Case("import torch", "import torch"),
        Case("import dskd_fast", "import dskd_fast"),
        Case("dskd-fast --help", _HELP),
        Case("import torch, timm", "import torch, timm", work=_PREDICT),
        Case("dskd-fast predict", _COMMAND, work=_PREDICT),
    ]
    for backend in dispatch.BACKENDS:
        if backend == "torch" and not is_full:
            continue
        ours = (
            "from dskd_fast.functional import contextual_affinity",
            f"contextual_affinity(x, x.flip(0), backend={backend!r})",
            backend,
        )
        found.append(Case(f"first call, {backend}", *ours))
        if backend != "torch" and is_full:
            found.append(Case(f"first call ever: the {backend} kernels are built", *ours, builds=True))
    if is_full:
        found.append(Case("first call, eager", *_EAGER))
        found.append(Case("first call, torch.compile of eager, empty cache", *_COMPILED, builds=True))
    return found


@pytest.fixture(scope="session")
def run_and_image(tmp_path_factory) -> tuple[Path, Path]:
    """The smallest run there is, and an image for it."""
    folder = tmp_path_factory.mktemp("cold start")
    make_screw_bag(folder, n_train=2, n_validation=1, n_test_good=1, n_structural=0, n_logical=0, size=(120, 96))
    weights = folder / "teacher.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
    options = TrainingOptions(
        "test_resnet", teacher_weights=str(weights), image_size=64, gccb=8, epochs=1, batch_size=2, device="cpu"
    )
    category = open_category(folder, CATEGORY)
    start_run(folder / "run", category, options, holdout=0)
    return folder / "run", category.test[0].path


def test_cold_start(benchmark, lab, case, tmp_path, request):
    info = case.row()
    if case.backend and (reason := refuse_backend(case.backend, None)(_SHAPE, lab.device)):
        lab.leave_out(info, case.group, reason)
    lab.leave_out_of_quick(case)
    environment = dict(os.environ)
    script = case.script(lab.device)
    if script == _COMMAND:
        run, image = request.getfixturevalue("run_and_image")
        script = _COMMAND.format(arguments=["predict", str(run), str(image), "--out", str(tmp_path)])
    if case.builds:
        environment |= dict.fromkeys(_CACHES, str(tmp_path))

    def start() -> None:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=_ROOT)
        if done.returncode != 0:
            said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            lab.leave_out(info, case.group, f"it failed: {said[:200]}")

    benchmark.group = case.group
    benchmark.extra_info = info
    if case.builds:
        benchmark.pedantic(start, rounds=1)
    else:
        start()  # whatever is built or cached at a first start is another row's
        benchmark.pedantic(start, rounds=5 if lab.is_full else 2)
