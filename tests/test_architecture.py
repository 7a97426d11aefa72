"""Data flows one way; nothing imports from above itself, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dskd_fast
import dskd_fast.kernels

PACKAGE = Path(dskd_fast.__file__).parent
KERNELS = Path(dskd_fast.kernels.__file__).parent  # a folder of its own in the repository

# What each part may import, itself apart. Everything may import errors.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "reference": set(),
    "kernels": set(),
    "csrc": set(),
    "backends": {"kernels"},
    "ops": {"backends"},
    "functional": {"ops"},
    "losses": {"functional"},
    "models": {"functional", "losses"},
    "data": set(),
    "metrics": {"files", "data"},
    "workflow": {"files", "data", "metrics", "models", "losses", "functional", "ops", "backends", "package"},
    "cli": {"files", "workflow", "data", "metrics", "models", "losses", "functional", "package"},
    "api": {"models", "workflow"},
    "package": {"functional", "losses", "api"},
    "__main__": {"cli"},
}


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
                f"{base}.{alias.name}" if base == "dskd_fast" and alias.name in ALLOWED else base
                for alias in node.names
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


def test_every_part_is_known():
    assert {part_of(module) for _, module, _ in modules()} <= ALLOWED.keys()
    assert len(list(modules())) > 20


@pytest.mark.parametrize(("file", "module", "is_package"), [pytest.param(*m, id=m[1]) for m in modules()])
def test_nothing_imports_from_above(file, module, is_package):
    own = part_of(module)
    wrong = [
        f"{file}:{line} imports {part}"
        for part, line in imports_of(file.read_text(encoding="utf-8"), module, is_package)
        if part not in {own, "errors"} | ALLOWED[own]
    ]
    assert wrong == []


def test_the_order_has_no_circle():
    """`package` apart, whose lazy import of the models is what the workflow's and command line's go through."""
    done = {"package"}
    rest = {part: parts - done for part, parts in ALLOWED.items() if part != "package"}
    while rest:
        free = {part for part, parts in rest.items() if parts <= done}
        assert free, rest
        done |= free
        rest = {part: parts for part, parts in rest.items() if part not in free}


@pytest.mark.parametrize(
    ("source", "module", "is_package", "parts"),
    [
        ("import dskd_fast.cli.main", "dskd_fast.data.images", False, ["cli"]),
        ("from dskd_fast import functional, DSKD", "dskd_fast.losses.x", False, ["functional", "package"]),
        ("def f():\n    from ..models import dskd", "dskd_fast.losses.x", False, ["models"]),
        ("from . import layout\nfrom .. import errors", "dskd_fast.data", True, ["data", "errors"]),
        ("import torch, os\nfrom numpy import linalg", "dskd_fast.ops.x", False, []),
    ],
)
def test_the_test_sees_every_way_to_import(source, module, is_package, parts):
    assert [part for part, _ in imports_of(source, module, is_package)] == parts


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return result.stdout.split()


def test_importing_is_cheap_and_touches_no_gpu():
    """Neither timm, which takes seconds, nor a compiler, nor a GPU: a process may only want a loss, or fork."""
    heavy = ("timm", "torchvision", "triton", "torch._inductor", "torch._dynamo", "sklearn", "scipy", "rich")
    already = run_python("import sys, torch; print(*sys.modules)")
    found = run_python(
        "import sys, dskd_fast; from dskd_fast import ContextualAffinityLoss, functional; import torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*sys.modules)"
    )
    assert [name for name in heavy if name in found and name not in already] == []


def test_the_model_is_imported_when_asked_for():
    assert dskd_fast.DSKD.__module__ == "dskd_fast.api"
    assert "DSKD" in dskd_fast.__all__
    with pytest.raises(AttributeError, match="no attribute 'NONE'"):
        _ = dskd_fast.NONE


def test_the_version_is_a_version():
    assert all(part.isdigit() for part in dskd_fast.__version__.split("."))


def test_the_kernels_are_no_package_of_their_own():
    """Installed as a top-level `kernels`, they would shadow anyone else's."""
    found = run_python(
        "import importlib.util, os, sys; os.chdir('/'); sys.path = [p for p in sys.path if p]\n"
        "print(importlib.util.find_spec('kernels'), importlib.util.find_spec('dskd_fast.kernels') is not None)"
    )
    assert found == ["None", "True"]
