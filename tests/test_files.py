import errno
import os
import shlex
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dskd_fast.errors import UserError
from dskd_fast.files import (
    in_shell,
    is_half_written,
    load_tensors,
    printable,
    require_writable,
    save_tensors,
    write_file,
)

TENSORS = {
    "weight": torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "strided": torch.arange(96.0).view(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
}
STATE = {"epoch": 3, "loss": 0.1 + 0.2, "name": "größe"}


@pytest.fixture
def path(tmp_path):
    save_tensors(tmp_path / "state.safetensors", TENSORS, STATE)
    return tmp_path / "state.safetensors"


def test_a_file_appears_when_it_is_complete_and_replaces_the_older_one(tmp_path, below):
    target = tmp_path / "new folder" / "a.csv"
    for content in ("old", "new"):

        def write(temporary, content=content):
            assert is_half_written(temporary)
            assert (temporary.parent, temporary.suffix) == (target.parent, ".csv")
            temporary.write_text(content)
            assert not target.exists() or target.read_text() == "old"

        write_file(target, write)
        assert target.read_text() == content
    assert below(tmp_path) == ["new folder", "new folder/a.csv"]
    assert not is_half_written(target)
    assert is_half_written(Path(".tmpAb12Cd"))  # safetensors' own
    # Names as long as the file system takes leave no room for a longer one.
    write_file(tmp_path / f"{'n' * 251}.csv", lambda temporary: temporary.touch())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("x"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("fails_in", ["write", "replace"])
def test_a_failed_write_keeps_the_older_file(tmp_path, below, monkeypatch, error, fails_in):
    def fail(*_):
        raise error

    def write(temporary):
        temporary.write_text("half")
        if fails_in == "write":
            fail()

    (tmp_path / "a.csv").write_text("old")
    if fails_in == "replace":
        monkeypatch.setattr(os, "replace", fail)
    raised, message = (UserError, r"cannot write .*a\.csv \(full\)") if type(error) is OSError else (type(error), "")
    with pytest.raises(raised, match=message):
        write_file(tmp_path / "a.csv", write)
    assert (tmp_path / "a.csv").read_text() == "old"
    assert below(tmp_path) == ["a.csv"]


def test_a_place_that_cannot_be_written_is_named_before_and_after_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    require_writable(tmp_path / "new" / "a.csv")
    for place, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.csv", "file is not a folder")):
        with pytest.raises(UserError, match=f"cannot write {place}, because .*{message}"):
            require_writable(place)
        with pytest.raises(UserError, match=f"cannot write {place} "):
            write_file(place, lambda temporary: temporary.touch())
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot write .*a\.csv: choose a writable place"):
        require_writable(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["run", "a run", "it's", "größe", "-lead", "--out", "a/-b", "a\nb", "$HOME"])
def test_a_name_for_a_shell_is_one_argument_and_no_option(name):
    [argument] = shlex.split(in_shell(Path(name)))
    assert Path(argument) == Path(name)
    assert not argument.startswith("-")


def test_what_would_steer_a_terminal_is_escaped():
    assert printable("größe 字 \\") == "größe 字 \\"
    assert printable("a\nb\x1b[31m\x7f\x9b\u2028\u202e\u2066") == r"a\nb\u001b[31m\u007f\u009b\u2028\u202e\u2066"


def test_tensors_are_loaded_as_saved_and_are_the_same_bytes_each_time(path, tmp_path):
    tensors, state = load_tensors(path)
    assert state == STATE
    torch.testing.assert_close(tensors, TENSORS, rtol=0, atol=0)
    assert TENSORS["strided"].is_contiguous(memory_format=torch.channels_last)
    for _ in range(8):
        save_tensors(tmp_path / "again", tensors, state)
        assert (tmp_path / "again").read_bytes() == path.read_bytes()
    # Others may read it as any other file.
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_damage_is_noticed_wherever_it_is(path):
    save_tensors(path, {"a": torch.arange(3.0), "b": torch.tensor([1], dtype=torch.uint8)}, STATE)
    content = path.read_bytes()
    for position in {*range(16), *range(16, len(content), 5), *range(len(content) - 16, len(content))}:
        for rest in (b"", bytes([content[position] ^ 1]) + content[position + 1 :]):
            path.write_bytes(content[:position] + rest)
            with pytest.raises(UserError, match=r"state\.safetensors is damaged"):
                load_tensors(path)


def test_the_librarys_error_for_a_full_disk_is_a_user_error(path, below, monkeypatch):
    def full(*_):
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: full (os error {errno.ENOSPC})")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=rf"cannot write .*state\.safetensors \({os.strerror(errno.ENOSPC)}\)"):
        save_tensors(path, {"a": torch.zeros(2)})
    assert load_tensors(path)[1] == STATE
    assert below(path.parent) == ["state.safetensors"]
