"""Names for a shell. (Writing is tested where run folders are: tests/runs/test_folder.py.)"""

import shlex
from pathlib import Path

import pytest

from dskd_fast.files import in_shell


@pytest.mark.parametrize("name", ["run", "a run", "it's", "größe", "-lead", "--out", "a/-b", "a\nb", "$HOME"])
def test_a_name_for_a_shell_is_one_argument_and_no_option(name):
    [argument] = shlex.split(in_shell(Path(name)))
    assert Path(argument) == Path(name)
    assert not argument.startswith("-")
