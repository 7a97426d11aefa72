"""Hashes of files' contents, to recognise the files later."""

import functools
import hashlib
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dskd_fast.workers import n_threads


def content_digests(paths: Iterable[Path]) -> list[bytes]:
    """The SHA-256 of each file's bytes, 32 bytes each, in order; empty for a file that is missing or cannot be read.

    A file is read again only if its size, its times or its place on the disk have changed since the last call.
    """
    # hashlib releases the interpreter lock, and a disk is faster with several requests at once.
    with ThreadPoolExecutor(n_threads()) as pool:
        return list(pool.map(_digest, paths))


def copies(paths: Iterable[Path], originals: Iterable[Path]) -> list[Path]:
    """Those of `paths` whose contents are, byte for byte, those of one of `originals`; what cannot be read is none."""
    paths, originals = list(paths), list(originals)
    # Files of other sizes need not be read.
    sizes = {_size(path) for path in originals} & {_size(path) for path in paths}
    known = {*content_digests(path for path in originals if _size(path) in sizes)} - {b""}
    candidates = [path for path in paths if _size(path) in sizes]
    return [path for path, found in zip(candidates, content_digests(candidates), strict=True) if found in known]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _digest(path: Path) -> bytes:
    try:
        state = path.stat()
        # Opening a named pipe would wait forever.
        if not stat.S_ISREG(state.st_mode):
            return b""
        return _digest_of(path.absolute(), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    except OSError:
        return b""


@functools.cache
def _digest_of(path: Path, *_: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
