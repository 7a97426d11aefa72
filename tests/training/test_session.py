"""A training and its run folder: whatever ends it, it goes on as if nothing had happened."""

import dataclasses
import json
import math
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import dskd_fast.training.checkpoints as checkpoints_module
import dskd_fast.training.train as train_module
from dskd_fast.data.layout import open_category
from dskd_fast.errors import TrainingStopped, UserError
from dskd_fast.files import load_tensors, save_tensors
from dskd_fast.runs.folder import load_run
from dskd_fast.runs.options import ADDED_OPTIONS
from dskd_fast.training import recipe
from dskd_fast.training.checkpoints import Checkpoints
from dskd_fast.training.session import ensure_run, resume_run, start_run

RUN_FILES = ["calibration.json", "config.json", "history.json", "scores.safetensors", "weights.safetensors"]


@pytest.fixture(scope="module")
def category(tmp_path_factory, write_images):
    """Seven images to train on, in two batches of four and of three, and two for validation. Read only."""
    root = tmp_path_factory.mktemp("data") / "part"
    write_images(root / "train" / "good", 7)
    write_images(root / "validation" / "good", 2, seed=1)
    return open_category(root, None)


@pytest.fixture
def own_data(category, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(category.root, tmp_path / "part")


@pytest.fixture(scope="module")
def options(tiny_options):
    return tiny_options(epochs=3, augmentation="hflip,rotate=3,brightness=0.1", schedule="cosine")


@pytest.fixture
def always_due(monkeypatch):
    monkeypatch.setattr(Checkpoints, "is_due", lambda self: self.path is not None)


@pytest.fixture
def start(category, options, tmp_path):
    def run(report=lambda _: None, name="run", **different):
        changed = dataclasses.replace(options, **different)
        return start_run(tmp_path / name, category, changed, holdout=0.1, report=report)

    return run


@pytest.fixture(scope="module")
def reference(category, options, tmp_path_factory):
    """The run of a training that nothing interrupts. Read only."""
    run = tmp_path_factory.mktemp("reference") / "run"
    start_run(run, category, options, holdout=0.1)
    return run


@pytest.fixture(scope="module")
def stopped_once(category, options, tmp_path_factory):
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "is_due", lambda self: True)
        with pytest.raises(Killed):
            start_run(run, category, options, holdout=0.1, report=killed_after(4))
    return run


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that was killed in its second epoch, saved after the first step of that."""
    return shutil.copytree(stopped_once, tmp_path / "run")


def files(run):
    return sorted(path.name for path in run.iterdir())


def same_result(one, other):
    """Weights and calibration bit by bit, and the losses of all epochs."""
    for name in ("weights.safetensors", "scores.safetensors", "calibration.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
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


@pytest.mark.slow
def test_killed_at_any_file_it_ends_with_the_same_bits(category, options, tmp_path, fork, always_due, reference):
    run, steps = tmp_path / "run", tmp_path / "steps"

    def report(state):
        with steps.open("a") as file:
            file.write(f"{state.step} ")

    def train(name, times):
        replace = os.replace

        def killed(temporary, path):
            nonlocal times
            times -= Path(path).name == name
            if times == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(temporary, path)

        os.replace = killed
        ensure_run(run, category, options, holdout=0.1, report=report)

    # The files at whose writing a training is killed, one after the other, and which time that is.
    kills = {"config.json": (1,), "checkpoint.safetensors": (1, 5)}
    kills |= dict.fromkeys(("weights.safetensors", "scores.safetensors", "calibration.json"), (1,))
    for name, all_times in kills.items():
        for times in all_times:
            assert fork(lambda name=name, times=times: train(name, times))() == -signal.SIGKILL
    with pytest.raises(UserError, match=r"has not finished: .*dskd-fast train --resume .*run"):
        load_run(run)
    resume_run(run)
    same_result(run, reference)
    assert files(run) == RUN_FILES
    # Each goes on from what the one before had saved.
    assert steps.read_text().split() == ["1", "1", "2", "3", "4", "5", "5", "6"]


def test_checkpoints_cost_little_time(tmp_path, monkeypatch):
    now, due = 1000.0, []
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: now)

    def slowly(*_):
        nonlocal now
        now += 10

    monkeypatch.setattr(checkpoints_module, "save_tensors", slowly)
    checkpoints, trainer = Checkpoints(tmp_path / "checkpoint.safetensors"), SimpleNamespace(state=dict)
    for _ in range(1000):
        now += 1
        if checkpoints.is_due():
            due.append(now)
            checkpoints.save(trainer, checkpoints_module.Position([0.0]), torch.Generator())
    # The first after a minute; then, since writing takes ten seconds, every 200.
    assert due == [1060.0, 1270.0, 1480.0, 1690.0, 1900.0]
    assert not Checkpoints(None).is_due()


def test_a_signal_saves_and_says_how_to_go_on(start, tmp_path, reference):
    before = signal.getsignal(signal.SIGTERM)

    def report(state):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped) as caught:
        start(report)
    # The signal came after the step's losses were looked at: the next step is the last.
    message = f"stopped after step 4 of 6, in epoch 2, and saved: go on with `dskd-fast train --resume {tmp_path}/run`"
    assert str(caught.value) == message
    assert caught.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    steps = []
    resume_run(tmp_path / "run", report=lambda state: steps.append(state.step))
    assert steps == [5, 6]
    same_result(tmp_path / "run", reference)
    (tmp_path / "run" / "checkpoint.safetensors").touch()  # as from one killed at last
    with pytest.raises(UserError, match="has finished already"):
        resume_run(tmp_path / "run")
    assert files(tmp_path / "run") == RUN_FILES


def test_ctrl_c_twice_stops_at_once_unless_it_is_ignored(start, tmp_path):
    def report(_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        start(report)
    assert not (tmp_path / "run").exists()
    # In another thread no signal can be heeded.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(start, name="other", epochs=1).result()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start(report, epochs=1)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_from_the_command_line(cli, cli_error, category, tiny_arguments, tmp_path, monkeypatch):
    run = tmp_path / "a run"
    arguments = ["train", "--data-root", category.root, *tiny_arguments, "--out", run]
    with monkeypatch.context() as patch:
        step = train_module.Trainer.step
        patch.setattr(train_module.Trainer, "step", lambda *x: signal.raise_signal(signal.SIGINT) or step(*x))
        code, _, err = cli(*arguments)
    assert code == 130
    go_on = f"go on with `dskd-fast train --resume '{run}'`"
    assert err == f"dskd-fast: stopped after step 1 of 2, in epoch 1, and saved: {go_on}\n"
    assert "--seed belongs to a new training" in cli_error("train", "--resume", run, "--seed", 3)
    for command in ("evaluate", "info"):
        assert "has not finished" in cli_error(command, run)
    assert f"or go on with it by --resume '{run}'" in cli_error(*arguments)
    code, out, err = cli("train", "--resume", run)
    assert (code, err) == (0, "")
    assert f"trained on 7 images, run in {run}" in out
    assert f"next: dskd-fast predict '{run}'" in out
    assert files(run) == RUN_FILES
    assert "is not a run folder" in cli_error("train", "--resume", tmp_path)


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


def test_what_decides_the_result_may_not_change(stopped):
    for change in ({"seed": 1}, {"image_size": 128}, {"bits": 12}, {"students": "local"}):
        with pytest.raises(UserError, match=f"^{next(iter(change))} of .* cannot change from"):
            resume_run(stopped, change)
    with pytest.raises(UserError, match="the training is in epoch 2 already: go on with --epochs 2 or more"):
        resume_run(stopped, {"epochs": 1})
    assert files(stopped) == ["checkpoint.safetensors", "config.json"]


def test_other_images_are_refused(stopped, own_data):
    def refused():
        with pytest.raises(UserError, match=r"are not those with which .* began \(.*\"train\": 7.* then, "):
            resume_run(stopped, data_root=own_data)

    image, more = own_data / "train" / "good" / "001.png", own_data / "validation" / "good" / "999.png"
    shutil.copy(image, more)
    refused()
    more.unlink()
    content = bytearray(image.read_bytes())
    content[-20] ^= 1
    image.write_bytes(content)
    refused()


def test_a_run_of_a_version_that_compared_names_and_sizes(stopped, category, own_data, reference, edit, caplog):
    """Whose data have moved, and in neither of whose files are the options that came later."""
    gone = str(own_data.parent / "gone")
    edit(stopped / "config.json", lambda config: config.update(images=category.names_and_sizes, data_root=gone))
    edit(stopped / "config.json", lambda config: [config["options"].pop(name) for name in ADDED_OPTIONS])
    tensors, state = load_tensors(stopped / "checkpoint.safetensors")
    assert state["owner"].startswith(category.fingerprint)
    owner = state["owner"].replace(', "scoring": "calibrated"', "")  # there was only the paper's
    assert not any(f'"{name}"' in owner for name in ADDED_OPTIONS)
    former = state | {"owner": owner.replace(category.fingerprint, category.names_and_sizes)}
    save_tensors(stopped / "checkpoint.safetensors", tensors, former)
    (own_data / "train" / "good" / "more.gif").touch()
    with pytest.raises(UserError, match="say where it is with --data-root"):
        resume_run(stopped)
    resume_run(stopped, data_root=own_data)
    assert "recorded names and sizes of the images alone" in caplog.messages[0]
    assert "not used: 1 image file (formats that are not read): train/good/more.gif" in caplog.messages
    assert (stopped / "weights.safetensors").read_bytes() == (reference / "weights.safetensors").read_bytes()
    # From here on it is known by its contents.
    assert json.loads((stopped / "config.json").read_text())["images"] == category.fingerprint
    detector, options, _ = load_run(stopped, "cpu")
    assert options.bits is detector.calibrated is None


def test_a_checkpoint_that_is_damaged_or_of_another_training_is_refused(stopped, edit):
    path, config = stopped / "checkpoint.safetensors", (stopped / "config.json").read_bytes()
    for different in ({"gccb": 16}, {"seed": 1}):
        edit(stopped / "config.json", lambda content, different=different: content["options"].update(different))
        with pytest.raises(UserError, match=r"belongs to another training \(its images or its options are others"):
            resume_run(stopped)
    (stopped / "config.json").write_bytes(config)
    tensors, state = load_tensors(path)
    for other in (None, state | {"at": {}}):
        save_tensors(path, tensors, other)
        with pytest.raises(UserError, match=r"checkpoint\.safetensors belongs to another training"):
            resume_run(stopped)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is damaged .*: restore it, or train again"):
        resume_run(stopped)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(start, tmp_path, always_due, monkeypatch):
    left = iter([1.0] * 6)  # of both losses

    def loss(student, teacher):
        return next(left, math.nan) * sum(s.square().mean() for s in student)

    monkeypatch.setattr(recipe, "make_loss", lambda *_: loss)
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
    with pytest.raises(UserError, match="features are no longer finite at epoch 1, step 1: lower --lr"):
        start(killed_after(3), lr=1e38)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "raised", "batch_size", "message"),
    [
        (MemoryError(), UserError, 1, r"with batches of 1: try a smaller --image-size$"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), UserError, 4, r"of 4: try --batch-size 2$"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried x"), UserError, 3, r"of 3: try --batch-size 1$"),
        (RuntimeError("shapes do not fit"), RuntimeError, 4, "shapes do not fit"),
    ],
)
def test_too_little_memory_names_the_batch_size_to_try(start, monkeypatch, error, raised, batch_size, message):
    monkeypatch.setattr(train_module.Trainer, "step", Mock(side_effect=error))
    with pytest.raises(raised, match=message):
        start(batch_size=batch_size)


@pytest.mark.slow
def test_it_may_be_compiled_and_a_compiler_that_is_missing_is_named(start, tmp_path, monkeypatch):
    """Without the C++ compiler, which takes minutes: the result is then the same to the bit."""
    original, compiled = torch.compile, []

    def traced(model):
        compiled.append(model)
        return original(model, backend="eager", fullgraph=True)

    def failing(*_):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", traced)
    for name in ("compiled", "eager"):
        start(name=name, compile=name == "compiled", batch_size=7, epochs=1)
        assert len(compiled) == 2  # the teacher apart from the students
    same_result(tmp_path / "compiled", tmp_path / "eager")
    monkeypatch.setattr(torch, "compile", lambda _: original(lambda batch: batch.sin(), backend=failing))
    with pytest.raises(UserError, match=r"torch\.compile cannot compile the training here \(.*no compiler.*leave --co"):
        start(compile=True)


def test_a_disk_without_room_is_named_before_the_training(start, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    monkeypatch.setattr(train_module, "ImageStore", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"needs \d+\.\d\d GiB on the disk of .*run .* 0\.00 GiB are free: make room"):
        start()
    assert not (tmp_path / "run").exists()


def test_a_run_is_had_by_going_on_or_finding_it(stopped, category, own_data, options, reference, edit):
    def ensure(category=category, **different):
        return ensure_run(stopped, category, dataclasses.replace(options, **different), holdout=0.1)

    assert ensure()
    same_result(stopped, reference)
    before = (stopped / "weights.safetensors").stat().st_mtime_ns
    assert not ensure()
    with pytest.raises(UserError, match=r"holds a run with lr 0\.005, not 0\.1"):
        ensure(lr=0.1)
    edit(stopped / "config.json", lambda config: config.update(images=category.names_and_sizes))
    assert not ensure()
    assert (stopped / "weights.safetensors").stat().st_mtime_ns == before
    (own_data / "train" / "good" / "000.png").unlink()
    with pytest.raises(UserError, match="was trained on other images"):
        ensure(open_category(own_data, None))
