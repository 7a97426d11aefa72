"""A training and its run folder: whatever ends it, it goes on as if nothing had happened."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import dskd_fast.training.checkpoints as checkpoints_module
import dskd_fast.training.train as train_module
from dskd_fast.data.layout import open_category
from dskd_fast.errors import TrainingStopped, UserError
from dskd_fast.files import load_tensors, save_tensors
from dskd_fast.runs.folder import load_run
from dskd_fast.runs.options import ADDED_OPTIONS
from dskd_fast.training import trainer as trainer_module
from dskd_fast.training.checkpoints import Checkpoints
from dskd_fast.training.session import ensure_run, resume_run, start_run

KILLED_TRAININGS = Path(__file__).parent / "killed_trainings.py"
N_KILLS = 20
RUN_FILES = ["calibration.json", "config.json", "history.json", "weights.safetensors"]


@pytest.fixture
def category(tmp_path, write_images):
    """Seven images to train on, in two batches of four and of three, and two for validation."""
    write_images(tmp_path / "part" / "train" / "good", 7)
    write_images(tmp_path / "part" / "validation" / "good", 2, seed=1)
    return open_category(tmp_path / "part", None)


@pytest.fixture
def options(tiny_options):
    return tiny_options(epochs=3, augmentation="hflip,rotate=3,brightness=0.1", schedule="cosine")


@pytest.fixture
def always_due(monkeypatch):
    monkeypatch.setattr(Checkpoints, "is_due", lambda self: self.path is not None)


@pytest.fixture
def start(category, options, tmp_path):
    def run(name="run", report=lambda _: None, **different):
        changed = dataclasses.replace(options, **different)
        return start_run(tmp_path / name, category, changed, holdout=0.1, report=report)

    return run


def files(run):
    return sorted(path.name for path in run.iterdir())


def same_result(one, other):
    """Weights and calibration bit by bit, and the losses of all epochs."""
    tensors = [load_tensors(run / "weights.safetensors")[0] for run in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert (one / "calibration.json").read_bytes() == (other / "calibration.json").read_bytes()
    histories = [json.loads((run / "history.json").read_text()) for run in (one, other)]
    for epoch in (*histories[0], *histories[1]):
        assert epoch.pop("images_per_second") > 0
    assert histories[0] == histories[1]


class Killed(Exception):
    """Stands in for a kill: nothing is saved after it."""


def killed_after(n):
    def report(state):
        if state.step == n:
            raise Killed

    return report


# ------------------------------------------------------------------------------------------------------- killed


def test_killed_at_any_instant_a_training_ends_with_the_same_bits(tmp_path, tiny_arguments, data_root, below):
    recipe = [*tiny_arguments, "--epochs", "2", "--schedule", "cosine"]
    arguments = ["--data-root", str(data_root / "screw_bag"), *recipe]
    result = subprocess.run(
        [sys.executable, KILLED_TRAININGS, tmp_path, str(N_KILLS), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    killed = [line for line in lines if line[1] == str(-signal.SIGKILL)]
    assert len(killed) == N_KILLS
    # They were in the midst of it.
    assert sum("checkpoint.safetensors" in line for line in killed) >= N_KILLS / 4
    finished = [tmp_path / line[0] for line in lines if "calibration.json" in line]
    assert finished
    for run in finished:
        same_result(run, tmp_path / "reference")
        assert set(files(run)) - {".dskd_fast.lock", "checkpoint.safetensors"} == set(RUN_FILES)


@pytest.mark.parametrize("step", range(1, 6))
def test_killed_after_any_step_and_resumed_it_ends_with_the_same_bits(start, tmp_path, always_due, step):
    start("reference")
    with pytest.raises(Killed):
        start(report=killed_after(step))
    if step == 1:  # killed before anything was saved
        assert not (tmp_path / "run").exists()
        start()
    else:
        assert files(tmp_path / "run") == ["checkpoint.safetensors", "config.json"]
        resume_run(tmp_path / "run")
    same_result(tmp_path / "run", tmp_path / "reference")


def test_killed_again_and_again(start, tmp_path, always_due):
    start("reference")
    steps = []
    with pytest.raises(Killed):
        start(report=killed_after(2))
    for step in (3, 4, 5, 6):

        def report(state, step=step):
            steps.append(state.step)
            killed_after(step)(state)

        with pytest.raises(Killed):
            resume_run(tmp_path / "run", report=report)
    resume_run(tmp_path / "run", report=lambda state: steps.append(state.step))
    # Each goes on from what the one before had saved, which is the step before it was killed.
    assert steps == [2, 3, 3, 4, 4, 5, 5, 6, 6]
    same_result(tmp_path / "run", tmp_path / "reference")


def test_killed_while_the_finished_run_is_saved(start, tmp_path, always_due, monkeypatch):
    start("reference")
    replace = os.replace

    def killed(temporary, path):
        if Path(path).name == last:
            raise Killed
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", killed)
    for last in ("weights.safetensors", "history.json", "calibration.json"):
        with pytest.raises(Killed):
            start()
        with pytest.raises(UserError, match=r"has not finished: .*dskd-fast train --resume .*run"):
            load_run(tmp_path / "run")
        last = None
        resume_run(tmp_path / "run")
        same_result(tmp_path / "run", tmp_path / "reference")
        shutil.rmtree(tmp_path / "run")


def test_checkpoints_cost_little_time(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: now)

    def slowly(*_):
        nonlocal now
        now += 10

    monkeypatch.setattr(checkpoints_module, "save_tensors", slowly)
    checkpoints = Checkpoints(tmp_path / "checkpoint.safetensors")
    trainer = namedtuple("Trainer", "state")(dict)
    due = []
    for _ in range(1000):
        now += 1
        if checkpoints.is_due():
            due.append(now)
            checkpoints.save(trainer, checkpoints_module.Position([0.0]), torch.Generator())
    # The first after a minute; then, since writing takes ten seconds, every 200.
    assert due == [1060.0, 1270.0, 1480.0, 1690.0, 1900.0]
    assert not Checkpoints(None).is_due()


# ------------------------------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(start, tmp_path, number):
    start("reference")
    before = signal.getsignal(number)

    def report(state):
        if state.step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(TrainingStopped) as caught:
        start(report=report)
    # The signal came after the step's losses were looked at: the next step is the last.
    message = f"stopped after step 4 of 6, in epoch 2, and saved: go on with `dskd-fast train --resume {tmp_path}/run`"
    assert str(caught.value) == message
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    steps = []
    resume_run(tmp_path / "run", report=lambda state: steps.append(state.step))
    assert steps == [5, 6]
    same_result(tmp_path / "run", tmp_path / "reference")


def test_ctrl_c_twice_stops_at_once(start, tmp_path):
    def report(state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start(report=report)
    assert not (tmp_path / "run").exists()


def test_a_signal_that_is_ignored_stays_so(start):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start(report=lambda state: os.kill(os.getpid(), signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_signals_are_left_alone(start):
    failures = []

    def work():
        try:
            start()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_from_the_command_line(cli, cli_error, data_root, tiny_arguments, tmp_path, monkeypatch):
    run = tmp_path / "a run"
    arguments = ["train", "--data-root", data_root / "screw_bag", *tiny_arguments, "--epochs", 3]
    original = train_module.Trainer.step
    steps = []

    def step(*given):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*given)

    monkeypatch.setattr(train_module.Trainer, "step", step)
    code, _, err = cli(*arguments, "--out", run)
    assert code == 130
    go_on = f"go on with `dskd-fast train --resume '{run}'`"
    assert err == f"dskd-fast: stopped after step 4 of 9, in epoch 2, and saved: {go_on}\n"

    assert "--seed belongs to a new training" in cli_error("train", "--resume", run, "--seed", 3)
    assert "--category belongs to a new training" in cli_error("train", "--resume", run, "--category", "screw_bag")
    assert "has not finished" in cli_error("evaluate", run)
    assert "has not finished" in cli_error("info", run)
    assert f"or go on with it by --resume '{run}'" in cli_error(*arguments, "--out", run)

    code, out, err = cli("train", "--resume", run)
    assert (code, err) == (0, "")
    assert f"trained on 12 images, run in {run}" in out
    assert f"next: dskd-fast evaluate '{run}'" in out
    assert len(steps) == 9
    assert files(run) == RUN_FILES
    assert "has finished already" in cli_error("train", "--resume", run)
    assert "is not a run folder" in cli_error("train", "--resume", tmp_path)


# ------------------------------------------------------------------------------------------------- what may change


@pytest.fixture
def stopped(start, tmp_path, always_due):
    """A run that was killed in its second epoch."""
    with pytest.raises(Killed):
        start(report=killed_after(4))
    return tmp_path / "run"


def test_some_options_may_change_and_are_recorded(stopped):
    seen = []
    resume_run(stopped, {"epochs": 4, "batch_size": 2, "lr": 0.001}, report=lambda s: seen.append((s.step, s.steps)))
    _, options, config = load_run(stopped, "cpu")
    assert (options.epochs, options.batch_size, options.lr) == (4, 2, 0.001)
    assert config["changes"] == [{"epochs": 4, "batch_size": 2, "lr": 0.001}]
    # Four images of the second epoch had been seen; the other three take two steps.
    assert seen[0] == (7, 16)
    assert len(seen) == 2 + 2 * 4
    assert len(json.loads((stopped / "history.json").read_text())) == 4


@pytest.mark.parametrize("change", [{"seed": 1}, {"image_size": 128}, {"bits": 12}, {"students": "local"}])
def test_what_the_result_hangs_on_may_not_change(stopped, change):
    (name,) = change
    with pytest.raises(UserError, match=f"^{name} of .* cannot change from"):
        resume_run(stopped, change)
    assert files(stopped) == ["checkpoint.safetensors", "config.json"]


@pytest.mark.parametrize("where", ["train", "validation"])
@pytest.mark.parametrize("replaced", [False, True])
def test_other_images_are_refused(stopped, category, where, replaced):
    folder = category.root / where / "good"
    if replaced:
        content = (folder / "001.png").read_bytes()
        (folder / "001.png").write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    else:
        shutil.copy(folder / "001.png", folder / "999.png")
    with pytest.raises(UserError, match=r"are not those with which .* began \(.*\"train\": 7.* then, "):
        resume_run(stopped)


def test_a_run_of_a_version_that_compared_names_and_sizes_goes_on_and_says_so(stopped, category, start, tmp_path, edit):
    start("reference")
    edit(stopped / "config.json", lambda config: config.update(images=category.names_and_sizes))
    tensors, state = load_tensors(stopped / "checkpoint.safetensors")
    assert state["owner"].startswith(category.fingerprint)
    former = state | {"owner": state["owner"].replace(category.fingerprint, category.names_and_sizes)}
    save_tensors(stopped / "checkpoint.safetensors", tensors, former)
    (category.root / "train" / "good" / "more.gif").touch()
    told = []
    resume_run(stopped, status=told.append)
    assert "recorded names and sizes of the images alone" in told[0]
    assert "not used: 1 image file (formats that are not read): train/good/more.gif" in told
    same_result(stopped, tmp_path / "reference")
    # From here on it is known by its contents.
    config = json.loads((stopped / "config.json").read_text())
    assert config["images"] == category.fingerprint


def test_data_that_moved_are_found_where_they_are_said_to_be(stopped, category, start, tmp_path):
    start("reference")
    shutil.move(category.root, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="say where it is with --data-root"):
        resume_run(stopped)
    resume_run(stopped, data_root=tmp_path / "elsewhere")
    same_result(stopped, tmp_path / "reference")


def test_the_state_of_an_earlier_version_is_gone_on_with(stopped, edit):
    """Options that it does not know are in neither of its files."""
    _, state = load_tensors(stopped / "checkpoint.safetensors")
    assert not any(f'"{name}"' in state["owner"] for name in ADDED_OPTIONS)
    edit(stopped / "config.json", lambda config: [config["options"].pop(n) for n in ADDED_OPTIONS])
    resume_run(stopped)
    assert load_run(stopped, "cpu")[1].bits is None


def test_a_damaged_checkpoint_is_named(stopped):
    path = stopped / "checkpoint.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:1000], b"", whole[:-9] + b"9" + whole[-8:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint\.safetensors is damaged"):
            resume_run(stopped)
        assert path.read_bytes() == content


@pytest.mark.parametrize("different", [{"gccb": 16}, {"seed": 1}])
def test_another_runs_checkpoint_is_refused(stopped, start, tmp_path, different):
    with pytest.raises(Killed):
        start("other", report=killed_after(4), **different)
    shutil.copy(tmp_path / "other" / "checkpoint.safetensors", stopped)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors belongs to another training"):
        resume_run(stopped)


def test_a_checkpoint_of_other_losses_is_refused(stopped, edit):
    edit(stopped / "config.json", lambda config: config["options"].update(global_loss="cosine"))
    with pytest.raises(UserError, match=r"belongs to another training \(its images or its options are others"):
        resume_run(stopped)


def test_an_epoch_that_has_begun_cannot_be_left_out(stopped):
    with pytest.raises(UserError, match="the training is in epoch 2 already: go on with --epochs 2 or more"):
        resume_run(stopped, {"epochs": 1})
    resume_run(stopped, {"epochs": 2})
    assert len(json.loads((stopped / "history.json").read_text())) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(changes=None),
        lambda config: config.update(changes="x"),
        lambda config: config.update(holdout=5),
        lambda config: config.update(holdout=float("nan")),
        lambda config: config.update(holdout="0.1"),
        lambda config: config.pop("holdout"),
    ],
)
def test_an_edited_config_is_told_with_its_file(stopped, change, edit):
    edit(stopped / "config.json", change)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        resume_run(stopped, {"lr": 0.1})
    assert "train again, or restore the file" in str(caught.value)


@pytest.mark.parametrize("state", [None, [], {}, {"owner": "somebody", "at": {}}, {"totals": [], "history": 3}])
def test_a_checkpoint_with_another_state_is_refused(stopped, state):
    tensors, _ = load_tensors(stopped / "checkpoint.safetensors")
    save_tensors(stopped / "checkpoint.safetensors", tensors, state)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors belongs to another training"):
        resume_run(stopped)


# --------------------------------------------------------------------------------------------------- out of luck


class _NanFrom:
    def __init__(self, step):
        self.left = step

    def __call__(self, student, teacher):
        self.left -= 1
        loss = sum(s.square().mean() for s in student)
        return loss * float("nan") if self.left <= 0 else loss


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(start, tmp_path, always_due, monkeypatch):
    monkeypatch.setattr(trainer_module, "make_loss", lambda *_: _NanFrom(4))
    kept = rf"\(the last good state is kept in {tmp_path}/run/checkpoint\.safetensors\)"
    with pytest.raises(UserError, match=rf"no longer finite .* at epoch 2, step 2 {kept}: lower --lr \(now 0\.005\)$"):
        start()
    monkeypatch.undo()
    tensors, state = load_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert len(state["at"]["history"]) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point())
    resume_run(tmp_path / "run", {"lr": 0.0001})
    assert files(tmp_path / "run") == RUN_FILES


def test_weights_that_are_not_finite_are_never_saved(start, tmp_path, always_due):
    """An infinite step leaves a finite loss and weights that are lost."""

    def report(state):
        if state.step == 3:
            raise AssertionError("too late")

    with pytest.raises(UserError, match="features are no longer finite at epoch 1, step 1: lower --lr"):
        start(report=report, lr=1e38)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
)
def test_too_little_memory_names_the_batch_size_to_try(start, monkeypatch, error):
    def step(*_):
        raise error

    monkeypatch.setattr(train_module.Trainer, "step", step)
    with pytest.raises(UserError, match=r"with batches of 4: try --batch-size 2$"):
        start()
    with pytest.raises(UserError, match=r"with batches of 1: try a smaller --image-size$"):
        start(batch_size=1)


def test_compiled_it_trains_to_nearly_the_same(start, tmp_path, monkeypatch):
    """Through all of torch.compile but the C++ compiler, which takes minutes."""
    compiled = []

    def without_compiler(model):
        compiled.append(model)
        return original(model, backend="aot_eager", fullgraph=True)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", without_compiler)
    start("compiled", compile=True, batch_size=7, epochs=2)
    assert len(compiled) == 1
    start("eager", batch_size=7, epochs=2)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("compiled", "eager")]
    for one, other in zip(*histories, strict=True):
        assert one["local_loss"] == pytest.approx(other["local_loss"], rel=0.02)
        assert one["global_loss"] == pytest.approx(other["global_loss"], rel=0.05)


def test_a_compiler_that_is_missing_is_told(start, monkeypatch):
    original = torch.compile

    def failing(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend=failing))
    with pytest.raises(UserError, match=r"torch\.compile cannot compile the training here \(.*no compiler.*leave --co"):
        start(compile=True)


def test_another_error_is_not_taken_for_too_little_memory(start, monkeypatch):
    def step(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(train_module.Trainer, "step", step)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        start()


def test_a_disk_that_fills_up_keeps_the_last_good_state(start, tmp_path, always_due, monkeypatch):
    start("reference")
    original, writes = checkpoints_module.save_tensors, []

    def save(*arguments):
        writes.append(1)
        if len(writes) == 3:
            raise UserError(f"cannot write {arguments[0]} ({os.strerror(errno.ENOSPC)})")
        original(*arguments)

    monkeypatch.setattr(checkpoints_module, "save_tensors", save)
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        start()
    assert files(tmp_path / "run") == ["checkpoint.safetensors", "config.json"]
    resume_run(tmp_path / "run")
    same_result(tmp_path / "run", tmp_path / "reference")


def test_a_disk_without_room_is_told_before_the_training(start, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoints_module.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    monkeypatch.setattr(train_module, "ImageStore", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"needs \d+\.\d\d GiB on the disk of .*run .* 0\.00 GiB are free: make room"):
        start()
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- having a finished run


def test_a_run_is_had_by_starting_going_on_or_finding_it(category, options, start, tmp_path, always_due, edit):
    start("reference")
    run = tmp_path / "run"
    seen = []

    def ensure(report=lambda _: None, **different):
        def counting(state):
            seen.append(state.step)
            report(state)

        changed = dataclasses.replace(options, **different)
        return ensure_run(run, category, changed, holdout=0.1, report=counting)

    with pytest.raises(Killed):
        ensure(killed_after(3))
    assert ensure()
    assert seen == [1, 2, 3, 3, 4, 5, 6]
    same_result(run, tmp_path / "reference")
    before = (run / "weights.safetensors").stat().st_mtime_ns
    assert not ensure()
    assert (run / "weights.safetensors").stat().st_mtime_ns == before
    assert len(seen) == 7
    with pytest.raises(UserError, match=r"holds a run with lr 0\.005, not 0\.1"):
        ensure(lr=0.1)
    edit(run / "config.json", lambda config: config.update(images=category.names_and_sizes))
    assert not ensure()
    (category.root / "train" / "good" / "000.png").unlink()
    with pytest.raises(UserError, match="was trained on other images"):
        ensure_run(run, open_category(category.root, None), options, holdout=0.1)
