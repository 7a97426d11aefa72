"""Builds the C++ and CUDA C++ extensions, at first use or ahead of time, and loads them.

Each of `EXTENSIONS` is one shared library of csrc/<name>, whose operators are then torch.ops.dskd_fast_<name>.*. At
first use ninja builds it in the user's cache, as <name>-<hash of all that decides the result>.so. That file appears
complete or not at all, under a lock that the operating system releases when its holder dies; of a failure the
compiler's output is kept beside it. `DSKD_FAST_BUILD=1 pip install --no-build-isolation .` puts libraries made by the
same recipe into the package, where they are used as long as they fit the sources and PyTorch.

setup.py loads this file by itself, so it imports nothing of the package, and PyTorch only to load a library.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
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
_CAPABILITIES: dict[str, tuple[str, ...]] = {"DEFAULT": ()}
if platform.machine() in ("x86_64", "AMD64"):
    _CAPABILITIES["AVX2"] = ("-mavx2", "-mfma", "-mf16c")
    _CAPABILITIES["AVX512"] = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mfma", "-mf16c")
# Normalisation must round equal vectors alike, which a fused multiply-add does not; elsewhere it is wanted.
_FUSED = {"affinity", "distillation", "product"}
# Environment variables that change what compilers and linkers do.
_READ_BY_COMPILERS = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")

_log = logging.getLogger("dskd_fast")


class BuildError(Exception):
    """An extension cannot be had; the message is one sentence without its end."""


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
            Unit("cuda/distillation.cu", "distillation.o", ()),
            Unit("cuda/distillation_prepare.cu", "distillation_prepare.o", exact),
        ]
    found = [Unit(f"cpu/{stem}.cpp", f"{stem}.o", ()) for stem in ("operators", "distillation_operators", "brgemm")]
    for capability, instructions in _CAPABILITIES.items():
        for stem in ("affinity", "cosine", "distillation", "distillation_rows", "prepare", "product"):
            contraction = "-ffp-contract=fast" if stem in _FUSED else "-ffp-contract=off"
            flags = (f"-DDSKD_CAPABILITY={capability}", *instructions, contraction)
            found.append(Unit(f"cpu/{stem}.cpp", f"{stem}.{capability}.o", flags))
    return found


class Recipe(NamedTuple):
    """How an extension is built: ninja's file, and the hash of all that decides the result."""

    name: str
    ninja: str
    key: str


def recipe(name: str, csrc: Path) -> Recipe:
    """The recipe for this machine.

    Raises:
        BuildError: a compiler or PyTorch is missing.
    """
    torch_folder, _ = _torch()
    if name == "cuda" and not any((torch_folder / "lib").glob("*torch_cuda*")):
        raise BuildError("this PyTorch is built without CUDA: install one with it")
    compiler = _compiler()
    cxx = [*_CXX_FLAGS]
    # Linked by name, so that what is missing in another PyTorch is found when the library is loaded.
    link = ["-shared", "-ltorch_cpu", "-ltorch", "-lc10"]
    if sys.platform == "darwin":
        link[0:1] = ["-dynamiclib", "-undefined", "dynamic_lookup"]
    tools = {"cxx": (compiler, cxx)}
    if name == "cuda":
        toolkit = _toolkit()
        common = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION=0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"]
        cxx += [*common, *(f"-isystem{folder}" for folder in toolkit.includes)]
        nvcc = ["-std=c++20", "-O3", f"-ccbin={compiler}", "-Xcompiler=-fPIC,-fvisibility=hidden", *common]
        tools["nvcc"] = (str(toolkit.nvcc), nvcc + _architectures(toolkit.nvcc))
        link += ["-ltorch_cuda", "-lc10_cuda", *(f"-L{folder}" for folder in toolkit.libraries), "-lcudart"]
    lines = ["ninja_required_version = 1.5"]
    for rule, (program, flags) in tools.items():
        command = f"{_quote(program, *flags)} -I$torch/include -I$torch/include/torch/csrc/api/include $flags"
        lines += [f"rule {rule}", f"  command = {command} -c $in -o $out"]
    lines += ["rule link", f"  command = {_quote(compiler)} $in -L$torch/lib {_quote(*link)} -o $out"]
    for unit in units(name):
        rule = "nvcc" if unit.source.endswith(".cu") else "cxx"
        lines += [f"build {unit.target}: {rule} $csrc/{unit.source}", f"  flags = {' '.join(unit.flags)}"]
    lines += [f"build library.so: link {' '.join(unit.target for unit in units(name))}", ""]
    ninja = "\n".join(lines)
    read = [f"{variable}={os.environ.get(variable, '')}" for variable in _READ_BY_COMPILERS]
    versions = [_run(program, "--version").stdout for program, _ in tools.values()]
    # Where the sources and PyTorch lie does not change what comes out, so their folders are not in the key.
    folders = f"csrc = {str(csrc).replace('$', '$$')}\ntorch = {_quote(str(torch_folder))}\n"
    return Recipe(name, folders + ninja, _hash(fit_of(name, csrc), ninja, *read, *versions))


# Building


def build(made: Recipe, library: Path) -> None:
    """Build an extension as the file `library`, which appears when it is complete; a failure leaves its .log there.

    Raises:
        BuildError: it cannot be built.
        OSError: the folder cannot be written.
    """
    # Leftovers of builders that were killed; the caller holds the lock.
    for leftover in library.parent.glob(f".{library.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    log, program = library.with_suffix(".log"), _ninja()
    folder = Path(tempfile.mkdtemp(prefix=f".{library.name}.", dir=library.parent))
    built = folder / "library.so"
    try:
        (folder / "build.ninja").write_text(made.ninja, encoding="utf-8")
        with log.open("wb") as output:
            done = subprocess.run([program, "-C", folder, "-v"], stdout=output, stderr=subprocess.STDOUT)
        if done.returncode != 0 or not built.exists():
            raise BuildError(f"the compiler failed, its output is in {log}")
        # A power cut must not leave the name without the content: loading half a library kills the process.
        with built.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(built, library)
        log.unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ninja() -> str:
    try:
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        program = None
    if found := program or shutil.which("ninja"):
        return found
    raise BuildError("ninja is missing: pip install ninja")


# Loading


class State(NamedTuple):
    """What became of an extension: `reason` is why it cannot be used, None if `library` is loaded."""

    reason: str | None
    library: str


_STATES: dict[str, State] = {}
_LOCK = threading.RLock()


def load(name: str) -> None:
    """Make torch.ops.dskd_fast_<name>.* callable; builds the library if nobody has.

    Raises:
        ImportError: it cannot be had, in one sentence; the next call gives the same answer without another attempt.
    """
    with _LOCK:
        if name not in _STATES:
            _STATES[name] = _find(name)
            if (reason := _STATES[name].reason) is not None:
                warnings.warn(f"dskd_fast cannot use its {name} kernels: {reason}", stacklevel=3)
    if (reason := _STATES[name].reason) is not None:
        raise ImportError(reason)


def is_loaded(name: str) -> bool:
    """Whether `load` would do nothing more."""
    return name in _STATES


def state(name: str) -> State | None:
    """What became of an extension in this process, None if none was needed yet."""
    return _STATES.get(name)


def _find(name: str) -> State:
    try:
        csrc = csrc_folder()
        library = prebuilt_library(name, csrc, package_folder())
        if not library.exists():
            if any(library.parent.glob(f"{name}-*.so")):
                _log.warning("dskd_fast: %s kernels of another PyTorch or other sources are not used", library.parent)
            made = recipe(name, csrc)
            library = cache_folder() / f"{name}-{made.key}.so"
            if not library.exists():
                _build_once(made, library)
        _load_library(library)
    except BuildError as error:
        return State(str(error), "")
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        place, why = getattr(error, "filename", None) or cache_folder(), getattr(error, "strerror", None) or error
        return State(f"cannot write {place} ({why}): set {CACHE_VARIABLE} to a writable folder with room", "")
    return State(None, str(library))


def _build_once(made: Recipe, library: Path) -> None:
    """Build a library of the cache, unless another process does so meanwhile."""
    import filelock

    _log.warning("dskd_fast: building the %s kernels, or waiting for a process that does; it takes a minute", made.name)
    library.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(library.with_suffix(".lock")):
        if not library.exists():
            build(made, library)


def _load_library(path: Path) -> None:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # PyTorch's own message has nothing but the path, the linker's is that path and the reason.
        first = str(error.__cause__ or error).strip().splitlines()[0].removeprefix(f"{path}: ")
        raise BuildError(f"{path} cannot be loaded ({first}): delete it, and it is built again") from error


# Where things are


def package_folder() -> Path:
    """The package dskd_fast."""
    return Path(__file__).resolve().parents[1]


def csrc_folder() -> Path:
    """The sources: installed as dskd_fast.csrc, in the repository a folder beside the package."""
    package = package_folder()
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise BuildError(f"the sources are missing from {package}: install dskd-fast again")


def prebuilt_library(name: str, csrc: Path, package: Path) -> Path:
    """Where a library that fits these sources and PyTorch lies in a package, if it was built ahead of time."""
    return package / "native" / f"{name}-{fit_of(name, csrc)}.so"


def cache_folder() -> Path:
    """Where libraries are built: DSKD_FAST_CACHE, or the platform's folder for what can be made again."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    if folder := os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(folder) / "dskd_fast"
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "dskd_fast"
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
    """nvcc, and the folders of the CUDA toolkit's headers and libraries."""

    nvcc: Path
    includes: list[Path]
    libraries: list[Path]


def _toolkit() -> Toolkit:
    folder = _toolkit_folder()
    includes = [*folder.glob("include"), *sorted(folder.glob("targets/*/include"))]
    return Toolkit(folder / "bin" / "nvcc", includes, [*folder.glob("lib64"), *sorted(folder.glob("targets/*/lib"))])


def _toolkit_folder() -> Path:
    """That of CUDA_HOME or CUDA_PATH, else of the nvcc that is found first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(variable):
            if not (Path(folder) / "bin" / "nvcc").exists():
                raise BuildError(f"{variable} names {folder}, which has no bin/nvcc")
            return Path(folder)
    if found := shutil.which("nvcc"):
        # It may be a link to the toolkit's, or a script that calls it: it knows itself where it is.
        for line in _run(found, "--dryrun", "-c", "x.cu").stderr.splitlines():
            if line.startswith("#$ TOP="):
                return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    if (default := Path("/usr/local/cuda")).joinpath("bin", "nvcc").exists():
        return default
    raise BuildError("there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder")


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


def _run(program: str | Path, *arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{program} does not run ({error.strerror}): install it again, or name another") from error


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _quote(*arguments: str) -> str:
    """Arguments for the shell, in a ninja file."""
    return shlex.join(arguments).replace("$", "$$")
