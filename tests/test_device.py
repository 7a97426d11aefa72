import subprocess
import sys

import pytest
import torch

from dskd_fast.device import has_fast_bf16, numerics, resolve_device
from dskd_fast.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("usable", "name", "expected"), [(False, "auto", "cpu"), (True, "auto", "cuda"), (True, "cpu", "cpu")]
)
def test_auto_takes_the_gpu_if_there_is_one(monkeypatch, usable, name, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    assert resolve_device(name) == torch.device(expected)
    if not usable:
        with pytest.raises(UserError, match="--device cpu or auto"):
            resolve_device("cuda")


@pytest.mark.parametrize(
    ("precision", "matmul", "autocast"),
    [("fp32", "highest", False), ("tf32", "high", False), ("bf16", "highest", True)],
)
def test_each_precision_sets_matrix_products_and_autocast_and_restores_them_after_an_error(precision, matmul, autocast):
    original = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("medium")

    def work():
        with numerics(precision, CPU):
            assert torch.get_float32_matmul_precision() == matmul
            assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
            assert torch.is_autocast_enabled("cpu") == autocast
            product = torch.ones(2, 2) @ torch.ones(2, 2)
            assert product.dtype == (torch.bfloat16 if autocast else torch.float32)
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            work()
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32 is convolutions
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_float32_matmul_precision(original)


def test_fast_bf16_is_what_the_processor_says_and_a_torch_that_cannot_tell_gets_float32(monkeypatch):
    told = (({}, False), ({"avx512": True}, False), ({"avx512_bf16": False}, False), ({"amx_bf16": True}, True))
    for capabilities, expected in told:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert has_fast_bf16(CPU) is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_fast_bf16(CPU) is False


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is on Linux")
def test_freed_memory_is_kept():
    """What a step allocates again costs no page faults; in a process of its own, with no memory that others freed."""
    code = """if True:
        import resource, torch
        from dskd_fast.device import keep_freed_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                torch.zeros(16, 2**20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        faults()
        given_back = faults()
        keep_freed_memory()
        faults()
        assert faults() < given_back / 10
    """
    subprocess.run([sys.executable, "-c", code], check=True)
