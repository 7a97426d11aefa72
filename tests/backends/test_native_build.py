"""Building and loading the native extensions, mostly with a script that stands in for the compiler."""

import errno
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import filelock
import pytest
import torch

from dskd_fast.backends import native_build
from dskd_fast.ops import dispatch

PROJECT = Path(__file__).resolve().parents[2]
COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="what stands in for a compiler is a shell script")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

# The last argument of every call is the file to make.
WRITE = 'for out; do :; done; echo "made" > "$out"'


def make_tool(path, body=WRITE, version="tool 1.0"):
    """A compiler: answers --version, notes all other calls in calls.txt beside it, and does what `body` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    note = f'echo "$@" >> "{path.parent / "calls.txt"}"'
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit; fi\n{note}\n{body}\n')
    path.chmod(0o755)
    return path


def fail_with(text, code=1):
    return f'echo "{text}" >&2; exit {code}'


class Setting:
    """One source, a compiler and a cache in a folder; `process()` is the loader as a new process would find it."""

    def __init__(self, folder, monkeypatch):
        self.csrc, self.cache, self.native = folder / "csrc", folder / "cache", folder / "native"
        self.tools = folder / "tools"
        self.source = self.csrc / "cpu" / "one.cpp"
        self.source.parent.mkdir(parents=True)
        self.source.write_text("int one() { return 1; }\n")
        self.compiler = make_tool(self.tools / "c++")
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("CXX", str(self.compiler))
        monkeypatch.setenv("DSKD_FAST_CACHE", str(self.cache))

    def process(self, loads_anything=True):
        spec = importlib.util.spec_from_file_location("native_build_alone", native_build.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.patch(module)
        if loads_anything:
            module._load_library = lambda path: module.State(None, str(path)) if path.read_text() else None
        return module

    def patch(self, module):
        self._monkeypatch.setattr(module, "units", lambda name: [module.Unit("cpu/one.cpp", "one.o", ())])
        self._monkeypatch.setattr(module, "csrc_folder", lambda: self.csrc)
        self._monkeypatch.setattr(module, "prebuilt_folder", lambda name: self.native / name)

    def calls(self):
        notes = self.tools / "calls.txt"
        return len(notes.read_text().splitlines()) if notes.exists() else 0

    def cached(self):
        """The finished folders; nothing else but lock files may be there."""
        found = [path for path in self.cache.iterdir() if path.suffix != ".lock"] if self.cache.exists() else []
        assert all(path.is_dir() and path.name.startswith("cpu-") for path in found)
        return found

    def failure(self, module):
        """The reason why "cpu" cannot be had, checked to be one sentence that is told once."""
        with pytest.warns(UserWarning, match="dskd_fast cannot use its cpu kernels") as told:
            reason = reason_of(module)
        assert len(told) == 1
        assert reason in str(told[0].message)
        assert reason == reason.strip()
        assert "\n" not in reason
        calls = self.calls()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert reason_of(module) == reason
        assert self.calls() == calls
        return reason


def reason_of(module):
    with pytest.raises(ImportError) as error:
        module.load("cpu")
    return str(error.value)


@pytest.fixture
def setting(tmp_path, monkeypatch):
    return Setting(tmp_path, monkeypatch)


# The list


def test_the_list_has_every_source():
    csrc = native_build.csrc_folder()
    for name in native_build.EXTENSIONS:
        units = native_build.units(name)
        sources = {str(path.relative_to(csrc)) for path in (csrc / name).iterdir() if path.suffix in (".cpp", ".cu")}
        assert {unit.source for unit in units} == sources
        assert len({unit.target for unit in units}) == len(units)


def test_no_flag_loosens_arithmetic_or_ties_the_library_to_this_processor():
    forbidden = {"-ffast-math", "-Ofast", "-march=native", "-mtune=native", "--use_fast_math", "-use_fast_math"}
    for name in native_build.EXTENSIONS:
        for unit in native_build.units(name):
            assert not forbidden & {*unit.flags, *native_build._CXX_FLAGS}


# The key


def test_the_key_changes_with_all_that_decides_the_result(setting, monkeypatch):
    def key():
        return setting.process().recipe("cpu", setting.csrc).key

    keys = [key()]
    assert key() == keys[0]

    setting.source.write_text("int one() { return 2; }\n")
    keys.append(key())
    (setting.csrc / "cpu" / "more.h").write_text("// a header\n")
    keys.append(key())
    make_tool(setting.compiler, version="tool 1.1")
    keys.append(key())

    changed = setting.process()
    changed._CXX_FLAGS = (*changed._CXX_FLAGS, "-g")
    keys.append(changed.recipe("cpu", setting.csrc).key)
    changed = setting.process()
    changed.units = lambda name: [changed.Unit("cpu/one.cpp", "one.o", ("-DX",))]
    keys.append(changed.recipe("cpu", setting.csrc).key)
    changed = setting.process()
    folder, _ = changed._torch()
    changed._torch = lambda: (folder, "99.0")
    keys.append(changed.recipe("cpu", setting.csrc).key)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/elsewhere")
    keys.append(setting.process().recipe("cpu", setting.csrc).key)
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_change_with_the_place_or_files_that_are_not_installed(setting, tmp_path):
    key = setting.process().recipe("cpu", setting.csrc).key
    moved = tmp_path / "elsewhere"
    shutil.copytree(setting.csrc, moved)
    (moved / "cpu" / "one.cpp~").write_text("an editor's copy")
    assert setting.process().recipe("cpu", moved).key == key


# Building at first use


def test_one_build_serves_all_processes(setting, caplog):
    with caplog.at_level("WARNING", "dskd_fast"):
        setting.process().load("cpu")
        module = setting.process()
        module.load("cpu")
    assert [record.message for record in caplog.records] == [
        "dskd_fast: building the cpu kernels, once, which can take a minute"
    ]
    assert setting.calls() == 2  # compile, link
    (folder,) = setting.cached()
    assert module.state("cpu") == (None, str(folder / module.library_name("cpu")), "")
    assert {path.name for path in folder.iterdir()} == {module.library_name("cpu"), "fit.json"}
    assert module.is_loaded("cpu")


def run_in_threads(function):
    threads = [threading.Thread(target=function) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_build_once_and_hear_of_a_failure_once(setting):
    module = setting.process()
    run_in_threads(lambda: module.load("cpu"))
    assert module.state("cpu").reason is None
    assert setting.calls() == 2

    make_tool(setting.compiler, fail_with("one.cpp:1:1: error: no"), version="tool 2.0")
    module, reasons = setting.process(), []

    def load():
        try:
            module.load("cpu")
        except ImportError as error:
            reasons.append(str(error))

    with pytest.warns(UserWarning, match="cannot use its cpu kernels") as told:
        run_in_threads(load)
    assert len(told) == 1
    assert len(reasons) == 8
    assert len(set(reasons)) == 1
    assert setting.calls() == 3


def test_paths_with_blanks_and_signs(tmp_path, monkeypatch):
    setting = Setting(tmp_path / "a b$c'd:e", monkeypatch)
    setting.process().load("cpu")
    assert len(setting.cached()) == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DSKD_FAST_CACHE", str(tmp_path))
    assert native_build.cache_folder() == tmp_path
    monkeypatch.delenv("DSKD_FAST_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    for platform, folder in (
        ("linux", "/caches/dskd_fast"),
        ("darwin", "/home/somebody/Library/Caches/dskd_fast"),
        ("win32", "/local/dskd_fast"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert native_build.cache_folder() == Path(folder)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert native_build.cache_folder() == Path("/home/somebody/.cache/dskd_fast")


def test_importing_builds_nothing(setting):
    code = "import dskd_fast, dskd_fast.backends.cpu_native, dskd_fast.backends.cuda_native"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)
    assert setting.calls() == 0
    assert not setting.cache.exists()


# What the compiler may do


def test_a_failure_is_remembered_and_told_in_full(setting):
    body = fail_with("in one.cpp: a note\none.cpp:7:1: error: no such thing\nmore after it")
    make_tool(setting.compiler, body)
    module = setting.process()
    reason = setting.failure(module)
    assert reason.startswith("the compiler failed: one.cpp:7:1: error: no such thing (20")
    state = module.state("cpu")
    for text in ("in one.cpp: a note", "more after it", f"{setting.compiler} ", "-O3"):
        assert text in state.details
    (folder,) = setting.cached()
    assert state.origin == str(folder / "failure.json")
    assert [path.name for path in folder.iterdir()] == ["failure.json"]

    calls = setting.calls()
    another = setting.process()
    assert setting.failure(another) == reason
    assert another.state("cpu") == state
    assert setting.calls() == calls

    # The way that doctor tells.
    make_tool(setting.compiler)
    shutil.rmtree(folder)
    setting.process().load("cpu")


def test_another_compiler_is_tried_after_a_failure(setting):
    make_tool(setting.compiler, fail_with("one.cpp:7:1: error: no such thing"))
    setting.failure(setting.process())
    make_tool(setting.compiler, version="tool 1.1")
    setting.process().load("cpu")


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (
            "/usr/bin/ld: one.o: undefined reference to f\ncollect2: error: ld returned 1",
            "/usr/bin/ld: one.o: undefined",
        ),
        ("/usr/bin/ld: cannot find -lcudart\ncollect2: error: ld returned 1", "/usr/bin/ld: cannot find -lcudart"),
        ("host_config.h:1: fatal error: unsupported GNU version", "host_config.h:1: fatal error"),
        ("", "it did not say why"),
    ],
)
def test_the_reason_is_the_line_that_says_most(setting, output, told):
    make_tool(setting.compiler, fail_with(output))
    assert f"the compiler failed: {told}" in setting.failure(setting.process())


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("one.cpp:1: fatal error: error writing to one.o: No space left on device", "there is no room left in"),
        ("ld: final link failed: Disk quota exceeded", "there is no room left in"),
        ("g++: fatal error: File size limit exceeded signal terminated program cc1plus", "there is no room left in"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "the compiler was killed"),
        ("g++: fatal error: Terminated signal terminated program cc1plus", "the compiler was killed"),
        ("cc1plus: virtual memory exhausted: Cannot allocate memory", "the compiler ran out of memory"),
        ("ninja: subcommand failed", "the compiler failed: it did not say why"),
        ("clang++: error: unable to execute command: Killed", "the compiler was killed"),
        ("collect2: fatal error: ld terminated with signal 7 [Bus error]", "the compiler was killed"),
    ],
)
def test_what_is_not_the_compilers_fault_is_not_kept(setting, output, told):
    make_tool(setting.compiler, fail_with(output))
    module = setting.process()
    assert told in setting.failure(module)
    assert output in module.state("cpu").details
    assert setting.cached() == []
    make_tool(setting.compiler)
    setting.process().load("cpu")


def test_a_compiler_that_does_not_end(setting):
    make_tool(setting.compiler, "exec sleep 3")
    module = setting.process()
    module._PATIENCE = 0.3
    assert setting.failure(module) == "the compiler took longer than 0 s"
    assert setting.cached() == []


def test_tools_are_asked_in_english(setting, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    make_tool(setting.compiler, fail_with("error: in $LC_ALL"))
    assert "error: in C (" in setting.failure(setting.process())


def test_no_compiler(setting, monkeypatch):
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    told = setting.failure(setting.process())
    assert told == "there is no C++ compiler: install g++ or clang++, or set CXX"
    assert setting.cached() == []


def test_a_compiler_that_is_not_there_or_does_not_run(setting, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert setting.failure(setting.process()) == (
        "CXX names no-such-compiler, which is not there (it takes a program, without arguments)"
    )
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF, or nearly so")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert setting.failure(setting.process()).startswith(f"{broken} does not run (Exec format error)")
    assert setting.cached() == []


def test_a_compiler_named_by_a_relative_path(setting, monkeypatch):
    monkeypatch.chdir(setting.tools)
    monkeypatch.setenv("CXX", "./c++")
    setting.process().load("cpu")
    assert setting.calls() > 0


def test_a_complaint_that_cannot_be_written_down_is_still_told(setting, monkeypatch):
    make_tool(setting.compiler, fail_with("one.cpp:1: error: no such thing"))
    module = setting.process()

    def full(failure, error):
        raise OSError(errno.ENOSPC, "No space left on device", str(failure))

    monkeypatch.setattr(module, "_remember", full)
    assert "no such thing" in setting.failure(module)
    assert "no such thing" in module.state("cpu").details


def test_no_ninja(setting, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", "")
    assert setting.failure(setting.process()) == "ninja is missing: pip install ninja"


def test_no_sources(setting, monkeypatch):
    module = setting.process()

    def missing():
        raise module.BuildError("the sources are missing from here: install dskd-fast again")

    module.csrc_folder = missing
    assert "install dskd-fast again" in setting.failure(module)


# What the cache may do


def test_a_cache_that_cannot_be_made(setting, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSKD_FAST_CACHE", str(tmp_path / "file" / "cache"))
    told = setting.failure(setting.process())
    assert told.startswith(f"cannot write {tmp_path / 'file'}")
    assert told.endswith("set DSKD_FAST_CACHE to a writable folder with room")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_read_only(setting):
    setting.cache.mkdir()
    setting.cache.chmod(0o500)
    try:
        assert setting.failure(setting.process()).startswith(f"cannot write {setting.cache}")
    finally:
        setting.cache.chmod(0o700)


def test_a_library_in_a_cache_that_is_read_only_is_used(setting):
    setting.process().load("cpu")
    module = setting.process()
    module._held = None  # no lock is taken, since none could be
    module.load("cpu")


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_cache_that_takes_no_files(setting, monkeypatch, code):
    def refuse(self, *arguments, **options):
        raise OSError(code, os.strerror(code), str(self))

    module = setting.process()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", refuse)
        told = setting.failure(module)
    assert os.strerror(code) in told
    assert str(setting.cache) in told
    assert setting.cached() == []
    setting.process().load("cpu")


def test_a_file_system_without_locks(setting, monkeypatch):
    def refuse(self, **options):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    told = setting.failure(setting.process())
    assert told == f"cannot write {setting.cache} (no locks here): set DSKD_FAST_CACHE to a writable folder with room"


def test_a_user_without_a_home(setting, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DSKD_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    told = setting.failure(setting.process())
    assert told == "this user has no home folder: set DSKD_FAST_CACHE to a writable one"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_record_of_a_failure(setting, content):
    module = setting.process()
    folder = setting.cache / f"cpu-{module.recipe('cpu', setting.csrc).key}"
    folder.mkdir(parents=True)
    (folder / "failure.json").write_text(content)
    assert setting.failure(module) == f"{folder / 'failure.json'} is damaged: delete its folder"


# Other processes


def start(setting, loads_anything, **options):
    """A process that loads "cpu" and prints where from."""
    code = f"""if True:
        import importlib.util, sys
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("native_build", {native_build.__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.units = lambda name: [module.Unit("cpu/one.cpp", "one.o", ())]
        module.csrc_folder = lambda: Path({str(setting.csrc)!r})
        module.prebuilt_folder = lambda name: Path({str(setting.native)!r}) / name
        if {loads_anything}:
            module._load_library = lambda path: module.State(None, str(path))
        module.load("cpu")
        print(module.state("cpu").origin)
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, **options)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@needs_compiler
def test_two_processes_at_once_build_once_and_both_load(setting):
    """With the real compiler, a real library and PyTorch's loader."""
    make_tool(setting.compiler, f'case " $* " in *" -c "*) sleep 2;; esac; exec {COMPILER} "$@"')
    processes = [start(setting, loads_anything=False) for _ in range(2)]
    (out, said), (other_out, other_said) = (process.communicate(timeout=100) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], said + other_said
    (folder,) = setting.cached()
    assert out == other_out == f"{folder / native_build.library_name('cpu')}\n"
    assert setting.calls() == 2
    assert (said + other_said).count("building the cpu kernels") == 1
    assert (said + other_said).count("waiting for another process that builds the kernels") == 1


def test_a_builder_that_was_killed_is_in_nobodys_way(setting):
    slow = setting.tools / "slow"
    slow.touch()
    make_tool(setting.compiler, f'[ -e "{slow}" ] && exec sleep 20\n{WRITE}')
    builder = start(setting, loads_anything=True, start_new_session=True)
    try:
        wait_until(lambda: setting.calls() == 1)
        builder.kill()  # its ninja and compiler live on
        builder.wait()
        assert [path.name for path in setting.cache.iterdir() if path.name.startswith(".cpu-")]
        slow.unlink()
        began = time.monotonic()
        setting.process().load("cpu")
        assert time.monotonic() - began < 10
        assert len(setting.cached()) == 1
    finally:
        os.killpg(builder.pid, signal.SIGKILL)
        builder.communicate()


def test_a_lock_file_that_nobody_holds_is_in_nobodys_way(setting):
    module = setting.process()
    setting.cache.mkdir()
    (setting.cache / f"cpu-{module.recipe('cpu', setting.csrc).key}.lock").write_text("4194304\n")
    module.load("cpu")
    assert len(setting.cached()) == 1


def test_a_lock_that_is_never_released(setting):
    module = setting.process()
    module._PATIENCE = 0.1
    setting.cache.mkdir()
    lock = setting.cache / f"cpu-{module.recipe('cpu', setting.csrc).key}.lock"
    with filelock.FileLock(lock):
        assert setting.failure(module) == f"another process has held {lock} for 0 s: end it"
    setting.process().load("cpu")


# Loading


def test_pytorch_was_upgraded_in_between(setting):
    setting.process().load("cpu")
    module = setting.process()
    folder, _ = module._torch()
    module._torch = lambda: (folder, "99.0")
    module.load("cpu")
    assert len(setting.cached()) == 2
    assert setting.calls() == 4


def test_a_library_cut_short(setting):
    """The system kills a process that maps half a library."""
    setting.process().load("cpu")
    (folder,) = setting.cached()
    library = folder / native_build.library_name("cpu")
    library.write_text(library.read_text()[:2])
    told = setting.failure(setting.process(loads_anything=False))
    assert told == f"{library} is damaged: delete its folder, and it is built again"


def test_a_damaged_library(setting):
    setting.process().load("cpu")
    (folder,) = setting.cached()
    library = folder / native_build.library_name("cpu")
    told = setting.failure(setting.process(loads_anything=False))
    assert told.startswith(f"{library} cannot be loaded (")
    assert "file too short" in told
    assert told.endswith("): delete its folder, and it is built again")


@needs_compiler
def test_a_library_that_does_not_fit_pytorch(setting, monkeypatch):
    monkeypatch.setenv("CXX", COMPILER)
    setting.source.write_text("int nowhere(); int (*one)() = nowhere;\n")
    assert "(undefined symbol: " in setting.failure(setting.process(loads_anything=False))


# Ahead of time


def build_ahead(setting):
    module = setting.process()
    setting.native.mkdir()
    module.build(module.recipe("cpu", setting.csrc), setting.native / "cpu")


def test_a_library_of_the_package_is_used_where_it_fits(setting, monkeypatch):
    build_ahead(setting)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    module = setting.process()
    module.load("cpu")
    assert module.state("cpu") == (None, str(setting.native / "cpu" / module.library_name("cpu")), "")
    assert not setting.cache.exists()


@pytest.mark.parametrize("change", ["PyTorch", "sources", "damage"])
def test_a_library_of_the_package_is_passed_over_where_it_does_not_fit(setting, change):
    build_ahead(setting)
    module = setting.process()
    if change == "PyTorch":
        folder, _ = module._torch()
        module._torch = lambda: (folder, "99.0")
    elif change == "sources":
        setting.source.write_text("int one() { return 3; }\n")
    else:
        (setting.native / "cpu" / "fit.json").write_text("{")
    module.load("cpu")
    (folder,) = setting.cached()
    reason, origin, details = module.state("cpu")
    assert reason is None
    assert origin == str(folder / module.library_name("cpu"))
    assert f"{setting.native / 'cpu'} was built for another PyTorch or from other sources" in details


@pytest.fixture
def project(tmp_path, setting):
    """A copy of what a wheel is made of."""
    folder = tmp_path / "project"
    for name in ("dskd_fast", "kernels", "csrc"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "native"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, folder / name)
    return folder


OF_BUILDS = {"DSKD_FAST_BUILD", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"}


def make_wheel(project, hook="build_wheel", **environment):
    """Run a hook as pip does, without isolation: what is said, and the names in the wheel or None if there is none."""
    code = f"from setuptools import build_meta; build_meta.{hook}('out')"
    variables = {key: value for key, value in os.environ.items() if key not in OF_BUILDS}
    (project / "out").mkdir(exist_ok=True)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=project, env=variables | environment, capture_output=True, text=True)
    wheels = [*(project / "out").glob("*.whl")]
    if not wheels:
        assert result.returncode != 0
        return result.stdout + result.stderr, None, None
    assert result.returncode == 0
    with zipfile.ZipFile(wheels[0]) as wheel:
        return result.stdout, wheels[0].name, set(wheel.namelist())


def test_a_wheel_has_the_sources_and_needs_no_compiler(project):
    _, name, files = make_wheel(project, CXX="no-such-compiler")
    assert name.endswith("-py3-none-any.whl")
    csrc = project / "csrc"
    sources = {f"dskd_fast/csrc/{path.relative_to(csrc)}" for path in csrc.glob("*/*")}
    assert sources
    assert {file for file in files if file.startswith("dskd_fast/csrc/")} == {*sources, "dskd_fast/csrc/__init__.py"}
    assert not [file for file in files if "/native/" in file]
    # A page needs what it is made of.
    page = {f"dskd_fast/workflow/report_page/{name}" for name in ("page.html", "style.css", "script.js")}
    assert {file for file in files if "/report_page/" in file} == page


def fake_toolkit(folder):
    make_tool(folder / "bin" / "nvcc", f'if [ "$1" = --list-gpu-code ]; then echo sm_80 sm_90; exit; fi\n{WRITE}')
    return folder


def test_a_wheel_may_have_the_libraries(project, tmp_path):
    has_cuda = native_build._torch()[0].joinpath("lib", "libtorch_cuda.so").exists()
    out, name, files = make_wheel(project, DSKD_FAST_BUILD="1", CUDA_HOME=str(fake_toolkit(tmp_path / "toolkit")))
    assert "none-any" not in name
    built = native_build.EXTENSIONS if has_cuda else ("cpu",)
    libraries = {f"dskd_fast/native/{name}/{native_build.library_name(name)}" for name in built}
    fits = {f"dskd_fast/native/{name}/fit.json" for name in built}
    assert {file for file in files if "native/" in file} == libraries | fits
    assert "built the cpu kernels" in out
    assert ("built the cuda kernels" if has_cuda else "left out the cuda kernels: ") in out


def test_an_editable_install_may_have_the_libraries(project):
    out, _, files = make_wheel(project, "build_editable", DSKD_FAST_BUILD="1", CUDA_HOME=str(project / "nowhere"))
    assert (project / "dskd_fast" / "native" / "cpu" / native_build.library_name("cpu")).exists()
    assert not [file for file in files if "native/" in file]
    assert "left out the cuda kernels: " in out
    # Where the installed module looks, and what it compares.
    spec = importlib.util.spec_from_file_location("of_project", project / "dskd_fast" / "backends" / "native_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._load_library = lambda path: module.State(None, str(path))
    module.load("cpu")
    assert module.state("cpu").origin.startswith(str(project))


def test_libraries_that_were_asked_for_and_fail_are_an_error(project, setting):
    make_tool(setting.compiler, fail_with("one.cpp:1:1: error: no"))
    out, name, _ = make_wheel(project, DSKD_FAST_BUILD="1", CUDA_HOME=str(project / "nowhere"))
    assert name is None
    assert "the cpu kernels cannot be built: the compiler failed: one.cpp:1:1: error: no" in out


# The CUDA toolkit


def test_the_toolkit_is_found_behind_scripts_and_links(tmp_path, monkeypatch):
    toolkit = tmp_path / "cuda"
    (toolkit / "targets" / "x86_64-linux" / "include").mkdir(parents=True)
    (toolkit / "targets" / "x86_64-linux" / "lib").mkdir()
    real = make_tool(toolkit / "bin" / "nvcc", f'echo "#$ TOP={toolkit}/bin/.." >&2')
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    script, link = tmp_path / "script", tmp_path / "link"
    make_tool(script / "nvcc", f'exec {real} "$@"')
    link.mkdir()
    (link / "nvcc").symlink_to(real)
    for folder in (script, link, real.parent):
        monkeypatch.setenv("PATH", str(folder))
        found = native_build._toolkit()
        assert found.nvcc == real
        assert found.includes == [toolkit / "targets" / "x86_64-linux" / "include"]
        assert found.libraries == [toolkit / "targets" / "x86_64-linux" / "lib"]
    monkeypatch.setenv("PATH", "")
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(variable, str(toolkit))
        assert native_build._toolkit().nvcc == real
        monkeypatch.setenv(variable, str(tmp_path))
        with pytest.raises(native_build.BuildError, match=rf"{variable} names .*, which has no bin/nvcc"):
            native_build._toolkit()
        monkeypatch.delenv(variable)


def test_architectures_are_those_that_are_asked_for_or_known(tmp_path, monkeypatch):
    def flags(known):
        return native_build._architectures(make_tool(tmp_path / "nvcc", f"echo {known}"))

    def code(number, kind="sm"):
        return f"-gencode=arch=compute_{number},code={kind}_{number}"

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    every = "sm_75 sm_80 sm_86 sm_89 sm_90 sm_90a sm_100 sm_120"
    numbers = [75, 80, 86, 89, 90, 100, 120]
    assert flags(every) == [*map(code, numbers), code(120, "compute")]
    # An older toolkit's code for its newest GPU is compiled further by the driver of those to come.
    assert flags("sm_70 sm_75 sm_80") == [code(75), code(80), code(80, "compute")]
    for listed in ("8.0;9.0a+PTX", "8.0 9.0a+PTX", " 8.0 ; 9.0a+PTX "):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert flags(every) == [code(80), code("90a"), code("90a", "compute")]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 12.0")
    with pytest.raises(native_build.BuildError, match=r"TORCH_CUDA_ARCH_LIST names 12.0, which .* does not compile"):
        flags("sm_80 sm_90")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    with pytest.raises(native_build.BuildError, match="install a newer CUDA toolkit"):
        flags("sm_50")


def test_the_cuda_key_holds_the_stable_abi_instead_of_pytorchs_version(tmp_path, monkeypatch, setting):
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit")))
    folder = tmp_path / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / "libtorch_cuda.so").touch()
    csrc = native_build.csrc_folder()

    def key(version, architectures="8.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        monkeypatch.setattr(native_build, "_torch", lambda: (folder, version))
        return native_build.recipe("cuda", csrc).key

    first = key("2.14.0")
    assert key("2.15.0") == first
    assert key("2.14.0", "9.0") != first
    with monkeypatch.context() as patched:
        patched.setattr(native_build, "STABLE_ABI", (2, 11))
        assert key("2.14.0") != first
    (folder / "lib" / "libtorch_cuda.so").unlink()
    with pytest.raises(native_build.BuildError, match="this PyTorch is built without CUDA"):
        key("2.14.0")


# What the choice of backend makes of it


def test_calls_fall_back_and_can_say_why(setting, monkeypatch):
    make_tool(setting.compiler, fail_with("one.cpp:7:1: error: no such thing"))
    setting.patch(native_build)
    monkeypatch.setattr(native_build, "_STATES", {})
    x = torch.ones(1, 4, 3, 3)
    with pytest.warns(UserWarning, match="dskd_fast cannot use its cpu kernels: the compiler failed") as told:
        choices = [dispatch.choose("auto", x, x, "ieee") for _ in range(2)]
    assert len(told) == 1
    for choice in choices:
        assert choice.name == "torch"
        assert "error: no such thing" in choice.passed_over["cpu"]
    with pytest.raises(dispatch.BackendError, match=r"backend='cpu' cannot serve this call: .*error: no such thing"):
        dispatch.choose("cpu", x, x, "ieee")
    assert setting.calls() == 1
