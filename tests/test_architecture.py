"""The rooms and their order: nothing imports from above itself, and importing the package is cheap.

`python tests/test_architecture.py` prints the order.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dskd_fast
import dskd_fast.kernels

PACKAGE = Path(dskd_fast.__file__).parent
KERNELS = Path(dskd_fast.kernels.__file__).parent  # a folder of its own in the repository
CSRC = KERNELS.parent / "csrc"
TESTS = Path(__file__).parent

# Each room may import from those below it. The two below the line stand apart: they import nothing of the package.
ROOMS = {
    "__main__": "python -m dskd_fast",
    "cli": "arguments, progress, printing; demo and doctor",
    "integrations": "a detector inside other programs, each with the extra of its name",
    "paper": "the paper's tables and figures, beside its published numbers",
    "station": "images as they come: a folder that is watched, a service",
    "evaluation": "test images -> figures and the HTML page",
    "training": "good images -> a run: the loop, one step, checkpoints, several processes",
    "runs": "the run folder: options, files, history",
    "detection": "a trained detector: calibration, the decision rule, predict, export",
    "models": "teacher, bottlenecks, students, DSKD",
    "losses": "the loss modules",
    "functional": "the loss maps as functions",
    "metrics": "AUROC, sPRO, map files",
    "ops": "the registered operators, dispatch, the portable form",
    "data": "images, layouts, store, augmentation, synthetic images",
    "backends": "one module per backend",
    "device": "where and in which number format the networks run",
    "versions": "what is installed, and of which commit this is",
    "progress": "sentences to a logger, counts to a function",
    "markdown": "tables in Markdown",
    "workers": "threads that read ahead and write behind, in order",
    "files": "files that appear only when they are complete, tensors among them",
    "errors": "errors that a user can mend",
    "choices": "names, ranges and defaults of options, without torch",
    "reference": "the textbook formulas that everything is tested against",
}
APART = {"kernels": "Triton kernels, loaded by backends", "csrc": "C++ and CUDA C++, built and loaded by backends"}
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".js")
# `dskd_fast` itself names what it offers and imports it when it is asked for; only what stands on it may import it.
OFFERED = {"functional", "losses", "models", "runs"}


def part_of(module):
    """The part to which a module of the package belongs: "dskd_fast.data.images" -> "data"."""
    names = module.split(".")
    if names[0] != "dskd_fast":
        return None
    return names[1] if len(names) > 1 else "package"


def imports_of(source, module, is_package):
    """Parts that a module's source imports, wherever in it the statement stands: (part, line)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            # "from dskd_fast import functional" imports a module, "from dskd_fast import DSKD" a name.
            names = [
                f"{base}.{alias.name}" if base == "dskd_fast" and alias.name in ROOMS else base for alias in node.names
            ]
        else:
            continue
        found += [(part_of(name), node.lineno) for name in names if part_of(name)]
    return found


def modules():
    for folder, package in ((PACKAGE, ["dskd_fast"]), (KERNELS, ["dskd_fast", "kernels"])):
        for file in sorted(folder.rglob("*.py")):
            names = [*package, *file.relative_to(folder).with_suffix("").parts]
            is_package = names[-1] == "__init__"
            yield file, ".".join(names[:-1] if is_package else names), is_package


def allowed(own):
    """The rooms that a room may import."""
    if own == "package":
        return OFFERED
    if own in APART:
        return {own}
    order = list(ROOMS)
    below = set(order[order.index(own) :])
    # The version, and DSKD.load.
    below |= {"package"} if order.index(own) <= order.index("models") else set()
    return below | ({"kernels"} if own == "backends" else set())


def test_every_room_is_known_and_every_known_room_is_there():
    assert {part_of(module) for _, module, _ in modules()} == {*ROOMS, "kernels", "package"}
    assert all((CSRC / name).is_dir() for name in ("common", "cpu", "cuda"))


@pytest.mark.parametrize(("file", "module", "is_package"), [pytest.param(*m, id=m[1]) for m in modules()])
def test_nothing_imports_from_above(file, module, is_package):
    own = part_of(module)
    wrong = [
        f"{file}:{line} imports {part}"
        for part, line in imports_of(file.read_text(encoding="utf-8"), module, is_package)
        if part not in allowed(own)
    ]
    assert wrong == []


def test_the_native_sources_include_nothing_but_each_other():
    """csrc/cpu and csrc/cuda share csrc/common and know nothing of one another."""
    for folder in ("common", "cpu", "cuda"):
        for file in sorted((CSRC / folder).iterdir()):
            included = re.findall(r'^#include "(.+)"', file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            places = {(file.parent / name).resolve().parent.name for name in included}
            assert places <= {folder, "common"}, file


def test_no_file_is_longer_than_a_person_reads():
    folders = (PACKAGE, KERNELS, CSRC, TESTS, TESTS.parent / "bench")
    sources = [path for folder in folders for path in folder.rglob("*.*") if path.suffix in SUFFIXES]
    assert len(sources) > 200
    lines = {str(path): path.read_text(encoding="utf-8").count("\n") for path in sources}
    assert {name: n for name, n in lines.items() if n > 400} == {}


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return result.stdout.split()


def test_importing_is_cheap_and_touches_no_gpu():
    """Neither timm, which takes seconds, nor a compiler, nor a GPU: a process may want a loss, a score, or to fork."""
    heavy = {"timm", "torchvision", "triton", "torch._inductor", "torch._dynamo", "sklearn", "scipy", "rich"}
    found = run_python(
        "import sys, dskd_fast; alone = {*sys.modules}\n"
        "import torch; already = {*sys.modules}\n"
        "from dskd_fast import DSKD, ContextualAffinityLoss, functional\n"
        "DSKD('lite', image_size=64, gccb=8, pretrained=False).fold()\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*alone, *{*sys.modules} - already)"
    )
    assert {"torch", *heavy}.isdisjoint(found)


def test_what_the_package_offers_is_imported_when_asked_for():
    assert {*dskd_fast.__all__} <= {*dir(dskd_fast)}
    assert all(getattr(dskd_fast, name) is not None for name in dskd_fast.__all__)
    assert dskd_fast.DSKD is dskd_fast.models.DSKD
    assert dskd_fast.load is dskd_fast.runs.folder.load
    with pytest.raises(AttributeError, match="no attribute 'NONE'"):
        _ = dskd_fast.NONE


def test_the_kernels_are_no_package_of_their_own():
    """Installed as a top-level `kernels`, they would shadow anyone else's."""
    found = run_python(
        "import importlib.util, os, sys; os.chdir('/'); sys.path = [p for p in sys.path if p]\n"
        "print(importlib.util.find_spec('kernels'), importlib.util.find_spec('dskd_fast.kernels') is not None)"
    )
    assert found == ["None", "True"]


if __name__ == "__main__":
    for room, content in ROOMS.items():
        print(f"{room:12} {content}")
    print("-" * 12)
    for room, content in APART.items():
        print(f"{room:12} {content}")
