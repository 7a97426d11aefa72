"""Errors against float64, and the gate that a contestant has to pass before it is timed."""

from functools import cache

import torch
from torch import Tensor

from bench.contestants import Contestant
from bench.work import features, run
from dskd_fast import reference

NOISES = {"100 %": 1.0, "1 %": 0.01}
_ROWS = 512

# Half a unit in the last place of the operands. A KL is quadratic in the difference of the affinities and so takes
# twice the relative error of each of its two operands: 4 roundoffs; the gradient takes the keys' once more. Twice that,
# for what cancels. Sums of N or C products in float32 add a random walk of that many steps.
_ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-9, "fp16": 2.0**-11}
_ROUNDOFFS_ALLOWED = 8
# What is not ours has to compute the same thing where that is easy, no more.
_OTHERS_ALLOWED = 0.05


def errors(function, kind: str, shape: tuple[int, ...], device: torch.device) -> dict[str, list[float]]:
    """Relative L2 errors {noise: [map, gradient]}, the largest of the first and the last image and of all modes.

    At most 512 positions of an image are looked at.
    """
    found = {}
    rows = _sample(shape[2] * shape[3], device)
    for label, noise in NOISES.items():
        student, teacher = features(shape, noise, device)
        values, gradient = run(function, student, teacher, "forward+backward")
        scored, _ = run(function, student, teacher, "scoring")
        worst = [0.0, 0.0]
        for image in {0, shape[0] - 1}:
            true_values, true_gradient = _known_truth(kind, shape, noise, image, device)
            for got in (values.detach(), scored):
                worst[0] = max(worst[0], relative(got.flatten(1)[image, rows], true_values))
            # The gradient of the mean over all positions of all images, brought back to that of each position.
            got_gradient = gradient[image].flatten(1).mT[rows] * (shape[0] * shape[2] * shape[3])
            worst[1] = max(worst[1], relative(got_gradient, true_gradient))
        found[label] = worst
    return found


def complaint(contestant: Contestant, found: dict[str, list[float]], shape: tuple[int, ...]) -> str | None:
    """Why a contestant gets no time, None if it is correct."""
    checked = found if contestant.ours else {"100 %": found["100 %"]}
    limit = allowed(contestant, shape)
    for label, pair in checked.items():
        for what, error in zip(("map", "gradient"), pair, strict=True):
            if not error <= limit:
                return (
                    f"it is wrong: the {what} is off by {error:.2g} of its size at {label} noise, {limit:.2g} allowed"
                )
    return None


def allowed(contestant: Contestant, shape: tuple[int, ...]) -> float:
    """The largest error with which a contestant passes."""
    if not contestant.ours:
        return _OTHERS_ALLOWED
    accumulation = max(shape[1], shape[2] * shape[3]) ** 0.5 * 2.0**-24
    return _ROUNDOFFS_ALLOWED * _ROUNDOFF[contestant.precision] + accumulation


def truth(kind: str, student: Tensor, teacher: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The map and each entry's gradient at some positions of one image (C, H, W), in float64 by the textbook."""
    s, t = (x.flatten(1).mT.double() for x in (student, teacher))
    s = s[rows].requires_grad_()
    if kind == "cosine":
        values = reference.cosine_distance(s, t[rows])
    else:
        keys, queries = reference.normalise(t), reference.normalise(s)
        log_p_teacher = torch.log_softmax(keys[rows] @ keys.mT, dim=-1)
        log_p_student = torch.log_softmax(queries @ keys.mT, dim=-1)
        values = (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(-1)
    values.sum().backward()
    return values.detach(), s.grad


@cache
def _known_truth(kind: str, shape: tuple[int, ...], noise: float, image: int, device: torch.device) -> tuple:
    """`truth` at the positions that the gate looks at, the same for all contestants of a work."""
    student, teacher = features(shape, noise, device)
    return truth(kind, student[image], teacher[image], _sample(shape[2] * shape[3], device))


def relative(got: Tensor, true: Tensor) -> float:
    """Relative L2 error, infinite where there is a NaN."""
    error = ((got.double() - true).norm() / true.norm()).item()
    return error if error == error else float("inf")


def _sample(positions: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(positions, generator=generator)[:_ROWS].to(device)


def convergence(contestants: list[Contestant], device: torch.device) -> list[dict]:
    """Error of the KL map as the student converges, at N = 1024 and C = 256."""
    shape = (1, 256, 32, 32)
    rows = torch.arange(1024, device=device)
    points = []
    for noise in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        student, teacher = features(shape, noise, device)
        true, _ = truth("affinity", student[0], teacher[0], rows)
        for contestant in contestants:
            values, _ = run(contestant.make(), student, teacher, "scoring")
            points.append(
                {
                    "noise": noise,
                    "contestant": contestant.name,
                    "precision": contestant.precision,
                    "ours": contestant.ours,
                    "error": relative(values.flatten(), true),
                }
            )
    return points
