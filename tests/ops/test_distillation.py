"""The distillation against any keys: what its operator promises to PyTorch, and the arguments of its function."""

import copy
import pickle
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from dskd_fast import AffinityDistillationLoss, functional
from dskd_fast.functional import affinity_distillation, contextual_affinity, prepare_keys, update_keys

from .conftest import random

operator = torch.ops.dskd_fast.affinity_distillation
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def dense(student, teacher, keys, student_temperature, teacher_temperature, normalize=True):
    """The textbook: (B, N, C) twice and (B, K, C) or (K, C), float64 -> (B, N)."""
    if normalize:
        student, teacher, keys = (torch.nn.functional.normalize(x, dim=-1) for x in (student, teacher, keys))
    log_p, log_q = (
        (x @ keys.mT / t).log_softmax(-1) for x, t in ((teacher, teacher_temperature), (student, student_temperature))
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.fixture
def rows():
    return random(12, 8, seed=1).requires_grad_(), random(12, 8, seed=2), random(40, 8, seed=3)


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 5, 2, 3), (7, 5)])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_maps_and_single_rows_agree_with_the_textbook(shape, shared):
    student, teacher = (random(*shape, seed=seed).double() for seed in (1, 2))
    keys = random(9, 5, seed=3).double() if shared or len(shape) == 2 else random(2, 9, 5, seed=3).double()
    kl = affinity_distillation(student, teacher, keys, student_temperature=0.3, teacher_temperature=0.2)
    rows = [x.flatten(2).mT if x.dim() == 4 else x for x in (student, teacher)]
    assert kl.shape == (shape[:1] + shape[2:] if len(shape) == 4 else shape[:-1])
    torch.testing.assert_close(kl.flatten(), dense(*rows, keys, 0.3, 0.2).flatten(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.25, 0.3])
def test_the_contextual_affinity_is_its_case(temperature):
    """T^2 times as large: a power of two changes no bit, another T rounds twice."""
    student, teacher = random(2, 5, 4, 3, seed=1), random(2, 5, 4, 3, seed=2)
    kl = affinity_distillation(student, teacher, student_temperature=temperature)
    paper = contextual_affinity(student, teacher, temperature)
    torch.testing.assert_close(kl * temperature**2, paper, rtol=0 if temperature == 0.25 else 3e-7, atol=0)
    # Masks and two temperatures take the other way.
    whole = torch.ones(2, 4, 3, dtype=torch.bool)
    other = affinity_distillation(student, teacher, student_temperature=temperature, row_mask=whole)
    torch.testing.assert_close(other, kl, rtol=2e-6, atol=0)
    below = affinity_distillation(student.double(), teacher.double(), student_temperature=0.006)
    exact = dense(*(x.flatten(2).mT.double() for x in (student, teacher, teacher)), 0.006, 0.006)
    torch.testing.assert_close(below.flatten(1), exact, rtol=1e-9, atol=1e-12)


def test_a_queue_outlives_inference_mode_takes_any_dtype_and_is_replaced_from_its_end_to_its_beginning(rows, place):
    student, teacher, keys, new = (x.detach().to(place.device) for x in (*rows, random(7, 8, seed=4)))
    with torch.inference_mode():
        queue = prepare_keys(keys, precision="fp32", backend=place.backend)
    update_keys(queue, new.double(), 36)
    expected = torch.cat((new[4:], keys[3:36], new[:4]))
    got = affinity_distillation(student, teacher, queue, student_temperature=0.5, teacher_temperature=0.1)
    exact = dense(*(x.double() for x in (student, teacher, expected)), 0.5, 0.1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("carry", ["save", "deepcopy", "pickle"])
def test_a_queue_is_saved_copied_and_sent_to_other_processes(rows, place, tmp_path, carry):
    student, teacher, keys = (x.detach().to(place.device) for x in rows)
    queue = prepare_keys(keys, precision="bf16", backend=place.backend)
    if carry == "save":
        torch.save({"queue": queue, "start": 3}, tmp_path / "queue.pt")
        other = torch.load(tmp_path / "queue.pt", weights_only=True)["queue"]
    else:
        other = copy.deepcopy(queue) if carry == "deepcopy" else pickle.loads(pickle.dumps(queue))
    expected, got = (affinity_distillation(student, teacher, k, student_temperature=0.5) for k in (queue, other))
    assert torch.equal(got, expected)
    update_keys(other, keys[:5] + 1, 3)
    assert torch.equal(affinity_distillation(student, teacher, queue, student_temperature=0.5), expected)


def test_a_queue_of_another_machine_or_device_is_refused(rows, place):
    student, teacher, keys = (x.detach().to(place.device) for x in rows)
    queue = prepare_keys(keys, backend=place.backend)
    foreign = queue._replace(layout=queue.layout.replace("layout 1", "layout 0"))
    with pytest.raises(ValueError, match=r"prepared in layout 0 of .* and this is layout 1 of .*: prepare the keys"):
        affinity_distillation(student, teacher, foreign, student_temperature=0.5)
    with pytest.raises(ValueError, match="prepare the keys again"):
        update_keys(foreign, keys[:2], 0)
    with pytest.raises(TypeError, match="move the keys, and prepare them again there"):
        queue.to("cpu")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("normalize", [True, False])
def test_keys_that_are_not_finite_leave_nothing_behind_when_they_are_replaced(rows, place, precision, normalize):
    student, teacher, keys = (x.detach().to(place.device) for x in rows)
    spoilt = keys.clone()
    spoilt[3, 2], spoilt[20, 5] = float("nan"), float("inf")
    options = {"normalize": normalize, "precision": precision}
    queue = prepare_keys(spoilt, backend=place.backend, **options)
    assert affinity_distillation(student, teacher, queue, student_temperature=0.5, normalize=normalize).isnan().all()
    for start in (3, 20):
        update_keys(queue, keys[start : start + 1], start)
    got = affinity_distillation(student, teacher, queue, student_temperature=0.5, normalize=normalize)
    exact = dense(*(x.double() for x in (student, teacher, keys)), 0.5, 0.5, normalize)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2 if precision == "fp16" else 1e-4, atol=1e-6)


def test_a_temperature_that_cannot_be_read_has_the_range_of_any_keys(rows):
    """In a compiled graph and under torch.func, of the teacher's own keys, too."""
    student, teacher, temperature = rows[0].detach(), rows[1], torch.tensor(0.006)

    def loss(s, t):
        return affinity_distillation(s, teacher, student_temperature=t).sum()

    expected = loss(student, 0.006)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")(student, temperature)
    _, transformed = torch.func.grad_and_value(loss)(student, temperature)
    for found in (compiled, transformed):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [0.006, 0.01, 0.3])
def test_a_temperature_on_the_cpu_is_its_number(rows, temperature):
    of_tensor, of_number = (
        affinity_distillation(rows[0], rows[1], student_temperature=t)
        for t in (torch.tensor(temperature, dtype=torch.float64), temperature)
    )
    assert torch.equal(of_tensor, of_number)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_rows(place, shape):
    """With the teacher's own keys and with shared ones, which a mask of no image fits."""
    student = torch.zeros(shape, device=place.device, requires_grad=True)
    options = {"student_temperature": 0.1, "teacher_temperature": 0.2, "backend": place.backend}
    for keys in (None, random(40, 8).to(place.device)):
        mask = torch.ones(shape[0], shape[1] if keys is None else 40, dtype=torch.bool, device=place.device)
        kl = affinity_distillation(student, student.detach(), keys, key_mask=mask, **options)
        kl.sum().backward()
        assert kl.shape == shape[:2]


@pytest.mark.parametrize("case", ["rows", "masks", "prepared"])
def test_registration(place, case):
    student, teacher, keys = random(2, 5, 3, 4, seed=1), random(2, 5, 3, 4, seed=2), random(1, 70, 5, seed=3)
    student, teacher, keys = (
        x.to(place.device) for x in (student.to(memory_format=torch.channels_last), teacher, keys)
    )
    packed, count, masks = [keys], None, [None, None]
    if case == "prepared":
        prepared = prepare_keys(keys, precision="bf16", backend=place.backend)
        packed, count = prepared.packed, 70
    if case == "masks":
        masks = [torch.rand(2, 70, device=place.device) > 0.5, torch.rand(2, 3, 4, device=place.device) > 0.5]
    one = torch.tensor(0.5, device=place.device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for with_gradient in (True, False):
        call = (student.requires_grad_(with_gradient), teacher, packed, count, one, one / 2, *masks, True, "bf16",
                place.backend, with_gradient)  # fmt: skip
        torch.library.opcheck(operator, call, test_utils=checks if with_gradient else checks[2:])


@pytest.mark.parametrize("prepared", [True, False])
def test_one_dynamic_graph_serves_every_number_of_keys(any_place, pristine_compiler, prepared):
    counter, options = CompileCounter(), {"backend": any_place.backend, "precision": "fp32"}
    loss = AffinityDistillationLoss(0.1, 0.05, **options)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n, count in ((6, 30), (9, 50), (7, 41)):
        student, teacher, keys = (random(x, 8, seed=i).to(any_place.device) for i, x in enumerate((n, n, count)))
        mask = torch.arange(count, device=any_place.device) % 5 > 0
        some, student = prepare_keys(keys, **options) if prepared else keys, student.requires_grad_()
        values = [function(student, teacher, some, key_mask=mask) for function in (loss, compiled)]
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in values))
    assert counter.frame_count == 1


def test_an_exported_loss_serves_other_shapes(tmp_path, rows):
    class Module(torch.nn.Module):
        def forward(self, student, teacher, keys):
            return affinity_distillation(student, teacher, keys, student_temperature=0.1, teacher_temperature=0.05)

    student, teacher, keys = (x.detach() for x in rows)
    n, k = Dim("n", min=2), Dim("k", min=2)
    program = torch.export.export(Module(), (student, teacher, keys), dynamic_shapes=({0: n}, {0: n}, {0: k}))
    torch.export.save(program, tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    call = student[:7], teacher[:7], keys[:33]
    assert torch.equal(loaded(*call), Module()(*call))


def test_autocast_and_checkpointing(rows):
    student, teacher, keys = rows
    options = {"student_temperature": 0.1, "teacher_temperature": 0.05}
    forced = affinity_distillation(student, teacher, keys, precision="bf16", **options)
    with torch.autocast("cpu", torch.bfloat16):
        kl = affinity_distillation(student, teacher, keys, **options)
        again = checkpoint(lambda x: affinity_distillation(x, teacher, keys, **options), student, use_reentrant=False)
    assert torch.equal(kl, forced)
    first, second = (torch.autograd.grad(x.sum(), student)[0] for x in (kl, again))
    assert torch.equal(first, second)


def test_function_transforms(rows):
    """vmap over rows that share their keys, over keys and over masks; grad."""
    student, teacher, keys = (x.detach() for x in rows)
    batched = student.reshape(2, 6, 8), teacher.reshape(2, 6, 8), keys.reshape(2, 20, 8)
    batched = *batched, torch.arange(40).reshape(2, 20) % 3 > 0

    def loss(s, t, k, m):
        return affinity_distillation(s, t, k, student_temperature=0.2, key_mask=m).sum()

    for dims in ((0, 0, None, None), (0, 0, 0, 0), (0, None, None, 0)):
        call = [x if dim == 0 else x[0] for x, dim in zip(batched, dims, strict=True)]
        values = torch.func.vmap(torch.func.grad_and_value(loss), dims)(*call)
        for i in range(2):
            one = [x[i] if dim == 0 else x for x, dim in zip(call, dims, strict=True)]
            x = one[0].clone().requires_grad_()
            value = loss(x, *one[1:])
            value.backward()
            torch.testing.assert_close((values[0][i], values[1][i]), (x.grad, value.detach()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("at", ["student", "keys", "student_temperature"])
def test_derivatives_that_would_come_out_as_zero_are_refused_by_transforms(rows, at):
    student, teacher, keys = (x.detach() for x in rows)
    value = {"student": student, "keys": keys, "student_temperature": torch.tensor(0.5)}

    def loss(x):
        return affinity_distillation(teacher=teacher, **value | {at: x}).sum()

    with pytest.raises(NotImplementedError, match=f"{at} carries a tangent"):
        torch.func.jvp(loss, (value[at],), (value[at],))
    if at != "student":
        with pytest.raises(ValueError, match=f"{at} requires grad"):
            torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(value[at][None].repeat_interleave(2, 0))


X = random(6, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": X[:, :3]}, ValueError, "keys has 3 channels and student 4"),
        ({"keys": X[0]}, ValueError, "keys has shape (4,): pass (K, C) or (B, K, C)"),
        ({"keys": X[:0]}, ValueError, "keys has no rows"),
        ({"keys": X.repeat(2, 1, 1)}, ValueError, "keys is of 2 images and student of 1"),
        ({"keys": X.long()}, TypeError, "keys has dtype torch.int64"),
        ({"keys": X.clone().requires_grad_()}, ValueError, "keys requires grad"),
        ({"teacher": X.clone().requires_grad_()}, ValueError, "teacher requires grad"),
        ({"student_temperature": 0.004}, ValueError, "student_temperature=0.004 is not supported: use"),
        ({"keys": None, "student_temperature": torch.tensor(128.0)}, ValueError, "student_temperature=128.0 is not"),
        ({"teacher_temperature": -1}, ValueError, "teacher_temperature=-1 is not supported"),
        ({"key_mask": torch.ones(5, dtype=torch.bool)}, ValueError, "key_mask has shape (5,): pass (6,) or (1, 6)"),
        ({"key_mask": torch.ones(6)}, TypeError, "key_mask is torch.float32: pass a bool tensor"),
        ({"row_mask": torch.ones(6, 1, dtype=torch.bool)}, ValueError, "row_mask has shape (6, 1): pass (6,)"),
        ({"keys": prepare_keys(X), "normalize": False}, ValueError, "normalize=False, but the keys were prepared with"),
        ({"keys": prepare_keys(X), "precision": "bf16"}, ValueError, "precision='bf16', but the keys were prepared"),
        ({"keys": prepare_keys(X, backend="torch"), "backend": "cpu"}, ValueError, "backend='cpu', but the keys"),
        ({"keys": prepare_keys(X[:, :2])}, ValueError, "keys were prepared from shape (1, 6, 2)"),
    ],
)  # fmt: skip
def test_unsuitable_arguments(change, error, message):
    call = {"student": X, "teacher": X, "keys": X, "student_temperature": 0.1} | change
    with pytest.raises(error, match=re.escape(message)):
        affinity_distillation(**call)


@pytest.mark.parametrize(
    ("keys", "start", "message"),
    [
        (X[:, :2], 0, "(1, 6, 2) as (B, P, C)"),
        (X.repeat(2, 1), 0, "(1, 12, 4)"),
        (X, 6, "start=6 is not a place"),
        (X, 1.5, "start=1.5 is not a place"),
    ],
)
def test_unsuitable_updates(keys, start, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        update_keys(prepare_keys(X), keys, start)
    with pytest.raises(TypeError, match="prepared is a Tensor"):
        update_keys(X, keys, start)


def test_masked_rows_leave_the_mean():
    mask = torch.tensor([True, False, True, True, False, True])
    rows = functional.affinity_distillation(X, X + 1, random(9, 4), student_temperature=0.1, row_mask=mask)
    for reduction, expected in (("mean", rows.sum() / 4), ("sum", rows.sum()), ("none", rows)):
        loss = AffinityDistillationLoss(0.1, reduction=reduction)
        torch.testing.assert_close(loss(X, X + 1, random(9, 4), row_mask=mask), expected)
    assert AffinityDistillationLoss(0.1)(X, X + 1, random(9, 4), row_mask=mask & False) == 0
    with pytest.raises(ValueError, match="reduction='max' is not known"):
        AffinityDistillationLoss(0.1, reduction="max")
    with pytest.raises(ValueError, match=r"student_temperature=0\.001"):
        AffinityDistillationLoss(0.001)
