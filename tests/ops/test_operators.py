import shutil

import pytest
import torch
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from dskd_fast import ContextualAffinityLoss, CosineDistanceLoss, functional
from dskd_fast.ops.dispatch import AMBIENT

from .conftest import FUNCTIONS, plain, random

affinity = torch.ops.dskd_fast.contextual_affinity.tensor
cosine = torch.ops.dskd_fast.cosine_distance.map
cosine_gradient = torch.ops.dskd_fast.cosine_gradient.default

# Triton's interpreter computes both sides of a `tl.where`, the one that is not taken included.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def on(place, *tensors):
    """On the place's device, the strides as they are, which `to` alone would tidy."""
    whole = [torch.tensor([], dtype=x.dtype).set_(x.untyped_storage()).to(place.device) for x in tensors]
    return [w.as_strided(x.shape, x.stride(), x.storage_offset()) for w, x in zip(whole, tensors, strict=True)]


PAIRS = {
    "contiguous": lambda: (plain(1), plain(2)),
    "channels last": lambda: (plain(1, batch=2).to(memory_format=torch.channels_last), plain(2, batch=2)),
    "sliced": lambda: (random(3, 7, 5, 8, seed=1)[2:, 1:6, 2:, ::2], random(1, 10, 6, 4, seed=2)[:, ::2, ::2]),
    "expanded batch": lambda: (plain(1).expand(2, 5, 3, 4), plain(2, batch=2)),
    "rows": lambda: tuple(random(1, 12, 5, seed=seed).mT.unsqueeze(-1) for seed in (1, 2)),
    "no images": lambda: (random(0, 5, 3, 4), random(0, 5, 3, 4)),
    "mixed types": lambda: (plain(1, torch.bfloat16), plain(2).to(memory_format=torch.channels_last)),
    "float64": lambda: (plain(1, torch.float64), plain(2)),
}


REGISTRATION = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("pair", PAIRS)
def test_registration(place, pair):
    """Schema, autograd and fake tensors, strides included, against what the operator really does."""
    if place.backend == "triton" and (
        pair == "float64" or (place.device == "cpu" and pair not in ("sliced", "no images"))
    ):
        pytest.skip("it does not take float64, and under the interpreter other layouts take seconds")
    student, teacher = on(place, *PAIRS[pair]())
    temperature = torch.tensor(0.5, device=place.device)
    for with_gradient, checks in ((True, REGISTRATION), (False, REGISTRATION[2:])):
        student = student.detach().requires_grad_(with_gradient)
        call = student, teacher, temperature, "fp32", place.backend, with_gradient
        torch.library.opcheck(affinity, call, test_utils=checks)
        torch.library.opcheck(cosine, (student, teacher, place.backend), test_utils=checks)
    weights = on(place, random(student.shape[0], *student.shape[2:], seed=3))[0]
    torch.library.opcheck(cosine_gradient, (student.detach(), teacher, weights, place.backend), test_utils=REGISTRATION)


@pytest.mark.slow
def test_tracing(fork):
    """In a process of its own: once fake tensors had a backward, none can be forked from here that needs one, too."""

    def work():
        ops, one = torch.ops.dskd_fast, torch.tensor(0.5)
        student, teacher = (torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last) for _ in range(2))
        student.requires_grad_()
        keys, mask = torch.randn(1, 40, 5), torch.rand(1, 40) > 0.5
        of_keys = student, teacher, [keys], None, one, one / 2, mask, None, True, "bf16", "torch", True
        for operator, call in (
            (ops.contextual_affinity.tensor, (student, teacher, one, "fp32", "torch", True)),
            (ops.cosine_distance.map, (student, teacher, "torch")),
            (ops.affinity_distillation.default, of_keys),
        ):
            torch.library.opcheck(operator, call, test_utils="test_aot_dispatch_dynamic")

    assert fork(work)() == 0


def test_only_the_student_gets_a_gradient_and_one_that_was_not_asked_for_is_an_error():
    student, teacher = (x.requires_grad_() for x in PAIRS["contiguous"]())
    values, _ = affinity(student, teacher, torch.tensor(1.0), "fp32", "torch", False)
    with pytest.raises(RuntimeError, match="computed without its gradient"):
        values.sum().backward()
    assert student.grad is None
    values, gradient = affinity(student, teacher, torch.tensor(1.0), "fp32", "torch", True)
    assert not gradient.requires_grad
    values.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_call_can_be_captured_in_a_cuda_graph(backend, function):
    """Which refuses every synchronisation, and everything that depends on what the first call found out."""
    student, teacher = (x.cuda() for x in PAIRS["contiguous"]())
    student.requires_grad_()
    temperature = [torch.ones((), device="cuda")] if function is functional.contextual_affinity else []

    def call():
        return torch.autograd.grad(function(student, teacher, *temperature, backend=backend).sum(), student)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        student.copy_(plain(7))
        for x in temperature:
            x.fill_(0.02)
    graph.replay()
    assert torch.equal(captured, call())


def of_keys(student, teacher, backend):
    keys = random(40, 5, seed=9).to(student.device)
    return functional.affinity_distillation(
        student, teacher, keys, student_temperature=0.1, teacher_temperature=0.2, backend=backend
    )


@pytest.mark.parametrize("function", [*FUNCTIONS, of_keys])
def test_any_grad_output_and_backward_twice_but_no_second_derivative(any_place, function):
    student, teacher = on(any_place, *PAIRS["channels last"]())
    weights = random(2, 3, 4, seed=3).to(any_place.device)
    values = function(student.requires_grad_(), teacher, backend=any_place.backend)
    first, second, negative, none = (
        torch.autograd.grad(values, student, factor * weights, retain_graph=True)[0] for factor in (1, 1, -2, 0)
    )
    assert torch.equal(first, second)
    assert torch.equal(negative, -2 * first)
    assert torch.equal(none, torch.zeros_like(first))
    (ones,) = torch.autograd.grad(values.sum(), student, retain_graph=True)
    # The cosine distance rounds once, after the weight.
    torch.testing.assert_close(first, weights[:, None] * ones, rtol=3 * 2**-24, atol=0)
    assert ones.abs().max() > 0
    for loss in (values.sum(), values.square().mean()):
        with pytest.raises(RuntimeError, match=r"no second derivative: .* without create_graph"):
            torch.autograd.grad(loss, student, create_graph=True)


LOSSES = {
    "affinity": lambda **options: ContextualAffinityLoss(0.5, **options),
    "affinity, bf16": lambda **options: ContextualAffinityLoss(0.05, reduction="sum", precision="bf16", **options),
    "cosine": CosineDistanceLoss,
    "flattened cosine": lambda **options: CosineDistanceLoss(flatten=True, **options),
}


def levels(place, seed):
    return on(place, random(1, 5, 6, 6, seed=seed), random(1, 7, 3, 3, seed=seed + 10))


def loss_and_gradients(function, student, teacher):
    student = [x.clone().requires_grad_() for x in student]
    loss = function(student, teacher)
    loss.backward()
    return [loss.detach(), *(x.grad for x in student)]


def assert_same(got, expected):
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("loss", ["affinity", "cosine"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(any_place, loss, use_reentrant):
    module = LOSSES[loss](backend=any_place.backend)

    def level(student, teacher):
        return module(student.tanh(), teacher)

    call = levels(any_place, 1)[:1], levels(any_place, 2)[:1]
    assert_same(
        loss_and_gradients(lambda s, t: checkpoint(level, s[0], t[0], use_reentrant=use_reentrant), *call),
        loss_and_gradients(lambda s, t: level(s[0], t[0]), *call),
    )


# torch.compile


@pytest.mark.parametrize("loss", LOSSES)
def test_compiling_changes_nothing(any_place, pristine_compiler, loss):
    module = LOSSES[loss](backend=any_place.backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    call = levels(any_place, 1), levels(any_place, 2)
    assert_same(loss_and_gradients(compiled, *call), loss_and_gradients(module, *call))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_dynamic_graph_serves_every_shape(any_place, pristine_compiler, function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(shape):
        call = [[x] for x in on(any_place, random(*shape, seed=1), random(*shape, seed=2))]
        assert_same(
            *(
                loss_and_gradients(lambda s, t, f=f: f(s[0], t[0], backend=any_place.backend).square().sum(), *call)
                for f in (compiled, function)
            )
        )

    check((2, 5, 3, 4))
    with torch.compiler.set_stance("fail_on_recompile"):
        check((3, 7, 6, 3))
        with pytest.raises(RuntimeError, match="fail_on_recompile"):  # the test would see it
            compiled(plain(1).double(), plain(2))


@pytest.mark.parametrize("of", [float, torch.tensor])
def test_a_temperature_may_change_under_compile(pristine_compiler, of):
    """Once it is known to change, nothing is compiled anew; and an old value never stays (pytorch/pytorch#197889)."""
    compiled = torch.compile(functional.contextual_affinity, fullgraph=True, backend="aot_eager")
    for k, temperature in enumerate((1.0, 0.5, 0.25, 2.0, 0.3)):
        call = plain(1), plain(2), of(temperature)
        with torch.compiler.set_stance("fail_on_recompile" if k >= 2 else "default"):
            torch.testing.assert_close(compiled(*call), functional.contextual_affinity(*call), rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_inductor_changes_nothing(any_place, pristine_compiler):
    """It plans memory by the strides that it was promised and fuses what surrounds the operators."""

    def step(student, teacher):
        pair = student[0].relu() + 1, teacher[0]
        affinity_of = functional.contextual_affinity(*pair, 0.5, backend=any_place.backend)
        return (affinity_of + functional.cosine_distance(*pair, backend=any_place.backend)).sum()

    call = [[x] for x in on(any_place, *PAIRS["channels last"]())]
    assert_same(loss_and_gradients(torch.compile(step, fullgraph=True), *call), loss_and_gradients(step, *call))


def test_compiled_code_follows_autocast_and_settings(any_place, pristine_compiler, restore_precision):
    student, teacher = on(any_place, random(1, 64, 32, seed=1), random(1, 64, 32, seed=2))

    def step(**options):
        return functional.contextual_affinity(student, teacher, backend=any_place.backend, **options)

    def both():
        with torch.autocast(any_place.device, dtype=torch.bfloat16):
            inside = step()
        return inside, step()

    compiled, compiled_both = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (step, both))
    exact, rounded = step(precision="fp32"), step(precision="bf16")
    assert not torch.equal(exact, rounded)
    assert torch.equal(compiled(), exact)
    with torch.autocast(any_place.device, dtype=torch.bfloat16):
        assert torch.equal(compiled(), rounded)
    assert_same(compiled_both(), (rounded, exact))
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(compiled(), rounded)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(compiled(), exact)


# torch.export


SHAPES = {0: Dim("batch"), 2: Dim("height")}


@pytest.mark.parametrize(("loss", "strict"), [("affinity", True), ("cosine", False)])
def test_an_exported_loss_serves_other_shapes_and_survives_a_file(any_place, tmp_path, loss, strict):
    module = LOSSES[loss](backend=any_place.backend)
    student, teacher = on(any_place, plain(1, batch=2), plain(2, batch=2))  # of one image, it would be for one alone
    call = student.requires_grad_(), teacher
    program = torch.export.export(module, call, dynamic_shapes=(SHAPES, SHAPES), strict=strict)
    assert {"affinity": affinity, "cosine": cosine}[loss] in [node.target for node in program.graph.nodes]
    torch.export.save(program, tmp_path / "loss.pt2")
    call = [[x] for x in on(any_place, random(1, 5, 6, 4, seed=3), random(1, 5, 6, 4, seed=4))]
    expected = loss_and_gradients(lambda s, t: module(s[0], t[0]), *call)
    for exported in (program, torch.export.load(tmp_path / "loss.pt2")):
        run = exported.module()
        assert_same(loss_and_gradients(lambda s, t, run=run: run(s[0], t[0]), *call), expected)


def test_a_program_of_an_earlier_version_still_runs(tmp_path):
    """With the temperature as a number, and a cosine distance that is asked whether it makes a gradient."""
    ops = torch.ops.dskd_fast

    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            affinity_of = ops.contextual_affinity.default(student, teacher, 0.5, AMBIENT, "auto", True)[0]
            return affinity_of + ops.cosine_distance.default(student, teacher, "auto", True)[0]

    torch.export.save(torch.export.export(Loss(), (plain(1), plain(2))), tmp_path / "loss.pt2")
    program = torch.export.load(tmp_path / "loss.pt2")
    targets = {node.target for node in program.graph.nodes}
    assert {ops.contextual_affinity.default, ops.cosine_distance.default} <= targets

    def both(student, teacher):
        return functional.contextual_affinity(student, teacher, 0.5) + functional.cosine_distance(student, teacher)

    losses = (lambda s, t, f=f: f(s[0], t[0]).sum() for f in (program.module(), both))
    assert_same(*(loss_and_gradients(loss, [plain(1)], [plain(2)]) for loss in losses))
