import errno
import os

import pytest
import safetensors.torch
import torch

from dskd_fast.errors import UserError
from dskd_fast.tensors import load_tensors, save_tensors

TENSORS = {
    "weight": torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
}
STATE = {"epoch": 3, "loss": 0.1 + 0.2, "name": "größe"}


@pytest.fixture
def path(tmp_path):
    save_tensors(tmp_path / "state.safetensors", TENSORS, STATE)
    return tmp_path / "state.safetensors"


def test_what_is_loaded_is_what_was_saved(path):
    tensors, state = load_tensors(path)
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])


def test_memory_format_is_no_obstacle_and_the_tensors_are_left_alone(tmp_path):
    weight = torch.randn(3, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    save_tensors(tmp_path / "a.safetensors", {"weight": weight})
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(load_tensors(tmp_path / "a.safetensors")[0]["weight"], weight)


def test_the_same_tensors_are_the_same_bytes(path, tmp_path):
    tensors, state = load_tensors(path)
    for _ in range(8):
        save_tensors(tmp_path / "again", tensors, state)
        assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_every_changed_byte_is_noticed(path):
    content = bytearray(path.read_bytes())
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"state\.safetensors is damaged"):
            load_tensors(path)


def test_every_cut_is_noticed(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"state\.safetensors is damaged"):
            load_tensors(path)


def test_a_file_without_checksum_is_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="has no checksum"):
        load_tensors(tmp_path / "a.safetensors")


def test_a_missing_file_is_not_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "a.safetensors")


def test_a_full_disk_is_told_and_keeps_the_older_file(path, below, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: full (os error {errno.ENOSPC})")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=rf"cannot write .*state\.safetensors \({os.strerror(errno.ENOSPC)}\)"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert load_tensors(path)[1] == STATE
    assert below(path.parent) == ["state.safetensors"]


def test_an_unwritable_place_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*a\.safetensors"):
        save_tensors(tmp_path / "file" / "a.safetensors", {"a": torch.zeros(2)})


def test_others_may_read_the_file_as_any_other(path, tmp_path):
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
