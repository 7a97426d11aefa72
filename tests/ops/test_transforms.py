"""The maps under the transforms of torch.func, against the textbook's."""

import pytest
import torch

from dskd_fast import functional, reference

from .conftest import FUNCTIONS, plain, random

# Transforms of a function of (student, teacher), each (V, B, C, H, W).
TRANSFORMS = {
    "grad": lambda f: lambda s, t: torch.func.grad(lambda x: f(x, t[0]).square().sum())(s[0]),
    "vjp": lambda f: lambda s, t: torch.func.vjp(lambda x: f(x, t[0]), s[0])[1](t[0, :, 0])[0],
    "jacrev": lambda f: lambda s, t: torch.func.jacrev(lambda x: f(x, t[0]))(s[0]),
    "vmap": torch.func.vmap,
    "vmap of one teacher": lambda f: lambda s, t: torch.func.vmap(f, (0, None))(s, t[0]),
    "vmap of one student": lambda f: lambda s, t: torch.func.vmap(f, (None, 0))(s[0], t),
    "vmap of other dimensions": lambda f: lambda s, t: torch.func.vmap(f, (-1, 1))(s.movedim(0, -1), t.movedim(0, 1)),
    "vmap of vmap": lambda f: lambda s, t: torch.func.vmap(torch.func.vmap(f))(s[:, None], t[:, None]),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda s, t: f(s, t).sum())),
    "vmap of jacrev": lambda f: torch.func.vmap(torch.func.jacrev(f)),
    "grad of vmap": lambda f: torch.func.grad(lambda s, t: torch.func.vmap(f)(s, t).square().sum()),
    "backward of vmap": lambda f: lambda s, t: backward_of(torch.func.vmap(f), s, t),
    "grad of what is compiled": lambda f: TRANSFORMS["grad"](torch.compile(f, backend="aot_eager")),
    "compiled vmap": lambda f: (
        lambda s, t: backward_of(torch.compile(torch.func.vmap(f), backend="aot_eager", fullgraph=True), s, t)
    ),
}


def backward_of(function, student, teacher):
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(function(leaf, teacher).square().sum(), leaf)[0]


def textbook(function, *options):
    """The same of maps, in plain operations."""
    plain_function = getattr(reference, function.__name__)

    def call(student, teacher):
        rows = plain_function(student.flatten(2).mT, teacher.flatten(2).mT, *options)
        return rows.unflatten(1, student.shape[2:])

    return call


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms(pristine_compiler, function, transform):
    student, teacher = random(3, 2, 4, 2, 2, seed=1).double(), random(3, 2, 4, 2, 2, seed=2).double()
    found, expected = (TRANSFORMS[transform](f)(student, teacher) for f in (function, textbook(function)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_vmap_over_temperatures():
    temperatures = torch.tensor([0.05, 0.5, 3.0])
    student, teacher = plain(1, torch.float64), plain(2, torch.float64)

    def gradients(function):
        losses = torch.func.vmap(function, (None, 0))
        return torch.func.grad(lambda s: losses(s, temperatures).square().sum())(student)

    found = gradients(lambda s, x: functional.contextual_affinity(s, teacher, x))
    torch.testing.assert_close(found, gradients(lambda s, x: textbook(functional.contextual_affinity, x)(s, teacher)))


REFUSED = {
    "grad of grad": (
        lambda f, s, t: torch.func.grad(lambda x: torch.func.grad(lambda y: f(y, t).square().sum())(x).sum())(s),
        (RuntimeError, "the loss has no second derivative"),
    ),
    "hessian": (
        lambda f, s, t: torch.func.hessian(lambda x: f(x, t).sum())(s),
        (NotImplementedError, "student carries a tangent of forward-mode autograd: use reverse mode"),
    ),
    "jvp of vmap": (
        lambda f, s, t: torch.func.jvp(torch.func.vmap(f), (s[None], t[None]), (0 * s[None], t[None])),
        (NotImplementedError, "carries a tangent of forward-mode autograd: use reverse mode"),
    ),
    "the teacher's of vmap": (
        lambda f, s, t: torch.func.grad(lambda x: torch.func.vmap(f)(s[None], x).sum())(t[None]),
        (ValueError, "teacher requires grad"),
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", REFUSED)
def test_derivatives_that_would_come_out_as_zero_are_refused_by_transforms_too(function, transform):
    call, (error, message) = REFUSED[transform]
    with pytest.raises(error, match=message):
        call(function, plain(1), plain(2))


def test_a_derivative_by_the_temperature_is_refused():
    student, teacher, ones = plain(1), plain(2), torch.ones(2)

    def loss(temperature):
        return functional.contextual_affinity(student, teacher, temperature).sum()

    for function, at in ((loss, ones[0]), (lambda x: torch.func.vmap(loss)(x).sum(), ones)):
        with pytest.raises(ValueError, match="temperature requires grad"):
            torch.func.grad(function)(at)
        with pytest.raises(NotImplementedError, match="temperature carries a tangent"):
            torch.func.jvp(function, (at,), (at,))
