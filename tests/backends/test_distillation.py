"""What every backend has to satisfy of the distillation against any keys, on every device it runs on."""

import math

import numpy as np
import pytest
import torch

from dskd_fast.backends.common import PreparedKeys

pytestmark = pytest.mark.filterwarnings(r"ignore::RuntimeWarning:triton\.runtime\.interpreter")

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PROMISED = {"fp32": (2e-5, 1e-4), "tf32": (3e-4, 1e-3), "fp16": (3e-4, 1e-3), "bf16": (2e-3, 5e-3)}


def temperatures(student, teacher=None):
    return {"student_temperature": student, "teacher_temperature": student if teacher is None else teacher}


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Rows, keys, channels; T_s, T_t; precision; noise; kind of features.
CASES = [
    ((1, 1, 3), (1, 1), "fp32", 1, "normal"),
    ((2, 129, 1), (0.1, 0.1), "tf32", 0.1, "rectified"),
    ((65, 63, 17), (0.07, 0.01), "bf16", 1, "normal"),
    ((17, 1000, 48), (0.1, 0.04), "fp16", 0.1, "clustered"),
    ((70, 130, 65), (1 / 32, 1 / 32), "fp32", 0.01, "normal"),
    ((63, 257, 130), (0.005, 0.005), "fp32", 0.1, "rectified"),
    ((15, 300, 300), (4, 4), "bf16", 0.01, "rectified"),
    ((130, 15, 40), (100, 0.02), "fp16", 30, "normal"),
    ((33, 600, 64), (0.02, 0.005), "tf32", 1, "clustered"),
]


@pytest.mark.parametrize(("size", "t", "precision", "noise", "kind"), CASES)
@pytest.mark.parametrize("normalize", [True, False])
def test_error_is_no_more_than_rounding_makes_it(
    backend, keys_truth, make_features, size, t, precision, noise, kind, normalize
):
    n, k, c = size
    student, teacher = make_features(n, c, noise, kind)
    keys = make_features(k, c, 0, kind, seed=1)[1]
    if not normalize:  # logits up to about 100, of vectors as long as they come
        length = math.sqrt(min(t) * 100) / c**0.5
        student, teacher, keys = (x * length for x in (student, teacher, keys))
    call = (student, teacher, keys)
    options = {**temperatures(*t), "normalize": normalize}
    result = backend.distillation(*call, precision=precision, **options)
    keys_truth.check(result, keys_truth(*call, **options), keys_truth.limits(*call, precision=precision, **options))


@pytest.mark.parametrize(
    ("t", "noise", "precision"), [((1, 1), 1, "bf16"), ((0.1, 0.1), 0.01, "bf16"), ((0.1, 0.1), 0.1, "fp32"),
                                  ((0.2, 0.1), 0.1, "fp16"), ((1, 1), 0.01, "tf32")],
)  # fmt: skip
def test_errors_at_a_real_size(backend, keys_truth, make_features, request, t, noise, precision):
    if backend.is_interpreted:
        request.getfixturevalue("set_tiles")(128, 128)
    student, teacher = make_features(300, 128, noise)
    keys = make_features(1500, 128, 0, seed=1)[1]
    exact = keys_truth(student, teacher, keys, **temperatures(*t))
    result = backend.distillation(student, teacher, keys, precision=precision, **temperatures(*t))
    for got, true, promised in zip(result, exact, PROMISED[precision], strict=True):
        assert np.linalg.norm(got.double().numpy() - true) <= promised * np.linalg.norm(true)


@pytest.mark.parametrize(("precision", "kind", "noise"), [("bf16", "normal", 0.1), ("bf16", "clustered", 0.01),
                                                          ("fp16", "normal", 0.01)])  # fmt: skip
def test_keys_that_all_but_repeat_the_rows(backend, keys_truth, make_features, request, precision, kind, noise):
    """Each row's weight lies on one key: its logits' roundings do not average, and 1.5 and 3 of them are promised."""
    if backend.is_interpreted:
        request.getfixturevalue("set_tiles")(128, 128)
    student, teacher = make_features(128, 64, noise, kind)
    near = teacher + 0.1 * teacher.square().mean().sqrt() * normal(1, 128, 64, seed=2)
    call = student, teacher, torch.cat((near, make_features(1000, 64, 0, kind, seed=1)[1]), 1)
    exact = keys_truth(*call, **temperatures(0.1))
    result = backend.distillation(*call, precision=precision, **temperatures(0.1))
    keys_truth.check(result, exact, keys_truth.limits(*call, precision=precision, **temperatures(0.1)))
    roundoff = {"bf16": 2.0**-8, "fp16": 2.0**-11}[precision]
    for got, true, promised in zip(result, exact, (1.5 * roundoff, 3 * roundoff), strict=True):
        assert np.linalg.norm(got.double().numpy() - true) <= promised * np.linalg.norm(true)


@pytest.mark.parametrize("k", range(4))
def test_masks_leave_out_keys_and_rows(backend, keys_truth, make_features, k):
    """Of keys: a few in the middle, whole tiles at the beginning, all but one, all."""
    student, teacher = make_features(40, 20, 0.3, "normal", batch=4)
    keys = make_features(300, 20, 0, "normal", batch=4, seed=1)[1]
    key_mask = torch.ones(4, 300, dtype=torch.bool)
    key_mask[0, 100:190] = False
    key_mask[1, :270] = False
    key_mask[2] = torch.arange(300) == 150
    key_mask[3] = False
    row_mask = torch.arange(160).reshape(4, 40) % 3 > 0
    student[~row_mask] = math.nan
    keys[~key_mask] *= 100
    for precision in backend.some(PRECISIONS, k):
        options = {**temperatures(0.1, 0.05), "key_mask": key_mask}
        result = backend.distillation(student, teacher, keys, precision=precision, row_mask=row_mask, **options)
        whole = torch.where(row_mask.unsqueeze(-1), student, teacher)
        exact, limits = keys_truth(whole, teacher, keys, **options), keys_truth.limits(
            whole, teacher, keys, precision=precision, **options
        )  # fmt: skip
        mask = row_mask.numpy()
        exact = exact[0] * mask, exact[1] * mask[..., None]
        keys_truth.check(result, exact, limits)
        assert all((x[~row_mask] == 0).all() and (x[2:] == 0).all() for x in result)


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("k", range(2))
def test_rows_that_are_far_off_whatever_the_order_of_the_keys(backend, keys_truth, order, k):
    """Every tile brings larger logits than all before it, or none; students opposite, unrelated, close, zero."""
    t = ((0.005, 0.005), (0.07, 0.01), (0.02, 0.02), (0.01, 1))[2 * k + (order == "falling")]
    teacher = normal(1, 60, 16, seed=1)
    student = teacher + 0.01 * normal(1, 60, 16, seed=2)
    student[:, 10:20] = -teacher[:, 10:20]
    student[:, 20:40] = normal(1, 20, 16, seed=3)
    student[:, 40:45] = 0
    keys = normal(1, 400, 16, seed=4)
    keys[:, :30] = teacher[:, :30] + 0.01 * normal(1, 30, 16, seed=5)  # rows that lie on one key
    by_first_row = (torch.nn.functional.normalize(keys, dim=-1) @ teacher[0, 25]).argsort(descending=order == "falling")
    keys = keys[:, by_first_row[0]]
    call = (student, teacher, keys)
    for precision in backend.some(("fp32", "fp16", "bf16"), k):
        result = backend.distillation(*call, precision=precision, **temperatures(*t))
        assert all(torch.isfinite(x).all() for x in result)
        limits = keys_truth.limits(*call, precision=precision, **temperatures(*t))
        keys_truth.check(result, keys_truth(*call, **temperatures(*t)), limits)
        assert (result[1][:, 40:45] == 0).all()


def test_no_loss_where_student_is_teacher(backend, make_features):
    teacher = make_features(20, 33, 0)[1]
    keys = make_features(200, 33, 0, seed=1)[1]
    for x in backend.distillation(teacher, teacher, keys, precision="bf16", **temperatures(0.05)):
        assert (x == 0).all()


def test_keys_may_be_shared_prepared_and_replaced_in_part(backend, make_features):
    """Shared and prepared keys change no bit, replaced ones rounding alone: the centre stays."""
    student, teacher = make_features(20, 33, 0.3, batch=2)
    keys = make_features(200, 33, 0, seed=1)[1]
    options = {**temperatures(0.1), "precision": "bf16"}
    expected = backend.distillation(student, teacher, keys.expand(2, -1, -1), **options)
    shared = backend.distillation(student, teacher, keys, **options)

    def prepared(some):
        packed = backend.module.prepare_keys(some.to(backend.device), True, "bf16")
        return PreparedKeys(packed, tuple(some.shape), True, "bf16", "")

    of_prepared = backend.distillation(student, teacher, prepared(keys), **options)
    for x, y, z in zip(expected, shared, of_prepared, strict=True):
        torch.testing.assert_close(y, x, rtol=2e-6, atol=1e-9)
        assert torch.equal(y, z)
    queue = prepared(keys + 0.2 * normal(1, 200, 33, seed=3).abs())
    for start in (0, 77, 150):
        part = keys[:, start : start + (77, 73, 50)[start // 75]].to(backend.device)
        backend.module.update_keys(queue.packed, part, start, True, "bf16")
    for x, y in zip(expected, backend.distillation(student, teacher, queue, **options), strict=True):
        assert (x - y).norm() <= 1e-2 * x.norm()


def test_any_strides_and_types_and_the_same_bits_again(backend, keys_truth, layouts, make_features):
    if backend.is_interpreted and layouts[0](torch.zeros(1, 1, 1, 1)).is_contiguous():
        pytest.skip("interpreted, the other layouts are enough")
    student, teacher = (x.mT.unflatten(2, (4, 6)) for x in make_features(24, 10, 0.3, "normal", batch=2))
    student, teacher = (
        layout(x.to(dtype, copy=True)).to(backend.device)
        for layout, x, dtype in zip(layouts, (student, teacher), (torch.float32, torch.bfloat16), strict=True)
    )
    keys = normal(10, 2, 70, seed=1).to(torch.float16).permute(1, 2, 0).to(backend.device)
    before = [x.clone() for x in (student, teacher, keys)]
    call = student, teacher, keys, 0.2, 0.1, None, None, True, "fp32", True
    kl, gradient = backend.module.affinity_distillation(*call)
    again = backend.module.affinity_distillation(*call)
    assert torch.equal(kl, again[0])
    assert torch.equal(gradient, again[1])
    assert kl.dtype == gradient.dtype == torch.float32
    assert gradient.stride() == torch.empty_like(student).stride()
    assert all(torch.equal(x, y) for x, y in zip(before, (student, teacher, keys), strict=True))
    rows = [x.flatten(2).mT.float().cpu() for x in (student, teacher)]
    options = temperatures(0.2, 0.1)
    exact = keys_truth(*rows, keys.cpu(), **options)
    limits = keys_truth.limits(*rows, keys.cpu(), precision="fp32", **options)
    keys_truth.check((kl.flatten(1).cpu(), gradient.flatten(2).mT.cpu()), exact, limits)
