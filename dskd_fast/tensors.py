"""Tensors on disk, with a checksum: what was cut short or changed is not taken for weights."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dskd_fast.errors import UserError
from dskd_fast.files import write_file

_METADATA, _STATE, _CHECKSUM = "dskd_fast", "state", "sha256"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Any = None) -> None:
    """Write tensors, and a state that JSON can hold, as a safetensors file; atomically.

    Raises:
        UserError: the file cannot be written; an older one is then still there.
    """
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
            # Its way to pass on what the system said.
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number)) from error
        temporary.chmod(mode)  # the library's own files are for their owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # after a power cut a renamed file could otherwise be empty

    write_file(path, write)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the state that `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not such a file, or not as it was written.
    """
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


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
