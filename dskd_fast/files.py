"""Files that appear under their name only when they are complete, and tensors in them with a checksum."""

import errno
import hashlib
import json
import os
import re
import shlex
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dskd_fast.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

_METADATA, _STATE, _CHECKSUM = "dskd_fast", "state", "sha256"
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that appears under its name only when it is complete; an older one is replaced.

    Args:
        path: the file; its folders are made.
        write: writes it under the name it is given, in the same folder and with the same suffix.

    Raises:
        UserError: it cannot be written; an older file is then still there.
    """
    # Without the stem: a longer name than the file's own could exceed what the file system takes.
    temporary = path.with_name(f".{os.getpid()}{threading.get_native_id():010d}{path.suffix}")
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
    """Text as one line for a terminal, with escapes for what would control it or change the direction of writing.

    These are the control characters (C0, DEL and C1, line breaks included), the line separators and the bidirectional
    controls of Unicode; the escapes are those of JSON. A file's name may hold them.
    """
    return _CONTROLS.sub(lambda found: json.dumps(found[0])[1:-1], str(text))


def in_shell(path: Path) -> str:
    """A path as it is typed into a shell, as an argument that is no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def unwritable(path: Path, error: OSError) -> UserError:
    """The error for a place that cannot be written."""
    return UserError(f"cannot write {path} ({error.strerror or error}): choose a writable place with enough room")


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], state: Any = None) -> None:
    """Write tensors, and a state that JSON can hold, as a safetensors file; atomically.

    Raises:
        UserError: the file cannot be written; an older one is then still there.
    """
    import safetensors.torch

    content = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(state, allow_nan=False)
    # In one entry, since the library writes several in any order: the same tensors are the same bytes.
    metadata = {_METADATA: json.dumps({_STATE: text, _CHECKSUM: _checksum(content, text)}, separators=(",", ":"))}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            safetensors.torch.save_file(content, temporary, metadata)
        except safetensors.SafetensorError as error:
            # The library passes on the system's error number in its message alone.
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number)) from error
        temporary.chmod(mode)  # the library's own files are for their owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # after a power cut a renamed file could otherwise be empty

    write_file(path, write)


def load_tensors(path: Path) -> tuple[dict[str, "Tensor"], Any]:
    """The tensors and the state that `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not such a file, or not as it was written.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from None
    if metadata is None:
        raise UserError(f"{path} is damaged, or was not written by this program: it has no checksum")
    try:
        metadata = json.loads(metadata)
        text, checksum = metadata[_STATE], metadata[_CHECKSUM]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    if checksum != _checksum(tensors, text):
        raise UserError(f"{path} is damaged or was edited: its content does not have the checksum it was written with")
    return tensors, json.loads(text)


def checksum_of(path: Path) -> str:
    """The checksum in a file that `load_tensors` takes."""
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[_METADATA])[_CHECKSUM]


def _checksum(tensors: Mapping[str, "Tensor"], text: str) -> str:
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
