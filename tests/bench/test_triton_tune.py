"""Opt-in autotuning, with the interpreter in place of a GPU and a clock that says what the test wants."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dskd_fast.backends import triton_fused, triton_tune
from dskd_fast.kernels import configs


@pytest.fixture
def pair():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the kernels are not interpreted")
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn((1, 64, 3, 3), generator=random) for _ in range(2))


@pytest.fixture(autouse=True)
def _own_table(monkeypatch):
    monkeypatch.setattr(configs, "TABLE", copy.deepcopy(configs.TABLE))


def entry():
    return configs.config(triton_fused.architecture(torch.device("cpu")), "bf16", 64)


def test_the_fastest_blocks_take_the_tables_place(pair):
    """Here those with the fewest rows for the forward kernel, and the last but one tried for the gradient."""
    seen = []

    def clock(call):
        call()
        seen.append(entry())
        return seen[-1].forward.m if len(seen) <= forward_trials else 100 - len(seen) % last_trial

    candidates = list(triton_tune._candidates("bf16", 64))
    forward_trials = len({candidate.forward for candidate in candidates})
    last_trial = forward_trials + len({(candidate.gradient, candidate.chunk) for candidate in candidates})
    before = entry()
    chosen, trials = triton_tune.tune(*pair, precision="bf16", clock=clock)
    assert len(trials) == len(seen) == last_trial > 3
    assert chosen.forward.m == min(candidate.forward.m for candidate in candidates)
    assert (chosen.gradient, chosen.chunk) == (seen[-2].gradient, seen[-2].chunk)
    assert entry() == chosen
    assert before in candidates
    assert all(trial.reason is None and trial.milliseconds > 0 for trial in trials)


def test_what_does_not_run_is_passed_over_with_its_reason(pair):
    first = entry()

    def clock(call):
        if entry() != first and entry().forward == first.forward:
            raise RuntimeError("out of resource: shared memory\nHint: ...")
        return 1.0 if entry().forward == first.forward else 2.0

    chosen, trials = triton_tune.tune(*pair, precision="bf16", clock=clock)
    assert chosen == first
    assert {trial.reason for trial in trials if trial.milliseconds is None} == {"out of resource: shared memory"}


def test_a_failure_leaves_the_table_as_it_was(pair):
    before = entry()

    def clock(call):
        raise RuntimeError("no clock")

    with pytest.raises(RuntimeError, match="no blocks for the forward kernel can run here: no clock"):
        triton_tune.tune(*pair, precision="bf16", clock=clock)
    assert entry() == before
    with pytest.raises(RuntimeError, match="cannot serve these inputs: it does not take float64"):
        triton_tune.tune(*(x.double() for x in pair), clock=clock)


def test_candidates_fit_the_width():
    for precision in ("bf16", "tf32", "ieee"):
        for width in (64, 128, 256, 512, 1024, 1536):
            candidates = list(triton_tune._candidates(precision, width))
            assert candidates
            for candidate in candidates:
                assert width % candidate.forward.c == width % candidate.gradient.c == width % candidate.chunk == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert triton_tune.main(["4096x256"]) == 2
    assert "no usable GPU" in capsys.readouterr().err
    for wrong in ("4096", "0x256", "4096x-1", "axb"):
        with pytest.raises(SystemExit) as error:
            triton_tune.main([wrong])
        assert error.value.code == 2
        assert f"{wrong!r} is not NxC" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_command_on_a_gpu(capsys):
    assert triton_tune.main(["256x64", "--batch", "2"]) == 0
    assert "Config(forward=" in capsys.readouterr().out
