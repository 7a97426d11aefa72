"""Training in several processes: the command line under torchrun, on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import dskd_fast.training.train as train_module
from dskd_fast.data.layout import open_category
from dskd_fast.files import load_tensors
from dskd_fast.runs.folder import load_run
from dskd_fast.training.distributed import ALONE, Group, launched_as
from dskd_fast.training.trainer import Trainer

SCRIPT = Path(sys.executable).with_name("dskd-fast")
GRADIENTS = Path(__file__).parent / "distributed_gradients.py"


def torchrun(*command, **settings):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([*launcher, *map(str, command)], env=environment, **streams, **settings)


def finish(process):
    try:
        return process.communicate(timeout=240)
    finally:
        process.kill()


def wait_for_line(process, start):
    assert any(line.startswith(start) for line in process.stdout)


@pytest.fixture
def train(tiny_arguments, data_root):
    def arguments(out, *more):
        return ["train", "--data-root", data_root / "screw_bag", *tiny_arguments, "--out", out, *more]

    return arguments


def test_gradients_and_batch_norm_are_those_of_one_process(tmp_path, tiny_weights):
    """Of a batch that cannot be shared equally."""
    subprocess.run([sys.executable, GRADIENTS, tiny_weights, tmp_path], check=True, timeout=240)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert one.keys() == two.keys()
    assert sum("running" not in name for name in one) > 100
    for name in one:
        # In float64: in float32 what rounds differently grows to per cents on its way to the first layers.
        assert (one[name] - two[name]).norm() <= 1e-9 * one[name].norm(), name


def test_two_processes_train_what_one_trains(train, tmp_path, cli, below):
    recipe = ["--epochs", "2", "--lr", "0.0001", "--batch-size", "5"]
    process = torchrun(*train(tmp_path / "two", *recipe))
    out, err = finish(process)
    assert process.returncode == 0, err
    # Only the first of them speaks.
    assert out.count("reading the images") == out.count("next: ") == 1
    assert cli(*train(tmp_path / "one", *recipe)).code == 0
    assert below(tmp_path / "two") == below(tmp_path / "one")
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    assert len(histories[0]) == len(histories[1]) == 2
    for one, two in zip(*histories, strict=True):
        for loss in ("local_loss", "global_loss"):
            # Adam divides gradients by their size: what rounds differently near zero moves a weight by up to lr a step.
            assert two[loss] == pytest.approx(one[loss], rel=0.02)
    assert load_run(tmp_path / "two", "cpu")[0].calibration.threshold.n_images == 4


@pytest.mark.slow
def test_an_interrupted_group_saves_and_goes_on(train, tmp_path, cli):
    process = torchrun(*train(tmp_path / "run", "--epochs", "100"), start_new_session=True)
    try:
        wait_for_line(process, "step")
        # As a terminal does: the signal goes to all of them.
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert err.count("go on with `dskd-fast train --resume") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.safetensors", "config.json"]
    done = len(load_tensors(tmp_path / "run" / "checkpoint.safetensors")[1]["at"]["history"])
    # One process goes on where two stopped.
    assert cli("train", "--resume", tmp_path / "run", "--epochs", done + 1).code == 0
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == done + 1


@pytest.mark.slow
def test_a_dead_worker_ends_the_training(train, tmp_path):
    process = torchrun(*train(tmp_path / "run", "--epochs", "1000000"))
    try:
        wait_for_line(process, "reading")
        workers = psutil.Process(process.pid).children()
        next(worker for worker in workers if worker.environ()["RANK"] == "1").kill()
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []


@pytest.mark.slow
def test_an_error_of_all_is_one_message(train, tmp_path):
    process = torchrun(*train(tmp_path / "run", "--batch-size", "11"))
    _, err = finish(process)
    assert process.returncode != 0
    assert err.count("12 training images in batches of 11 leave a last batch of 1 for 2 processes") == 1
    assert "cli/main.py" not in err  # torchrun has a traceback of its own
    assert not (tmp_path / "run").exists()


@pytest.fixture
def all_categories(data_root, tiny_arguments, tmp_path):
    """The command line but for the folder of the runs; the category `bad` has an image that is none."""
    for name in ("a", "bad", "c"):
        shutil.copytree(data_root / "screw_bag", tmp_path / "data" / name)
    (tmp_path / "data" / "bad" / "train" / "good" / "000.png").write_text("no image")
    return ["train", "--data-root", tmp_path / "data", "--all-categories", *tiny_arguments, "--out"]


@pytest.mark.slow
def test_all_categories_are_shared_out(all_categories, tmp_path, cli, below):
    """One that is bad ends neither its own process nor, through torchrun, the other's."""
    process = torchrun(*all_categories, tmp_path / "shared")
    out, err = finish(process)
    assert process.returncode != 0
    assert err.count("dskd-fast: ") == err.count("dskd-fast: bad: ") == 1
    assert cli(*all_categories, tmp_path / "alone").code == 2
    assert below(tmp_path / "shared") == below(tmp_path / "alone")
    for name in ("a", "c"):
        assert f"{name}: trained on 12 images" in out, err
        shared, alone = ((tmp_path / run / name / "weights.safetensors").read_bytes() for run in ("shared", "alone"))
        assert shared == alone


def test_all_categories_one_after_the_other_go_on_where_they_were(all_categories, data_root, tmp_path, cli, cli_error):
    command = [*all_categories, tmp_path / "all"]
    code, out, err = cli(*command)
    assert code == 2
    # What is wrong with one category does not stop the others.
    assert err.startswith("dskd-fast: bad: ")
    assert err.count("\n") == 1
    assert "c: trained on 12 images" in out
    shutil.copy(data_root / "screw_bag" / "train" / "good" / "000.png", tmp_path / "data" / "bad" / "train" / "good")
    code, out, err = cli(*command)
    assert (code, err) == (0, "")
    assert "bad: trained on 12 images" in out
    assert "a: was trained before" in out
    assert "exclude each other" in cli_error(*command, "--category", "a")
    assert "name the folder above it" in cli_error("train", "--data-root", tmp_path / "data" / "a", *command[3:])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [5, 7, 16])
def test_a_batch_is_shared_whole_and_nearly_equally(n, size):
    parts = [list(range(n))[Group(rank, size).share(n)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_without_torchrun_a_process_is_alone(monkeypatch):
    monkeypatch.setenv("RANK", "3")  # of some other launcher
    assert launched_as() == (0, 1)
    assert ALONE.is_first
    assert ALONE.of_first("mine") == "mine"
    assert ALONE.agree(lambda: 5) == 5


def test_each_process_trains_on_its_share_of_a_batch_with_the_weight_of_it(data_root, tiny_options, monkeypatch):
    """Three images of five count for three fifths of the mean over two processes."""

    class Second(Group):
        add = staticmethod(lambda values: values)
        agree = staticmethod(lambda work: work())

    steps = []
    monkeypatch.setattr(train_module, "Trainer", lambda model, options, group: Trainer(model, options))
    monkeypatch.setattr(Trainer, "step", lambda self, part, weight: steps.append((part, weight)) or torch.zeros(2))
    category = open_category(data_root, "screw_bag")
    for group in (ALONE, Second(0, 2), Second(1, 2)):
        train_module.train(category, tiny_options(batch_size=5), group=group)
    whole, first, second = steps[:3], steps[3:6], steps[6:]
    for one, other, batch in zip(first, second, whole, strict=True):
        assert torch.equal(torch.cat([one[0], other[0]]), batch[0])
    assert [weight for _, weight in steps] == [1, 1, 1, 0.8, 0.8, 1, 1.2, 1.2, 1]
