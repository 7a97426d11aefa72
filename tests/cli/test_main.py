import dataclasses
import os
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest.mock import Mock

import pytest

import dskd_fast
import dskd_fast.cli.commands as commands
from dskd_fast.choices import DATA_ROOT_VARIABLE, HOLDOUT, MAX_PIXELS
from dskd_fast.cli import main
from dskd_fast.data.layout import default_data_root
from dskd_fast.errors import UserError
from dskd_fast.runs.options import TrainingOptions

COMMANDS = "train evaluate evaluate-maps predict watch serve recalibrate export report info reproduce doctor demo"


def process(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"], ["predict"]])
def test_help_version_and_a_usage_error_import_nothing_heavy(arguments):
    code = "import sys\nfrom dskd_fast.cli import main\ntry:\n    main(sys.argv[1:])\n"
    code += "finally:\n    print(*sys.modules, file=sys.stderr)"
    found = {*process(sys.executable, "-c", code, *arguments).stderr.splitlines()[-1].split()}
    assert "dskd_fast.cli.parser" in found
    assert {"torch", "numpy", "timm", "rich", "scipy", "PIL", "dskd_fast.cli.commands"} & found == set()


@pytest.mark.parametrize(
    ("given", "count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "0"}, "0"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_of_openmp_share_the_cores_unless_the_user_says_how_they_wait(monkeypatch, given, count):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, given.get(name, ""))  # so that it is as before afterwards
        if name not in given:
            monkeypatch.delenv(name)
    found = []
    # What imports torch.
    monkeypatch.setattr(sys.modules["dskd_fast.cli.main"], "_run", lambda _: found.append(os.getenv("GOMP_SPINCOUNT")))
    main(["doctor"])
    assert found == [count]


def test_the_installed_command_starts_and_a_user_error_is_one_sentence_and_code_2(tmp_path, monkeypatch, capsys):
    version = process(Path(sysconfig.get_path("scripts"), "dskd-fast"), "--version")
    assert (version.returncode, version.stdout, version.stderr) == (0, f"dskd-fast {dskd_fast.__version__}\n", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dskd-fast", "train"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dskd_fast", run_name="__main__")
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("dskd-fast: the data root mvtec_loco_anomaly_detection does not exist; ")
    for way_out in ("CC BY-NC-SA 4.0", "--data-root", "$DSKD_FAST_DATA", "demo"):
        assert way_out in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_can_be_done(cli):
    for arguments in (["--help"], *([name, "--help"] for name in COMMANDS.split())):
        code, out, err = cli(*arguments)
        assert (code, err) == (0, ""), arguments
        assert out.startswith("usage: dskd-fast")
        assert out.count("\n") > 6
    assert all(f"\n    {name}" in cli("--help").out for name in COMMANDS.split())


def test_help_names_the_real_defaults(cli):
    text = "".join(cli("train", "--help").out.split()).partition("data:")[2]
    for field in dataclasses.fields(TrainingOptions):
        if field.default is None or field.type is bool or field.name == "augmentation":
            continue
        option = "--" + field.name.replace("_", "-")
        shown = re.search(rf"{option}(?:[A-Z]+|{{.*?}}).*?\(default:(.*?)\)", text)[1]
        assert type(field.default)(shown) == field.default, option
    for default in (f"(default:{HOLDOUT})", f"(default:{MAX_PIXELS // 10**6}million)"):
        assert default in text
    assert f"(default:${DATA_ROOT_VARIABLE},else./{default_data_root()})" in text


BAD_VALUES = """
    --epochs=0 --epochs=1.5 --epochs=many --epochs= --lr=0 --lr=-0.1 --lr=nan --lr=inf --lr=1e999 --seed=-1 --bits=8
    --bits=17 --temperature=0 --temperature=101 --temperature=nan --holdout=1 --holdout=-0.1 --holdout=nan --gccb=-1
    --image-size=256x256 --batch-size=0 --sigma=0 --precision=fp16 --device=gpu --local-loss=l2 --stage4-init=zeros
    --schedule=step
"""


def test_bad_option_values_are_named_before_anything_happens(cli, monkeypatch):
    monkeypatch.setattr(commands, "train", lambda _: pytest.fail("too late"))
    for given in (*BAD_VALUES.split(), f"--seed={2**63}", f"--epochs={'9' * 5000}"):
        code, out, err = cli("train", given)
        assert (code, out) == (2, ""), given
        assert err.splitlines()[-1].startswith(f"dskd-fast train: error: argument {given.partition('=')[0]}: ")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("the cable is loose: push it in"), 2, "the cable is loose: push it in"),
        (KeyboardInterrupt(), 130, "interrupted; no file was left half written"),
        (MemoryError(), 2, "out of memory (no details): lower --batch-size or --image-size"),
        (RuntimeError("CUDA out of memory.\nTried"), 2, "out of memory (CUDA out of memory.): lower --batch-size or "),
        (PermissionError(13, "Permission denied", "b.json"), 2, "b.json cannot be used: Permission denied"),
        (OSError("odd"), 2, "the system cannot be used: odd"),
    ],
)
def test_errors_become_one_line_and_a_code(cli, monkeypatch, error, code, message):
    monkeypatch.setattr(commands, "info", Mock(side_effect=error))
    found, _, err = cli("info", "run")
    assert (found, err.count("\n")) == (code, 1)
    assert err.startswith(f"dskd-fast: {message}")


@pytest.mark.parametrize("command", [["evaluate", "run"], ["predict", "run", "."], ["reproduce", "loco"], ["demo"]])
def test_torchrun_is_for_training_alone_and_one_process_says_so(cli, cli_error, monkeypatch, command):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    assert cli_error(*command) == f"dskd-fast: {command[0]} is one process: call it without torchrun\n"
    monkeypatch.setenv("RANK", "1")
    assert cli(*command) == (1, "", "")


@pytest.mark.parametrize("arguments", [("info", "a\n\x1b[2J\u202e.png"), ("info", "run", "--\n\x1b[2J\u202e.png")])
def test_names_in_errors_do_not_steer_the_terminal(cli, arguments):
    code, _, err = cli(*arguments)
    assert code == 2
    assert r"\n\u001b[2J\u202e.png" in err
    assert not {"\x1b", "\u202e"} & set(err)
