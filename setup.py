"""Packages of dskd-fast, and its native extensions where DSKD_FAST_BUILD=1; all else is in pyproject.toml."""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ("dskd_fast.csrc", *(f"dskd_fast.csrc.{name}" for name in ("common", "cpu", "cuda")))


def load_native_build():
    """The module with the recipes, by its file: its package cannot be imported before it is installed."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "dskd_fast" / "backends" / "native_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Builds by the recipes of first use, into native/ of the package: the source itself where that is editable."""

    def run(self):
        native_build = load_native_build()
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "dskd_fast"
        shutil.rmtree(package / "native", ignore_errors=True)
        (package / "native").mkdir(parents=True)
        for name in native_build.EXTENSIONS:
            library = native_build.prebuilt_library(name, ROOT / "csrc", package)
            try:
                native_build.build(native_build.recipe(name, ROOT / "csrc"), library)
                print(f"built the {name} kernels")
            except native_build.BuildError as error:
                # nvcc and a PyTorch with CUDA may be missing, what is there has to work.
                log = library.with_suffix(".log")
                if name == "cpu" or log.exists():
                    print(log.read_text(errors="replace") if log.exists() else "")
                    raise SystemExit(f"the {name} kernels cannot be built: {error}") from error
                print(f"left out the {name} kernels: {error}")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


is_native = os.environ.get("DSKD_FAST_BUILD") == "1"
setup(
    packages=[*find_packages(include=["dskd_fast", "dskd_fast.*"]), "dskd_fast.kernels", *SOURCES],
    package_dir={"dskd_fast.kernels": "kernels", "dskd_fast.csrc": "csrc"},
    package_data={
        "dskd_fast": ["py.typed"],
        "dskd_fast.kernels": ["README.md"],
        "dskd_fast.paper": ["paper.json"],
        "dskd_fast.evaluation": ["report_page/*"],
        "dskd_fast.station": ["service_page/*"],
    }
    | {name: ["*.cpp", "*.h", "*.cu", "*.cuh"] for name in SOURCES},
    # A wheel with libraries inside is for one platform only.
    ext_modules=[Extension("dskd_fast.native", [])] if is_native else [],
    cmdclass={"build_ext": BuildNative},
)
