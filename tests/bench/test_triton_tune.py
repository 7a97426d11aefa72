"""Opt-in autotuning, with the interpreter in place of a GPU and a clock that says what the test wants."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from bench import triton_tune
from dskd_fast.backends import triton as triton_fused
from dskd_fast.kernels import configs


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the kernels are not interpreted")
@pytest.mark.usefixtures("interpreter")
def test_the_fastest_blocks_that_run_take_the_tables_place(monkeypatch, capsys):
    """The forward kernel's with the fewest rows; of the gradient's all fail but the first."""
    pair = torch.randn(2, 1, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(configs, "TABLE", copy.deepcopy(configs.TABLE))

    def entry():
        return configs.config(triton_fused.architecture(torch.device("cpu")), "bf16", 64)

    def clock(call):
        call()
        if entry().gradient != before.gradient:
            raise RuntimeError("out of resource: shared memory\nHint: ...")
        return entry().forward.m

    before, forward = entry(), {candidate.forward for candidate in triton_tune._candidates("bf16", 64)}
    with pytest.raises(RuntimeError, match="no blocks for the forward kernel can run here: division by zero"):
        triton_tune.tune(*pair, precision="bf16", clock=lambda call: 1 / 0)
    assert entry() == before
    noted, small = [], before.forward._replace(m=32, n=64)
    besides = [before._replace(forward=small)]
    chosen, trials = triton_tune.tune(*pair, precision="bf16", clock=clock, besides=besides, note=noted.append)
    assert noted == trials
    assert entry() == chosen == before._replace(forward=small)
    assert {trial.blocks for trial in trials if trial.kernel == "forward"} == {*forward, small}
    assert {trial.reason for trial in trials} == {None, "out of resource: shared memory"}
    assert triton_tune.main(["4096x256"]) == 2
    assert "no usable GPU" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the kernels are not interpreted")
@pytest.mark.usefixtures("interpreter")
def test_the_distillation_has_an_entry_of_its_own(monkeypatch):
    student, teacher = torch.randn(2, 1, 64, 3, 1, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(configs, "TABLE", copy.deepcopy(configs.TABLE))
    monkeypatch.setattr(configs, "DISTILLATION", dict(configs.DISTILLATION))
    table = copy.deepcopy(configs.TABLE)
    before = configs.distillation_config(triton_fused.architecture(student.device), "bf16", 64)
    call = {"precision": "bf16", "keys": torch.randn(1, 20, 64)}
    with pytest.raises(RuntimeError, match="no blocks"):
        triton_tune.tune(student, teacher, clock=lambda call: 1 / 0, **call)
    assert configs.distillation_config(triton_fused.architecture(student.device), "bf16", 64) == before
    chosen, _ = triton_tune.tune(student, teacher, clock=lambda call: float(call()[0].sum() > 0), **call)
    assert configs.distillation_config(triton_fused.architecture(student.device), "bf16", 64) == chosen
    assert table == configs.TABLE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("level", ["256x64", "256x4096x64"])
def test_the_command_on_a_gpu(capsys, level):
    assert triton_tune.main([level, "--batch", "2"]) == 0
    assert "Config(forward=" in capsys.readouterr().out
