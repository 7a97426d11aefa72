"""Builds the C++ and CUDA C++ extensions, at first use or ahead of time, and loads them.

Each of `EXTENSIONS` is one shared library of csrc/<name>, whose operators are then torch.ops.dskd_fast_<name>.*. At
first use ninja builds it into a folder of the user's cache whose name is a hash of everything that decides what comes
out. That folder appears complete or not at all, holds the library or the compiler's complaint, and is made under a lock
that the operating system releases when its holder dies. `DSKD_FAST_BUILD=1 pip install --no-build-isolation .` puts
libraries made by the same recipe into the package, where they are used as long as they fit the sources and PyTorch.

setup.py loads this file by itself, so it imports nothing of the package, and PyTorch only to load a library.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

EXTENSIONS = ("cpu", "cuda")
CACHE_VARIABLE = "DSKD_FAST_CACHE"
ARCHITECTURES_VARIABLE = "TORCH_CUDA_ARCH_LIST"
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# PyTorch's stable ABI of this version: what is compiled against it runs on all later ones.
STABLE_ABI = (2, 10)

_CXX_FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter",
)  # fmt: skip
# Each capability's kernels come from the same sources, and which are used is decided when they run: a cache or a wheel
# may be shared by machines with different processors.
_CAPABILITIES = {"DEFAULT": ()}
if platform.machine() in ("x86_64", "AMD64"):
    _CAPABILITIES["AVX2"] = ("-mavx2", "-mfma", "-mf16c")
    _CAPABILITIES["AVX512"] = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mfma", "-mf16c")
# Normalisation must round equal vectors alike, which a fused multiply-add does not; elsewhere it is wanted.
_FUSED = {"affinity", "product"}

# Environment variables by which compilers and linkers are told more than their arguments say.
_READ_BY_COMPILERS = (
    "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "GCC_EXEC_PREFIX", "COMPILER_PATH",
    "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS",
)  # fmt: skip

# A build that takes longer than this has gone wrong.
_PATIENCE = 1200.0

_log = logging.getLogger("dskd_fast")


class BuildError(Exception):
    """An extension cannot be had; the message is one sentence without its end."""

    def __init__(self, reason: str, details: str = "", is_lasting: bool = False) -> None:
        super().__init__(reason)
        self.details = details  # of the compiler, in full
        self.is_lasting = is_lasting  # the same recipe would fail again


class Unit(NamedTuple):
    """A source (relative to csrc), the name of its object file, and its own flags."""

    source: str
    target: str
    flags: tuple[str, ...]


def units(name: str) -> list[Unit]:
    """All that is compiled for an extension."""
    if name == "cuda":
        exact = ("--fmad=false",)
        return [
            Unit("cuda/operators.cpp", "operators.o", ()),
            Unit("cuda/affinity.cu", "affinity.o", ()),
            Unit("cuda/prepare.cu", "prepare.o", exact),
            Unit("cuda/cosine.cu", "cosine.o", exact),
        ]
    found = [Unit(f"cpu/{stem}.cpp", f"{stem}.o", ()) for stem in ("operators", "brgemm")]
    for capability, instructions in _CAPABILITIES.items():
        for stem in ("affinity", "cosine", "prepare", "product"):
            contraction = "-ffp-contract=fast" if stem in _FUSED else "-ffp-contract=off"
            flags = (f"-DDSKD_CAPABILITY={capability}", *instructions, contraction)
            found.append(Unit(f"cpu/{stem}.cpp", f"{stem}.{capability}.o", flags))
    return found


class Recipe(NamedTuple):
    """How an extension is built: ninja's file, and the hash of all that decides the result."""

    name: str
    ninja: str
    key: str
    fit: str  # hash of what a finished library has to fit: sources and PyTorch


def recipe(name: str, csrc: Path) -> Recipe:
    """The recipe for this machine.

    Raises:
        BuildError: a compiler or PyTorch is missing.
    """
    torch_folder, _ = _torch()
    if name == "cuda" and not any((torch_folder / "lib").glob("*torch_cuda*")):
        raise BuildError("this PyTorch is built without CUDA: install one with it")
    compiler = _compiler()
    includes = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
    cxx = [*_CXX_FLAGS, *(f"-I{folder}" for folder in includes)]
    # Linked by name, so that what is missing in another PyTorch is found when the library is loaded.
    link = ["-shared", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    if sys.platform == "darwin":
        link[0:1] = ["-dynamiclib", "-undefined", "dynamic_lookup"]
    tools = {"cxx": compiler}
    if name == "cuda":
        toolkit = _toolkit()
        define = f"-DTORCH_TARGET_VERSION=0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"
        folders = [f"-isystem{folder}" for folder in toolkit.includes]
        cxx += [define, "-DUSE_CUDA", *folders]
        nvcc = ["-std=c++20", "-O3", f"-ccbin={compiler}", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
        nvcc += [define, *(f"-I{folder}" for folder in includes), *_architectures(toolkit.nvcc)]
        link += ["-ltorch_cuda", "-lc10_cuda", *(f"-L{folder}" for folder in toolkit.libraries), "-lcudart"]
        tools["nvcc"] = str(toolkit.nvcc)
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {_quote(compiler)}",
        f"cxx_flags = {' '.join(map(_quote, cxx))}",
        f"link_flags = {' '.join(map(_quote, link))}",
        "rule cxx",
        "  command = $cxx $cxx_flags $flags -c $in -o $out",
        "rule link",
        "  command = $cxx $in $link_flags -o $out",
    ]
    if name == "cuda":
        lines += [
            f"nvcc = {_quote(tools['nvcc'])}",
            f"nvcc_flags = {' '.join(map(_quote, nvcc))}",
            "rule nvcc",
            "  command = $nvcc $nvcc_flags $flags -c $in -o $out",
        ]
    objects = []
    for unit in units(name):
        rule = "nvcc" if unit.source.endswith(".cu") else "cxx"
        lines += [f"build {unit.target}: {rule} {_path(csrc / unit.source)}", f"  flags = {' '.join(unit.flags)}"]
        objects.append(unit.target)
    lines += [f"build {library_name(name)}: link {' '.join(objects)}", ""]
    ninja = "\n".join(lines)
    fit = fit_of(name, csrc)
    described = [_version_of(tool) for tool in tools.values()]
    described += [f"{variable}={os.environ.get(variable, '')}" for variable in _READ_BY_COMPILERS]
    # Where the sources lie does not change what comes out, nor where PyTorch does.
    text = ninja.replace(str(csrc), "csrc").replace(str(torch_folder), "torch")
    return Recipe(name, ninja, _hash(fit, text, *described), fit)


def library_name(name: str) -> str:
    """File name of an extension's library."""
    return f"dskd_fast_{name}.so"


# Building


def build(made: Recipe, target: Path) -> None:
    """Build an extension into the folder `target`, which appears when it is complete.

    Raises:
        BuildError: it cannot be built.
        OSError: the folder above cannot be written.
    """
    # Leftovers of builders that were killed; the caller holds the lock.
    for leftover in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (folder / "build.ninja").write_text(made.ninja, encoding="utf-8")
        _run_ninja(folder)
        # What a reader finds is the library alone.
        finished = folder / "finished"
        finished.mkdir()
        shutil.move(folder / library_name(made.name), finished)
        library = finished / library_name(made.name)
        # A power cut must not leave the name without the content: loading half a library kills the process.
        with library.open("rb") as file:
            os.fsync(file.fileno())
        described = {"fit": made.fit, "key": made.key, "bytes": library.stat().st_size}
        (finished / "fit.json").write_text(json.dumps(described), encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.replace(finished, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_ninja(folder: Path) -> None:
    try:
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        program = None
    program = program or shutil.which("ninja")
    if program is None:
        raise BuildError("ninja is missing: pip install ninja")
    try:
        result = _run(program, "-C", folder, "-v", timeout=_PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler took longer than {_PATIENCE:.0f} s") from error
    if result.returncode == 0:
        return
    output = result.stdout + result.stderr
    if re.search("No space left on device|Disk quota exceeded|File size limit exceeded", output):
        raise BuildError(f"there is no room left in {folder.parent}: make some, or set {CACHE_VARIABLE}", output)
    # A crash of the compiler's own is told in the same words, and would happen again.
    ended = "signal terminated program|terminated with signal|unable to execute command|interrupted by user"
    if result.returncode < 0 or (re.search(ended, output) and "internal compiler error" not in output):
        raise BuildError("the compiler was killed, as happens when memory runs out", output)
    if re.search("annot allocate memory|memory exhausted|out of memory", output):
        raise BuildError("the compiler ran out of memory", output)
    # The linker's own complaints come before that of the compiler which called it, and need not have the word in them.
    complaint = re.search(r"^.*(?:\berror ?[:#]|undefined reference|cannot find -l).*$", output, re.MULTILINE)
    if complaint is None:  # nothing that it would say again
        raise BuildError("the compiler failed: it did not say why", output)
    raise BuildError(f"the compiler failed: {complaint[0].strip()}", output, is_lasting=True)


# Loading


class State(NamedTuple):
    """How an extension was had, or why not: `reason` is None if it is loaded."""

    reason: str | None
    origin: str  # the library, or where more can be read
    details: str = ""  # what the compiler said, or why a library that is there is not the one


_STATES: dict[str, State] = {}
_LOCK = threading.RLock()


def load(name: str) -> None:
    """Make torch.ops.dskd_fast_<name>.* callable; builds the library if nobody has.

    Raises:
        ImportError: it cannot be had, in one sentence; the next call gives the same answer without another attempt.
    """
    if (state := _STATES.get(name)) is None:
        with _LOCK:
            if (state := _STATES.get(name)) is None:
                state = _STATES[name] = _find(name)
                if state.reason is not None:
                    message = f"dskd_fast cannot use its {name} kernels: {state.reason} (`dskd-fast doctor` tells more)"
                    warnings.warn(message, stacklevel=3)
    if state.reason is not None:
        raise ImportError(state.reason)


def is_loaded(name: str) -> bool:
    """Whether `load` would do nothing more."""
    return name in _STATES


def state(name: str) -> State | None:
    """What became of an extension in this process, None if none was needed yet."""
    return _STATES.get(name)


def _find(name: str) -> State:
    passed_over = ""
    try:
        prebuilt = prebuilt_folder(name)
        if prebuilt.exists():
            if _described(prebuilt).get("fit") == fit_of(name, csrc_folder()):
                return _load_library(prebuilt / library_name(name))
            passed_over = f"{prebuilt} was built for another PyTorch or from other sources, and is not used\n"
        found = _find_in_cache(name)
    except BuildError as error:
        found = State(str(error), "", error.details)
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        place, why = getattr(error, "filename", None) or cache_folder(), getattr(error, "strerror", None) or error
        found = State(f"cannot write {place} ({why}): set {CACHE_VARIABLE} to a writable folder with room", "")
    return found._replace(details=passed_over + found.details)


def _described(folder: Path) -> dict:
    """What is written down beside a library, nothing if that cannot be read."""
    try:
        content = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_in_cache(name: str) -> State:
    import filelock

    made = recipe(name, csrc_folder())
    cache = cache_folder()
    target = cache / f"{name}-{made.key}"
    library, failure = target / library_name(name), target / "failure.json"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with _held(filelock.FileLock(cache / f"{target.name}.lock")):
            if failure.exists():
                return _remembered(failure)
            if not library.exists():
                _log.warning("dskd_fast: building the %s kernels, once, which can take a minute", name)
                try:
                    build(made, target)
                except BuildError as error:
                    if error.is_lasting:
                        with contextlib.suppress(OSError):  # the compiler's complaint matters more than that
                            _remember(failure, error)
                            return _remembered(failure)
                    raise
    return _load_library(library)


@contextlib.contextmanager
def _held(lock) -> Iterator[None]:
    """Hold a lock file. Its holder's death frees it: that is the operating system's doing."""
    import filelock

    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        _log.warning("dskd_fast: waiting for another process that builds the kernels (%s)", lock.lock_file)
        try:
            lock.acquire(timeout=_PATIENCE)
        except filelock.Timeout:
            raise BuildError(f"another process has held {lock.lock_file} for {_PATIENCE:.0f} s: end it") from None
    try:
        yield
    finally:
        lock.release()


def _load_library(path: Path) -> State:
    import torch

    remedy = "delete its folder, and it is built again"
    if _described(path.parent).get("bytes") != path.stat().st_size:
        raise BuildError(f"{path} is damaged: {remedy}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # PyTorch's own message has nothing but the path, the linker's is that path and the reason.
        first = str(error.__cause__ or error).strip().splitlines()[0].removeprefix(f"{path}: ")
        raise BuildError(f"{path} cannot be loaded ({first}): {remedy}") from error
    return State(None, str(path))


def _remember(failure: Path, error: BuildError) -> None:
    failure.parent.mkdir(exist_ok=True)
    temporary = failure.with_suffix(".partial")
    content = {"reason": str(error), "output": error.details, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, failure)


def _remembered(failure: Path) -> State:
    try:
        content = json.loads(failure.read_text(encoding="utf-8"))
        return State(f"{content['reason']} ({content['time']})", str(failure), content["output"])
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{failure} is damaged: delete its folder") from error


# Where things are


def csrc_folder() -> Path:
    """The sources: installed as dskd_fast.csrc, in the repository a folder beside the package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise BuildError(f"the sources are missing from {package}: install dskd-fast again")


def prebuilt_folder(name: str) -> Path:
    """Where a library that was built with the package lies."""
    return Path(__file__).resolve().parents[1] / "native" / name


def cache_folder() -> Path:
    """Where libraries are built: DSKD_FAST_CACHE, or the platform's folder for what can be made again."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "dskd_fast"
    if folder := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(folder) / "dskd_fast"
    return _home() / ".cache" / "dskd_fast"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without an entry in the system's list, as in containers
        raise BuildError(f"this user has no home folder: set {CACHE_VARIABLE} to a writable one") from None


def fit_of(name: str, csrc: Path) -> str:
    """Hash of what a finished library has to fit: the sources, PyTorch (or its stable ABI) and the platform."""
    version = _torch()[1] if name == "cpu" else ".".join(map(str, STABLE_ABI))
    digest = hashlib.sha256()
    for file in sorted(file for folder in (name, "common") for file in (csrc / folder).glob("*")):
        if file.suffix in (".cpp", ".h", ".cu", ".cuh"):  # those that are installed
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return _hash(digest.hexdigest(), version, platform.system(), platform.machine())


def _torch() -> tuple[Path, str]:
    """PyTorch's folder and version, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("PyTorch is not installed")
    return Path(spec.origin).parent, importlib.metadata.version("torch")


def _compiler() -> str:
    named = os.environ.get("CXX")
    if named and shutil.which(named) is None:
        raise BuildError(f"CXX names {named}, which is not there (it takes a program, without arguments)")
    for program in (named, "c++", "g++", "clang++"):
        if program and (found := shutil.which(program)):
            return os.path.abspath(found)  # ninja runs it in another folder
    raise BuildError("there is no C++ compiler: install g++ or clang++, or set CXX")


class Toolkit(NamedTuple):
    nvcc: Path
    includes: list[Path]
    libraries: list[Path]


def _toolkit() -> Toolkit:
    """The CUDA toolkit of CUDA_HOME or CUDA_PATH, else of the nvcc that is found first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            if not (Path(folder) / "bin" / "nvcc").exists():
                raise BuildError(f"{variable} names {folder}, which has no bin/nvcc")
            return _toolkit_in(Path(folder))
    if found := shutil.which("nvcc"):
        # It may be a link to the toolkit's, or a script that calls it: it knows itself where it is.
        for line in _run(found, "--dryrun", "-c", "x.cu").stderr.splitlines():
            if line.startswith("#$ TOP="):
                return _toolkit_in(Path(line.removeprefix("#$ TOP=").strip()).resolve())
    if (default := Path("/usr/local/cuda")).joinpath("bin", "nvcc").exists():
        return _toolkit_in(default)
    raise BuildError("there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder")


def _toolkit_in(folder: Path) -> Toolkit:
    targets = sorted(folder.glob("targets/*"))
    includes = [place for place in (folder / "include", *(t / "include" for t in targets)) if place.is_dir()]
    libraries = [place for place in (folder / "lib64", *(t / "lib" for t in targets)) if place.is_dir()]
    return Toolkit(folder / "bin" / "nvcc", includes, libraries)


def _architectures(nvcc: Path) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, else for all that the kernels and nvcc know, whatever GPU is here."""
    known = _run(nvcc, "--list-gpu-code").stdout.split()
    asked = os.environ.get(ARCHITECTURES_VARIABLE, "").replace(";", " ").split()
    entries = asked or [entry for entry in DEFAULT_ARCHITECTURES if f"sm_{entry.replace('.', '')}" in known]
    if not entries:
        raise BuildError(f"{nvcc} compiles for no GPU that the kernels run on: install a newer CUDA toolkit")
    if not asked:
        entries[-1] += "+PTX"  # for GPUs to come
    flags = []
    for entry in entries:
        number = entry.removesuffix("+PTX").replace(".", "")
        if f"sm_{number}" not in known:
            raise BuildError(f"{ARCHITECTURES_VARIABLE} names {entry}, which {nvcc} does not compile for")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


@functools.cache
def _version_of(program: str) -> str:
    return _run(program, "--version").stdout


def _run(program: str | Path, *arguments: str | Path, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Run a tool; what it says is read, so it is to say it in English."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout, env=environment
        )
    except OSError as error:
        raise BuildError(f"{program} does not run ({error.strerror}): install it again, or name another") from error


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _quote(argument: object) -> str:
    """An argument for the shell, in a ninja file."""
    return shlex.quote(str(argument)).replace("$", "$$")


def _path(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
