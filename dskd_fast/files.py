"""Files that appear under their name only when they are complete."""

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dskd_fast.errors import UserError

_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that appears under its name only when it is complete; an older one is replaced.

    Args:
        path: the file; its folders are made.
        write: writes it under the name it is given, in the same folder and with the same suffix.

    Raises:
        UserError: it cannot be written; an older file is then still there.
    """
    # Without the stem: a longer name than the file's own could exceed what the file system takes.
    temporary = path.with_name(f".{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def require_writable(path: Path) -> None:
    """Raise UserError if a file cannot be written: before the work that goes into it, not after."""
    if path.is_dir():
        raise UserError(f"cannot write {path}, because it is a folder: choose the name of a file")
    place = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not place.is_dir():
        raise UserError(f"cannot write {path}, because {place} is not a folder: choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: choose a writable place")


def is_half_written(path: Path) -> bool:
    """Whether a file has a name under which `write_file`, or the safetensors library in it, writes.

    Where no process writes any more, one that was killed has left it.
    """
    return re.fullmatch(r"\.\d+\.\w+|\.tmp\w{6}", path.name) is not None


def printable(text: object) -> str:
    """Text as one line for a terminal: what would steer the terminal or turn the direction of writing is escaped.

    These are the control characters (C0, DEL and C1, line breaks included), the line separators and the bidirectional
    controls of Unicode; the escapes are those of JSON. A file's name may hold them.
    """
    return _STEERING.sub(lambda found: json.dumps(found[0])[1:-1], str(text))


def in_shell(path: Path) -> str:
    """A path as it is typed into a shell, as an argument that is no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def unwritable(path: Path, error: OSError) -> UserError:
    """The sentence for a place that cannot be written."""
    return UserError(f"cannot write {path} ({error.strerror or error}): choose a writable place with enough room")
