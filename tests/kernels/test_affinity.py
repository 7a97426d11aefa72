"""The kernels over pairs, launched by hand on one block of rows of an image that has very many."""

import math

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from dskd_fast.kernels import affinity  # noqa: E402

N, C, ROWS = 16_384, 64, 64  # in tiles of 256, whose sums add up as those of 65,536 keys do in tiles of 1,024

needs_interpreter = pytest.mark.skipif(
    isinstance(affinity.forward_kernel, triton.runtime.JITFunction),
    reason="the kernels are compiled for the GPU here, not interpreted (TRITON_INTERPRET=1)",
)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("interpreter")]


@pytest.fixture(scope="module")
def image():
    """Unit vectors s and t in float64, the student within a few degrees of the teacher."""
    random = np.random.default_rng(0)
    t = random.standard_normal((N, C)).clip(-0.5)
    s = t + 0.05 * random.standard_normal((N, C))
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))


def truth(s, t, rows, temperature):
    a = t[rows] @ t.T / temperature
    b = s[rows] @ t.T / temperature
    d = (s[rows] - t[rows]) @ t.T / temperature
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (a, b))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    d -= (p * d).sum(1, keepdims=True)
    kl = np.log1p((p * (np.expm1(d) - d)).sum(1))
    return temperature**2 * kl, temperature * (q - p) @ t


@needs_interpreter
@pytest.mark.parametrize(("temperature", "near"), [(1.0, True), (0.1, False)])
def test_a_block_of_rows_among_very_many_keys(image, temperature, near):
    s, t = image
    k = t - t[::65].mean(0)
    mean, delta = t[0] - k[0], s - t
    own_a, own_c = (k * t).sum(1) / temperature / math.log(2), (delta * k).sum(1) / temperature
    # Both forms: c relative to its value for the row's own key, and relative to 0.
    shift, own_c = (own_c, 0 * own_c) if temperature < 0.5 else (0 * own_c, own_c)
    bound = 2 * np.linalg.norm(delta, axis=1) / temperature
    assert (bound[:ROWS].max() <= 1) == near

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))

    operands = [tensor(x) for x in (k, delta, k @ mean / temperature / math.log(2), own_a, shift)]
    operands += [torch.full((N,), 1 / temperature), tensor(bound)]
    kl, raw = torch.full((N,), math.nan), torch.full((N, C), math.nan)
    u, teacher_shift, student_shift, factor = (torch.full((N,), math.nan) for _ in range(4))
    scalars = tensor([temperature, 1 / (temperature * math.log(2)), 0])
    blocks = {"C_PAD": C, "BLOCK_M": ROWS, "BLOCK_N": 256, "BLOCK_C": C, "PRECISION": "fp32", "WITH_FAR": False}

    def launch(kernel, *arguments, **constants):
        kernel[(1,)](*arguments, **blocks, **constants)

    statistics = (u, teacher_shift, student_shift)
    launch(
        affinity.forward_kernel, *operands, tensor(own_c), kl, *statistics, factor, scalars, N, N,
        NEAR=near, WITH_GRADIENT=True,
    )  # fmt: skip
    launch(affinity.gradient_kernel, *operands, *statistics, raw, scalars, N, NEAR=near, CHUNK=C)
    own_weight = tensor(np.expm1(own_c[:ROWS])) - u[:ROWS]
    gradient = (raw[:ROWS] + own_weight[:, None] * operands[0][:ROWS]) * factor[:ROWS, None]

    true_kl, true_gradient = truth(s, t, slice(ROWS), temperature)
    assert np.linalg.norm(kl[:ROWS].numpy() - true_kl) < 2e-5 * np.linalg.norm(true_kl)
    assert np.linalg.norm(gradient.numpy() - true_gradient) < 1e-4 * np.linalg.norm(true_gradient)
    assert kl[ROWS:].isnan().all()  # and nothing else was written
    assert raw[ROWS:].isnan().all()
