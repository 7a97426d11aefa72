"""Training in several processes, on the CPU: all but two tests fork them, since importing PyTorch takes seconds."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import dskd_fast.training.train as train_module
from dskd_fast.cli import main
from dskd_fast.data.layout import open_category
from dskd_fast.errors import UserError
from dskd_fast.files import load_tensors
from dskd_fast.models import DSKD
from dskd_fast.runs.folder import load_run
from dskd_fast.training import distributed
from dskd_fast.training.checkpoints import Checkpoints
from dskd_fast.training.checks import check_same_training
from dskd_fast.training.distributed import ALONE, Group
from dskd_fast.training.trainer import Trainer


@pytest.fixture
def train(tiny_arguments, data_root):
    """The command line of a training into a folder."""

    def arguments(out, *more):
        given = ["train", "--data-root", data_root / "screw_bag", *tiny_arguments, "--out", out, *more]
        return [str(argument) for argument in given]

    return arguments


def step_of(group, options, weights, out):
    """One training step on five fixed images, which cannot be shared equally; in float64."""
    torch.manual_seed(group.rank)  # the first one's weights count
    model = DSKD("test_resnet", image_size=64, gccb=8, teacher_weights=weights)
    trainer = Trainer(model.double().to(memory_format=torch.channels_last), options, group)
    batch = torch.rand(5, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    part = batch[group.share(5)].contiguous(memory_format=torch.channels_last)
    trainer.step(part, group.size * len(part) / 5)
    if group.is_first:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.save(found | {name: x for name, x in model.named_buffers() if "running" in name}, out)


def test_gradients_and_batch_norm_are_those_of_one_process(in_two, tmp_path, tiny_weights, tiny_options):
    def work():
        with distributed.group(torch.device("cpu")) as group:
            step_of(group, tiny_options(), tiny_weights, tmp_path / "two.pt")

    assert in_two(work) == ([0, 0], ["", ""])
    step_of(ALONE, tiny_options(), tiny_weights, tmp_path / "one.pt")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys()
    assert sum("running" not in name for name in one) > 100
    for name in one:
        # In float64: in float32 what rounds differently grows to per cents on its way to the first layers.
        assert (one[name] - two[name]).norm() <= 1e-9 * one[name].norm(), name


@pytest.mark.slow
def test_two_processes_train_what_one_trains(in_two, train, tmp_path, cli, below):
    recipe = ["--lr", "0.0001", "--batch-size", "5"]
    codes, (first, second) = in_two(lambda: main(train(tmp_path / "two", *recipe)))
    assert codes == [0, 0]
    # Only the first of them speaks.
    assert first.count("reading the images") == first.count("next: ") == 1
    assert second == ""
    assert cli(*train(tmp_path / "one", *recipe)).code == 0
    assert below(tmp_path / "two") == below(tmp_path / "one")
    (one,), (two,) = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    for loss in ("local_loss", "global_loss"):
        # Adam divides gradients by their size: what rounds differently near zero moves a weight by up to lr a step.
        assert two[loss] == pytest.approx(one[loss], rel=0.02)
    assert load_run(tmp_path / "two", "cpu")[0].calibration.threshold.n_images == 4


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_signal_to_one_stops_both_and_a_dead_one_leaves_none(in_two, train, tmp_path, cli, monkeypatch, killed):
    original, steps = Trainer.step, []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 4 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL if killed else signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(Trainer, "step", step)
    codes, (first, second) = in_two(lambda: main(train(tmp_path / "run", "--epochs", "9")))
    assert second == ""
    if killed:
        assert codes == [1, -signal.SIGKILL]
        assert "Traceback" not in first
        assert not (tmp_path / "run").exists()
        return
    assert codes == [128 + signal.SIGTERM, 1]
    assert first.count("stopped after step 4 of 27, in epoch 2, and saved: go on with") == 1
    # One process goes on where two stopped.
    assert cli("train", "--resume", tmp_path / "run", "--epochs", 2).code == 0
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 2


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(train, tmp_path):
    """As a terminal does: the signal goes to all of them, and torchrun passes it on once more."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, Path(sys.executable).with_name("dskd-fast"), *train(tmp_path / "run", "--epochs", "5")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as process:
        try:
            assert any(line.startswith("step") for line in process.stdout)
            os.killpg(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode != 0
    assert err.count("go on with `dskd-fast train --resume") == 1
    assert load_tensors(tmp_path / "run" / "checkpoint.safetensors")


@pytest.mark.slow
def test_two_nodes_of_which_one_is_killed_end_with_the_bits_of_one(in_two, train, tmp_path, monkeypatch):
    """Two launchers on this machine, as torchrun is started on two; the reference are two processes of one."""
    original, steps = Trainer.step, []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            for process in (os.getppid(), os.getpid()):
                os.kill(process, signal.SIGKILL)
        return original(*arguments)

    def in_two_nodes(*arguments):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            endpoint = f"localhost:{free.getsockname()[1]}"
        settings = {"rdzv_backend": "c10d", "rdzv_endpoint": endpoint, "run_id": "test", "local_addr": "localhost"}
        settings |= {"max_restarts": 0, "start_method": "fork"}

        def node():
            try:
                elastic_launch(LaunchConfig(2, 2, 1, **settings), lambda: sys.exit(main([*arguments])))()
            except ChildFailedError as error:
                return error.get_first_failure()[1].exitcode

        return dict(sorted(zip(*in_two(node), strict=True)))

    monkeypatch.setattr(Checkpoints, "is_due", lambda self: True)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        ends = in_two_nodes(*train(tmp_path / "two"))
    assert [*ends] == [-signal.SIGKILL, 1]
    assert ends[1].count("dskd-fast: another process of this training does not answer any more") == 1
    assert [*in_two_nodes("train", "--resume", str(tmp_path / "two"))] == [0]
    assert in_two(lambda: main(train(tmp_path / "one")))[0] == [0, 0]
    for name in ("weights.safetensors", "scores.safetensors", "calibration.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


def test_a_machine_without_the_run_folder_is_refused_on_all(in_two, own_run, tmp_path):
    (own_run / "calibration.json").unlink()  # as if its training had not finished

    def work():
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return main(["train", "--resume", str([own_run, tmp_path / "elsewhere"][int(os.environ["RANK"])])])

    codes, (first, second) = in_two(work)
    assert codes == [1, 2]
    assert first == "dskd-fast: another process of this training has ended, and says why on the machine where it ran\n"
    assert second.startswith(f"dskd-fast: process 1 of 2 finds no run in {tmp_path / 'elsewhere'}: have all machines")
    assert (own_run / "config.json").exists()


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ("images", "the images in .* are not those of the training's first process"),
        ("options", "lr is 0.1 here, and 0.005 in the training's first process"),
        ("state", "checkpoint.safetensors is not here what it is for the training's first process"),
    ],
)
def test_machines_that_would_train_different_things_are_refused(data_root, tiny_options, tmp_path, different, message):
    category, checkpoints = open_category(data_root, "screw_bag"), Checkpoints(tmp_path / "checkpoint.safetensors")
    first = {"images": category.fingerprint, "options": tiny_options(), "state": None}
    options = tiny_options(lr=0.1) if different == "options" else tiny_options(device="cuda")
    if different != "options":
        first[different] = "another"

    class Second(Group):
        of_first = staticmethod(lambda _: tuple(first.values()))
        agree = staticmethod(lambda work: work())

    with pytest.raises(UserError, match=message):
        check_same_training(category, options, checkpoints, Second(1, 2))


@pytest.fixture
def all_categories(data_root, tiny_arguments, tmp_path):
    """The command line but for the folder of the runs; the category `bad` has an image that is none."""
    for name in ("a", "bad", "c"):
        shutil.copytree(data_root / "screw_bag", tmp_path / "data" / name)
    (tmp_path / "data" / "bad" / "train" / "good" / "000.png").write_text("no image")
    return ["train", "--data-root", str(tmp_path / "data"), "--all-categories", *tiny_arguments, "--out"]


def test_all_categories_are_trained_but_the_bad_one_alone(all_categories, data_root, tmp_path, cli, cli_error):
    command = [*all_categories, tmp_path / "alone"]
    code, out, err = cli(*command)
    assert code == 2
    assert err.startswith("dskd-fast: bad: ")
    assert err.count("\n") == 1
    assert "c: trained on 12 images" in out
    # Called again, it goes on where it was.
    shutil.copy(data_root / "screw_bag" / "train" / "good" / "000.png", tmp_path / "data" / "bad" / "train" / "good")
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    assert "bad: trained on 12 images" in out
    assert "a: was trained before" in out
    assert "exclude each other" in cli_error(*command, "--category", "a")
    assert "name the folder above it" in cli_error("train", "--data-root", tmp_path / "data" / "a", *command[3:])


@pytest.mark.slow
def test_categories_are_shared_out(in_two, all_categories, tmp_path):
    """What is wrong with one ends neither its own process nor, through torchrun, the other's."""
    codes, (first, second) = in_two(lambda: main([*all_categories, str(tmp_path / "shared")]))
    assert codes == [2, 2]
    assert all(f"{name}: trained on 12 images" in first for name in "ac")
    assert (first + second).count("dskd-fast: ") == second.count("dskd-fast: bad: ") == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [5, 7, 16])
def test_a_batch_is_shared_whole_and_nearly_equally(n, size):
    parts = [list(range(n))[Group(rank, size).share(n)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_process_trains_on_its_share_of_a_batch_with_the_weight_of_it(data_root, tiny_options, monkeypatch):
    """Three images of five count for three fifths of the mean over two processes."""

    class Second(Group):
        add = of_first = staticmethod(lambda values: values)
        agree = staticmethod(lambda work: work())

    steps = []
    monkeypatch.setattr(train_module, "Trainer", lambda model, options, group: Trainer(model, options))
    monkeypatch.setattr(Trainer, "step", lambda self, part, weight, _: steps.append((part, weight)) or torch.zeros(2))
    category = open_category(data_root, "screw_bag")
    for group in (ALONE, Second(0, 2), Second(1, 2)):
        train_module.train(category, tiny_options(batch_size=5), group=group)
    parts, weights = zip(*steps, strict=True)
    for whole, one, other in zip(parts[:3], parts[3:6], parts[6:], strict=True):
        assert torch.equal(torch.cat([one, other]), whole)
    assert weights == (1, 1, 1, 0.8, 0.8, 1, 1.2, 1.2, 1)
