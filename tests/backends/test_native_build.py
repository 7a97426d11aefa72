"""Building and loading the native extensions, mostly with a script that stands in for the compiler."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dskd_fast.backends import native_build
from dskd_fast.ops import dispatch

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="what stands in for a compiler is a shell script")

# The loader as a new process finds it, with one source in a package of the test's own, and libraries of any content.
LOADER = """
import importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("native_build_alone", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.units = lambda name: [module.Unit("cpu/one.cpp", "one.o", ())]
module.package_folder = lambda: Path({package!r})
module._load_library = Path.read_text
"""
# The last argument of every call is the file to make.
WRITE = 'for out; do :; done; echo "made" > "$out"'
FAIL = "echo 'one.cpp: in f:'; echo 'one.cpp:7:1: error: no such thing' >&2; exit 1"


def make_tool(path, body=WRITE, version="tool 1.0"):
    """A compiler: answers --version, notes all other calls in calls.txt beside it, and does what `body` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = f'if [ "$1" = --version ]; then echo "{version}"; exit; fi'
    path.write_text(f'#!/bin/sh\n{answer}\necho "$@" >> "${{0%/*}}/calls.txt"\n{body}\n')
    path.chmod(0o755)
    return path


class Setting:
    """One source, compilers and a cache in a folder."""

    def __init__(self, folder, monkeypatch):
        self.package, self.cache, self.tools = folder / "dskd_fast", folder / "cache", folder / "tools"
        self.csrc = self.package / "csrc"
        self.source = self.csrc / "cpu" / "one.cpp"
        self.source.parent.mkdir(parents=True)
        self.source.write_text("int one() { return 1; }\n")
        self.compiler = make_tool(self.tools / "c++")
        listed = 'if [ "$1" = --list-gpu-code ]; then echo sm_80 sm_90; exit; fi'
        self.nvcc = make_tool(folder / "cuda" / "bin" / "nvcc", f"{listed}\n{WRITE}")
        self.code = LOADER.format(file=native_build.__file__, package=str(self.package))
        monkeypatch.setenv("CXX", str(self.compiler))
        monkeypatch.setenv("CUDA_HOME", str(folder / "cuda"))
        monkeypatch.setenv("DSKD_FAST_CACHE", str(self.cache))

    def process(self, pytorch=None):
        exec(self.code, names := {})
        module = names["module"]
        folder, version = module._torch()
        module._torch = lambda: (folder, pytorch or version)
        return module

    def start(self):
        """A process of its own that loads "cpu" and prints where from; what it starts ends with its session."""
        command = [sys.executable, "-c", f"{self.code}\nmodule.load('cpu')\nprint(module.state('cpu').library)"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def calls(self):
        notes = self.tools / "calls.txt"
        return len(notes.read_text().splitlines()) if notes.exists() else 0

    def cached(self):
        """What is in the cache, lock files apart: its libraries, with nothing half made beside them."""
        found = [path for path in self.cache.iterdir() if path.suffix != ".lock"] if self.cache.is_dir() else []
        assert all(path.name.startswith("cpu-") and path.suffix == ".so" for path in found)
        return found


def failure(module):
    """The reason why "cpu" cannot be had: one line, warned of once, the same for the next call."""
    with pytest.warns(UserWarning, match="kernels") as warned, pytest.raises(ImportError) as error:
        module.load("cpu")
    reason = module.state("cpu").reason
    assert [str(w.message) for w in warned] == [f"dskd_fast cannot use its cpu kernels: {reason}"]
    assert str(error.value) == reason == reason.replace("\n", " ")
    with warnings.catch_warnings(action="error"), pytest.raises(ImportError, match=re.escape(reason)):
        module.load("cpu")
    return reason


@pytest.fixture
def setting(tmp_path, monkeypatch):
    return Setting(tmp_path / "a b$c'd:e", monkeypatch)  # what the shell and ninja would read otherwise


def test_every_source_is_built_without_flags_that_loosen_arithmetic_or_need_this_processor():
    forbidden = {"-ffast-math", "-Ofast", "-march=native", "-mtune=native", "--use_fast_math", "-use_fast_math"}
    csrc = native_build.csrc_folder()
    for name in native_build.EXTENSIONS:
        units = native_build.units(name)
        sources = {str(path.relative_to(csrc)) for path in (csrc / name).iterdir() if path.suffix in (".cpp", ".cu")}
        assert {unit.source for unit in units} == sources
        assert len({unit.target for unit in units}) == len(units)
        assert not forbidden & {*native_build._CXX_FLAGS, *(flag for unit in units for flag in unit.flags)}


def test_the_key_changes_with_all_that_decides_the_result(setting, monkeypatch, tmp_path):
    def key(csrc=setting.csrc, pytorch=None, **changes):
        module = setting.process(pytorch)
        for name, value in changes.items():
            setattr(module, name, value)
        return module.recipe("cpu", csrc).key

    keys = [key(), key(pytorch="99.0"), key(_CXX_FLAGS=("-g",)), key(units=lambda name: [])]
    (setting.csrc / "cpu" / "one.cpp~").write_text("an editor's copy")
    shutil.copytree(setting.csrc, tmp_path / "elsewhere")
    assert key() == key(tmp_path / "elsewhere") == keys[0]
    for change in (
        lambda: setting.source.write_text("int one() { return 2; }\n"),
        lambda: setting.source.with_name("more.h").write_text("// a header\n"),
        lambda: make_tool(setting.compiler, version="tool 1.1"),
        lambda: monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/elsewhere"),
    ):
        change()
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_one_build_serves_all_threads_and_processes_until_pytorch_changes(setting, caplog):
    module = setting.process()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(module.load, ["cpu"] * 8))
    setting.process().load("cpu")
    assert ["building the cpu kernels" in record.message for record in caplog.records] == [True]
    assert setting.calls() == 2  # compile, link
    assert [module.state("cpu")] == [(None, str(library)) for library in setting.cached()]
    setting.process(pytorch="99.0").load("cpu")
    assert len(setting.cached()) == 2
    assert setting.calls() == 4


def test_calls_fall_back_from_a_broken_compiler_and_can_say_why(setting, monkeypatch):
    make_tool(setting.compiler, FAIL)
    x = torch.ones(1, 4, 3, 3)
    for calls in (1, 2):  # one for each process
        module = setting.process()
        reason = failure(module)
        monkeypatch.setattr(native_build, "load", module.load)
        (log,) = setting.cache.glob("*.log")
        assert reason == f"the compiler failed, its output is in {log}"
        assert dispatch.choose("auto", x, x, "fp32") == ("torch", {"cpu": reason})
        with pytest.raises(dispatch.BackendError, match=re.escape(f"backend='cpu' cannot serve this call: {reason};")):
            dispatch.choose("cpu", x, x, "fp32")
        assert setting.calls() == calls
    for text in ("one.cpp: in f:", "one.cpp:7:1: error: no such thing", "/tools/c++", "-O3"):
        assert text in log.read_text()
    make_tool(setting.compiler)
    setting.process().load("cpu")
    assert len(setting.cached()) == 1  # and no output of what has been mended


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "", "PATH": ""}, "there is no C++ compiler: install g++ or clang++, or set CXX"),
        ({"CXX": "c+-"}, "CXX names c+-, which is not there (it takes a program, without arguments)"),
        ({"CXX": "{broken}"}, "{broken} does not run (Exec format error): install it again, or name another"),
        ({"PATH": ""}, "ninja is missing: pip install ninja"),
        ({"DSKD_FAST_CACHE": ""}, "this user has no home folder: set DSKD_FAST_CACHE to a writable one"),
        ({"DSKD_FAST_CACHE": "{broken}"}, "cannot write {broken} (File exists): set DSKD_FAST_CACHE to a writable "
         "folder with room"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(setting, monkeypatch, environment, reason):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom the system does not list
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "ninja", None)
    broken = make_tool(setting.tools / "broken")
    broken.write_bytes(b"\x7fELF, or nearly so")
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value.format(broken=broken))
    assert failure(setting.process()) == reason.format(broken=broken)
    assert setting.cached() == []


def test_two_processes_at_once_build_once(setting):
    make_tool(setting.compiler, f"sleep 1; {WRITE}")
    processes = [setting.start() for _ in range(2)]
    first, second = (process.communicate(timeout=60)[0] for process in processes)
    (library,) = setting.cached()
    assert first == second == f"{library}\n"
    assert setting.calls() == 2


def test_a_builder_that_was_killed_is_in_nobodys_way(setting):
    make_tool(setting.compiler, "exec sleep 20")
    builder = setting.start()
    try:
        while setting.calls() == 0 and builder.poll() is None:
            time.sleep(0.02)
        builder.kill()  # its ninja and compiler live on
        builder.wait()
        assert [path.name for path in setting.cache.iterdir() if path.name.startswith(".cpu-")]
        make_tool(setting.compiler)
        began = time.monotonic()
        setting.process().load("cpu")
        assert time.monotonic() - began < 10
        assert len(setting.cached()) == 1
    finally:
        os.killpg(builder.pid, signal.SIGKILL)
        builder.communicate()


@pytest.mark.parametrize("change", [None, "PyTorch", "sources"])
def test_a_library_of_the_package_is_used_where_it_fits(setting, change, monkeypatch, caplog):
    builder = setting.process()
    library = builder.prebuilt_library("cpu", setting.csrc, setting.package)
    library.parent.mkdir()
    builder.build(builder.recipe("cpu", setting.csrc), library)
    if change is None:
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", "")
    elif change == "sources":
        setting.source.write_text("int one() { return 3; }\n")
    module = setting.process(pytorch="99.0" if change == "PyTorch" else None)
    module.load("cpu")
    (expected,) = [library] if change is None else setting.cached()
    assert module.state("cpu") == (None, str(expected))
    note = f"{library.parent} kernels of another PyTorch or other sources are not used"
    assert (note in caplog.text) == (change is not None)


@pytest.fixture
def install(tmp_path, setting):
    """Runs a hook as pip does, on a copy of what a wheel is made of; gives that, the output and the wheel's files."""
    project = tmp_path / "project"
    for name in ("dskd_fast", "kernels", "csrc"):
        shutil.copytree(PROJECT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "native"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, project / name)
    (project / "out").mkdir()

    def run(hook="build_wheel", **environment):
        command = [sys.executable, "-c", f"from setuptools import build_meta; build_meta.{hook}('out')"]
        environment = os.environ | {"CUDA_PATH": "", "TORCH_CUDA_ARCH_LIST": ""} | environment
        result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        files = set()
        for wheel in (project / "out").glob("*.whl"):
            files |= {wheel.name, *zipfile.ZipFile(wheel).namelist()}
        assert (result.returncode == 0) == bool(files), result.stderr
        return project, result.stdout + result.stderr, files

    return run


def test_a_wheel_has_the_sources_and_needs_no_compiler(install):
    project, _, files = install(CXX="no-such-compiler")
    assert any(file.endswith("-py3-none-any.whl") for file in files)
    sources = {f"dskd_fast/csrc/{path.relative_to(project / 'csrc')}" for path in (project / "csrc").glob("*/*")}
    assert {file for file in files if file.startswith("dskd_fast/csrc/")} == {*sources, "dskd_fast/csrc/__init__.py"}
    assert not [file for file in files if "/native/" in file]
    page = {"page.html", "style.css", "figures.js", "gallery.js", "controls.js"}
    assert {Path(file).name for file in files if "/report_page/" in file} == page


def test_libraries_that_were_asked_for_and_fail_are_an_error(install, setting):
    make_tool(setting.compiler, FAIL)
    _, out, files = install(DSKD_FAST_BUILD="1")
    assert files == set()
    assert "one.cpp:7:1: error: no such thing" in out
    assert "the cpu kernels cannot be built: the compiler failed" in out


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_a_wheel_or_an_editable_install_may_have_the_libraries(install, hook):
    has_cuda = native_build._torch()[0].joinpath("lib", "libtorch_cuda.so").exists()
    project, out, files = install(hook, DSKD_FAST_BUILD="1")
    assert not any(file.endswith("none-any.whl") for file in files)
    if hook == "build_editable":
        files = {str(path.relative_to(project)) for path in (project / "dskd_fast").rglob("*")}
    assert {file for file in files if "/native/" in file} == {
        str(native_build.prebuilt_library(name, project / "csrc", Path("dskd_fast")))
        for name in (native_build.EXTENSIONS if has_cuda else ["cpu"])
    }
    assert ("built the cuda kernels" if has_cuda else "left out the cuda kernels: ") in out


def test_the_toolkit_is_found_behind_a_script_or_by_its_variable(tmp_path, monkeypatch):
    target = tmp_path / "cuda" / "targets" / "x86_64-linux"
    (target / "include").mkdir(parents=True)
    (target / "lib").mkdir()
    real = make_tool(tmp_path / "cuda" / "bin" / "nvcc", f'echo "#$ TOP={tmp_path}/cuda/bin/.." >&2')
    script = make_tool(tmp_path / "script" / "nvcc", f'exec {real} "$@"')
    for named, folder in (("PATH", script.parent), ("CUDA_PATH", tmp_path / "cuda"), ("CUDA_HOME", tmp_path / "cuda")):
        for variable in ("PATH", "CUDA_PATH", "CUDA_HOME"):
            monkeypatch.setenv(variable, str(folder) if variable == named else "")
        assert native_build._toolkit() == (real, [target / "include"], [target / "lib"])
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(native_build.BuildError, match="CUDA_HOME names /nowhere, which has no bin/nvcc"):
        native_build._toolkit()


def test_architectures_are_those_that_are_asked_for_or_known(tmp_path, monkeypatch):
    def flags(known, asked=""):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        return native_build._architectures(make_tool(tmp_path / "nvcc", f"echo {known}"))

    def code(number, kind="sm"):
        return f"-gencode=arch=compute_{number},code={kind}_{number}"

    # An older toolkit's code for its newest GPU is compiled further by the driver of those to come.
    assert flags("sm_70 sm_75 sm_80") == [code(75), code(80), code(80, "compute")]
    assert flags("sm_80 sm_90a", " 8.0 ; 9.0a+PTX ") == [code(80), code("90a"), code("90a", "compute")]
    with pytest.raises(native_build.BuildError, match=r"TORCH_CUDA_ARCH_LIST names 12.0, which .* does not compile"):
        flags("sm_80 sm_90", "8.0 12.0")
    with pytest.raises(native_build.BuildError, match="install a newer CUDA toolkit"):
        flags("sm_50")
