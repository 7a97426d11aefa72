"""What every backend has to satisfy of the distillation against any keys, on every device it runs on."""

import math

import numpy as np
import pytest
import torch

from dskd_fast.backends.common import DISTILLATION_TEMPERATURE_LIMITS

pytestmark = pytest.mark.filterwarnings(r"ignore::RuntimeWarning:triton\.runtime\.interpreter")

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


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
    backend, check_distillation, make_features, size, t, precision, noise, kind, normalize
):
    n, k, c = size
    student, teacher = make_features(n, c, noise, kind)
    keys = make_features(k, c, 0, kind, seed=1)[1]
    if not normalize:  # logits up to about 100, of vectors as long as they come
        length = math.sqrt(min(t) * 100) / c**0.5
        student, teacher, keys = (x * length for x in (student, teacher, keys))
    options = {**temperatures(*t), "normalize": normalize}
    check_distillation(backend, student, teacher, keys, precision=precision, **options)


@pytest.mark.parametrize(("precision", "kind", "noise"), [("bf16", "normal", 0.1), ("bf16", "clustered", 0.01),
                                                          ("fp16", "normal", 0.01)])  # fmt: skip
def test_keys_that_all_but_repeat_the_rows(
    backend, keys_truth, check_distillation, make_features, request, precision, kind, noise
):
    """Each row's weight lies on one key: its logits' roundings do not average, and 1.5 and 3 of them are promised."""
    if backend.is_interpreted:
        request.getfixturevalue("set_tiles")(128, 128)
    student, teacher = make_features(128, 64, noise, kind)
    near = teacher + 0.1 * teacher.square().mean().sqrt() * normal(1, 128, 64, seed=2)
    call = student, teacher, torch.cat((near, make_features(1000, 64, 0, kind, seed=1)[1]), 1)
    exact = keys_truth(*call, **temperatures(0.1))
    result = check_distillation(backend, *call, precision=precision, **temperatures(0.1))
    roundoff = {"bf16": 2.0**-8, "fp16": 2.0**-11}[precision]
    for got, true, promised in zip(result, exact, (1.5 * roundoff, 3 * roundoff), strict=True):
        assert np.linalg.norm(got.double().numpy() - true) <= promised * np.linalg.norm(true)


def test_few_rows_have_their_digits_with_many_keys(backend, keys_truth):
    """A product adds up float32 one after another: over a tile's keys, of which 2^13 walk off by 5e-6, not over all."""
    student, keys = normal(1, 2, 4, seed=0), normal(1, 1 << (14 if backend.is_slow else 18), 4, seed=1)
    call = student, student + 0.01 * normal(1, 2, 4, seed=2), keys
    _, gradient = backend.distillation(*call, **temperatures(0.1))
    _, exact = keys_truth(*call, **temperatures(0.1))
    assert np.linalg.norm(gradient.double().numpy() - exact) <= 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("k", range(4))
def test_masks_leave_out_keys_and_rows(backend, check_distillation, make_features, k):
    """Of keys: a few in the middle, whole tiles at the beginning, all but one, all; and for all images alike."""
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
    options = {**temperatures(0.1, 0.05), "row_mask": row_mask}
    for precision in backend.some(PRECISIONS, k):
        result = check_distillation(backend, student, teacher, keys, precision=precision, key_mask=key_mask, **options)
        assert all((x[2:] == 0).all() for x in result)
        some = {"keys": keys[:1], "key_mask": key_mask[:1]} if k % 2 else {"keys": keys, "key_mask": key_mask[:1]}
        check_distillation(backend, student, teacher, precision=precision, **some, **options)


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("k", range(2))
def test_rows_that_are_far_off_whatever_the_order_of_the_keys(backend, check_distillation, order, k):
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
    for precision in backend.some(("fp32", "fp16", "bf16"), k):
        result = check_distillation(backend, student, teacher, keys, precision=precision, **temperatures(*t))
        assert (result[1][:, 40:45] == 0).all()


def test_no_loss_where_student_is_teacher(backend, make_features):
    teacher = make_features(20, 33, 0)[1]
    keys = make_features(200, 33, 0, seed=1)[1]
    for precision in backend.some(PRECISIONS, 2):
        for x in backend.distillation(4 * teacher, teacher, keys, precision=precision, **temperatures(0.05)):
            assert (x == 0).all()


@pytest.fixture
def inputs(make_features):
    """Student and teacher (2, 70, 20), keys (1, 150, 20)."""
    return *make_features(70, 20, 0.3, "normal", batch=2), make_features(150, 20, 0, "normal", seed=1)[1]


def test_temperatures_in_memory_give_the_same_bits_and_nan_out_of_range(backend, inputs):
    if backend.name == "cpu-cpu":
        pytest.skip("a CPU's memory is the host's: the operator has read the temperature")

    def in_memory(*t):
        return {name: torch.tensor(x, device=backend.device) for name, x in temperatures(*t).items()}

    lowest, highest = DISTILLATION_TEMPERATURE_LIMITS
    expected = backend.distillation(*inputs, **temperatures(1 / 8, 1 / 64))
    assert all(map(torch.equal, expected, backend.distillation(*inputs, **in_memory(1 / 8, 1 / 64))))
    for t in ((lowest * 0.98, 1), (1, highest * 1.01), (math.nan, 1)):
        assert all(x.isnan().all() for x in backend.distillation(*inputs, **in_memory(*t)))


@pytest.mark.parametrize("who", range(3))
def test_what_is_not_a_number_stays_in_its_row(backend, inputs, who):
    """That of a key is in all rows of its image; without its gradient, a map is the same."""
    options = {**temperatures(0.1, 0.05), "precision": ("fp32", "tf32", "fp16")[who]}
    inputs = *inputs[:2], inputs[2].expand(2, -1, -1).clone()
    clean = backend.distillation(*inputs, **options)
    inputs[who][0, 5, 3] = (math.nan, math.inf, -math.inf)[who]
    result = backend.distillation(*inputs, **options)
    bad = torch.zeros(2, 70, dtype=torch.bool)
    bad[0, slice(None) if who == 2 else 5] = True
    for x, y in zip(result, clean, strict=True):
        assert x[bad].isnan().all()
        assert torch.equal(x[~bad], y[~bad])
    alone, none = backend.distillation(*inputs, with_gradient=False, **options)
    assert none is None
    assert torch.equal(alone[~bad], clean[0][~bad])


def test_keys_may_be_shared_prepared_and_replaced_in_part(backend, make_features):
    """Shared and prepared keys change no bit, replaced ones rounding alone: the centre stays."""
    pair = make_features(20, 33, 0.3, batch=2)
    keys = make_features(200, 33, 0, seed=1)[1]
    options = {**temperatures(0.1), "precision": "bf16"}
    queue = backend.prepared(keys + 0.2 * normal(1, 200, 33, seed=3).abs(), "bf16")
    for start, end in ((0, 77), (77, 150), (150, 200)):
        backend.module.update_keys(queue.packed, keys[:, start:end].to(backend.device), start, True, "bf16")
    forms = keys.expand(2, -1, -1), keys, backend.prepared(keys, "bf16"), queue
    results = (backend.distillation(*pair, x, **options) for x in forms)
    for expected, shared, prepared, replaced in zip(*results, strict=True):
        torch.testing.assert_close(shared, expected, rtol=2e-6, atol=1e-9)
        assert torch.equal(shared, prepared)
        assert (expected - replaced).norm() <= 1e-2 * expected.norm()


def test_any_strides_and_types_and_the_same_bits_again(backend, keys_truth, layouts, make_features):
    maps = (x.mT.unflatten(2, (4, 6)) for x in make_features(24, 10, 0.3, "normal", batch=2))
    student, teacher = (
        layout(x.to(dtype, copy=True)).to(backend.device)
        for layout, x, dtype in zip(layouts, maps, (torch.float32, torch.bfloat16), strict=True)
    )
    keys = normal(10, 2, 70, seed=1).to(torch.float16).permute(1, 2, 0).to(backend.device)
    before = [x.clone() for x in (student, teacher, keys)]
    assert backend.module.distillation_refusal(student, teacher, keys, "fp32") is None
    call = student, teacher, keys, 0.2, 0.1, None, None, True, "fp32", True
    result, again = (backend.module.affinity_distillation(*call) for _ in range(2))
    assert all(map(torch.equal, (*result, *before), (*again, student, teacher, keys)))
    assert [x.dtype for x in result] == [torch.float32] * 2
    kl, gradient = result
    assert gradient.stride() == torch.empty_like(student).stride()
    rows = *(x.flatten(2).mT.float().cpu() for x in (student, teacher)), keys.cpu()
    exact = keys_truth(*rows, **temperatures(0.2, 0.1))
    limits = keys_truth.limits(*rows, precision="fp32", **temperatures(0.2, 0.1))
    keys_truth.check((kl.flatten(1).cpu(), gradient.flatten(2).mT.cpu()), exact, limits)
