"""What is computed in the benchmarks of the distillation against any keys, and every way that is timed.

Each contestant takes the tensors of `Inputs` and returns the KL (B, N), 0 in masked rows. What is not ours is written
as a good PyTorch programmer would, without anything of this library.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from bench.contestants import refuse_backend
from dskd_fast import functional
from dskd_fast.ops import dispatch

MODES = ("scoring", "forward+backward")
# In B N K C matrix products: both logits, and the gradient's.
UNITS = {"scoring": 2, "forward+backward": 3}
# Largest errors of the map and of the gradient of ours, from T of 0.1 up (`functional.affinity_distillation`);
# a logit's rounding grows with 1/T.
PROMISED = {"fp32": (2e-5, 1e-4), "tf32": (3e-4, 1e-3), "fp16": (3e-4, 1e-3), "bf16": (2e-3, 5e-3)}
_OTHERS_ALLOWED = 0.1
_MANY_ROWS = 2048


class Work(NamedTuple):
    """Rows (B, N, C), keys (K, C) shared by all images or, with `keys` None, the teacher's own N of each image."""

    label: str
    batch: int
    rows: int
    keys: int | None
    channels: int
    student_temperature: float
    teacher_temperature: float
    masked: float = 0.0
    """Share of each image's tokens, at its end, that take no part."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.rows, self.keys or self.rows, self.channels


WORKS = (
    Work("SEED, a queue", 1, 256, 65_536, 128, 0.07, 0.01),
    Work("CIRKD, pixels and a memory", 1, 2 * 4096, 8 * 4096, 256, 0.1, 0.1),
    Work("ViT tokens, a third masked", 16, 1369, None, 768, 0.1, 0.1, masked=1 / 3),
)


class Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    keys: Tensor | None
    mask: Tensor | None
    """(B, N) of rows and keys, True for what takes part."""


def inputs(work: Work, noise: float, device: torch.device, rows: int | None = None) -> Inputs:
    """Gaussian features and the same with Gaussian noise of a size; `rows` takes the first so many alone."""
    generator = torch.Generator().manual_seed(0)
    shape = (work.batch, work.rows, work.channels)
    teacher = torch.randn(shape, generator=generator)
    student = teacher + noise * torch.randn(shape, generator=generator)
    keys = None if work.keys is None else torch.randn((work.keys, work.channels), generator=generator).to(device)
    mask = None
    if work.masked:
        mask = (torch.arange(work.rows) < (1 - work.masked) * work.rows).expand(work.batch, -1).to(device)
    return Inputs(*(x[:, :rows].to(device) for x in (student, teacher)), keys, mask)


class Contestant(NamedTuple):
    """One way: `make(work, inputs)` is called once, not timed, and gives the function of the student to time."""

    name: str
    precision: str
    make: Callable[[Work, Inputs], Callable[[Tensor], Tensor]]
    refuse: Callable[[tuple[int, ...], torch.device], str | None] = lambda shape, device: None
    ours: bool = False
    matrices: float = 0
    """N x K matrices of float32 that a call with its gradient holds, measured; to refuse what would not fit."""

    def unfit(self, work: Work) -> str | None:
        """Why it has no row in a work's tables that could be timed, None if it has."""
        if self.name.endswith("keys prepared") and work.keys is None:
            return "the keys are the teacher's own, new in every call"
        if self.name.endswith("keys prepared") and work.batch * work.rows > _MANY_ROWS:
            return "preparing the keys is a hundredth of a call with so many rows"
        if self.name == "as published" and work.masked:
            return "no published code that masks is known"
        return None

    def refusal(self, work: Work, device: torch.device, free: int) -> str | None:
        """Why it cannot run a work on a device of which so many bytes are free, None if it can."""
        batch, rows, keys, _ = work.shape
        needed = self.matrices * 4 * batch * rows * keys
        if needed > 0.9 * free:
            return f"out of memory: it takes about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        if (self.name.split(",")[0], self.precision, device.type) == ("torch", "bf16", "cpu"):
            return "there it multiplies in float32 what it has rounded"
        return self.unfit(work) or self.refuse(work.shape, device)


def _logits(work: Work, x: Inputs, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    keys = nnf.normalize(x.teacher if x.keys is None else x.keys, dim=-1)
    a, b = (
        nnf.normalize(v, dim=-1) @ keys.mT / t
        for v, t in ((teacher, work.teacher_temperature), (student, work.student_temperature))
    )
    if x.mask is not None:
        a, b = (z.masked_fill(~x.mask.unsqueeze(1), -torch.inf) for z in (a, b))
    return a, b


def _kl(work: Work, x: Inputs, student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = (z.log_softmax(-1) for z in _logits(work, x, student, teacher))
    difference = log_p - log_q if x.mask is None else (log_p - log_q).masked_fill(~x.mask.unsqueeze(1), 0)
    return (log_p.exp() * difference).sum(-1)


def _of_rows(x: Inputs, kl: Tensor) -> Tensor:
    return kl if x.mask is None else kl * x.mask


def eager(work: Work, x: Inputs, student: Tensor) -> Tensor:
    """Both softmaxes whole."""
    return _of_rows(x, _kl(work, x, student, x.teacher))


def eager_bf16(work: Work, x: Inputs, student: Tensor) -> Tensor:
    """The same under autocast."""
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        return eager(work, x, student)


def published(work: Work, x: Inputs, student: Tensor) -> Tensor:
    """As the papers' codes have it: soft labels of the teacher, then a cross-entropy (SEED) or `kl_div` (CIRKD)."""
    a, b = _logits(work, x, student, x.teacher)
    p, log_q = a.softmax(-1), b.log_softmax(-1)
    if work.label.startswith("SEED"):
        return -(p * log_q).sum(-1)
    return nnf.kl_div(log_q, p, reduction="none").sum(-1)


def tiled(work: Work, x: Inputs, student: Tensor) -> Tensor:
    """512 rows at a time, recomputed in the backward: what saves memory."""

    def block(s_rows: Tensor, t_rows: Tensor) -> Tensor:
        return _kl(work, x, s_rows, t_rows)

    found = [
        checkpoint(block, s, t, use_reentrant=False) if torch.is_grad_enabled() else block(s, t)
        for s, t in zip(student.split(512, 1), x.teacher.split(512, 1), strict=True)
    ]
    return _of_rows(x, torch.cat(found, 1))


def attention(work: Work, x: Inputs, student: Tensor) -> Tensor:
    """Through fused attention with the keys as keys and values, whose log-sum-exps it has."""
    s, t = (
        (nnf.normalize(v, dim=-1) / temperature).contiguous()
        for v, temperature in ((student, work.student_temperature), (x.teacher, work.teacher_temperature))
    )
    keys = nnf.normalize(x.teacher if x.keys is None else x.keys.expand(work.batch, -1, -1), dim=-1).contiguous()
    return _of_rows(x, _AttentionKl.apply(s, t, keys, x.mask))


class _AttentionKl(torch.autograd.Function):
    """KL = <t - s, o_t> - lse_t + lse_s, with s and t divided by their temperatures; its gradient is o_s - o_t."""

    @staticmethod
    def forward(ctx, s: Tensor, t: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        (o_t, lse_t), (o_s, lse_s) = (_attend(v, keys, mask) for v in (t, s))
        ctx.save_for_backward(o_s - o_t)
        return ((t - s) * o_t).sum(-1) - lse_t + lse_s

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.unsqueeze(-1) * ctx.saved_tensors[0], None, None, None


def _attend(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    aten = torch.ops.aten
    bias = None if mask is None else torch.where(mask, 0.0, -torch.inf)[:, None, None].expand(-1, 1, q.shape[1], -1)
    q, k = q[:, None], k[:, None]
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, attn_mask=bias, scale=1.0)
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, k, bias, True, scale=1.0)[:2]
    return out[:, 0], lse.reshape(q.shape[0], -1)[:, : q.shape[2]]


def _other(name: str, precision: str, function: Callable, matrices: float, compiled: bool = False) -> Contestant:
    def make(work: Work, x: Inputs) -> Callable[[Tensor], Tensor]:
        call = functools.partial(function, work, x)
        return torch.compile(call, dynamic=False) if compiled else call

    return Contestant(name, precision, make, matrices=matrices)


def _ours(backend: str, precision: str, prepared: bool) -> Contestant:
    def make(work: Work, x: Inputs) -> Callable[[Tensor], Tensor]:
        keys: Tensor | functional.PreparedKeys | None = x.keys
        if prepared and x.keys is not None:
            keys = functional.prepare_keys(x.keys, precision=precision, backend=backend)
        return lambda student: functional.affinity_distillation(
            student,
            x.teacher,
            keys,
            student_temperature=work.student_temperature,
            teacher_temperature=work.teacher_temperature,
            key_mask=x.mask,
            row_mask=x.mask,
            precision=precision,
            backend=backend,
        )

    def refuse(shape: tuple[int, ...], device: torch.device) -> str | None:
        return refuse_backend(backend, precision)((1, shape[3], 1, 1), device)

    return Contestant(f"{backend}{', keys prepared' * prepared}", precision, make, refuse, ours=True)


CONTESTANTS = (
    _other("eager", "fp32", eager, 5),
    _other("eager", "bf16", eager_bf16, 2.6),
    _other("as published", "fp32", published, 7),
    _other("torch.compile of eager", "fp32", eager, 4, compiled=True),
    _other("tiles of rows, checkpointed", "fp32", tiled, 0),
    _other("fused attention", "fp32", attention, 0),
    *(
        _ours(backend, precision, prepared)
        for backend in dispatch.BACKENDS
        for precision in ("fp32", "bf16")
        for prepared in (False, True)
    ),
)


def run(function: Callable[[Tensor], Tensor], student: Tensor, mode: str) -> tuple[Tensor, Tensor | None]:
    """The KL and, with "forward+backward", the gradient of its sum with respect to the student."""
    if mode == "scoring":
        with torch.inference_mode():
            return function(student), None
    student = student.detach().requires_grad_()
    values = function(student)
    values.sum().backward()
    return values.detach(), student.grad


def call_of(work: Work, mode: str, index: int, device: torch.device) -> Callable[[], tuple]:
    """The call of a contestant, prepared."""
    x = inputs(work, 1.0, device)
    return functools.partial(run, CONTESTANTS[index].make(work, x), x.student, mode)


def errors(work: Work, contestant: Contestant, device: torch.device, per_image: bool = False) -> dict[str, list[float]]:
    """Relative L2 errors {noise: [KL, gradient]} of the first and the last rows of the last image against float64.

    Of what is not ours, with keys given, so few rows are computed at all: they know nothing of each other. `per_image`
    gives each image keys of its own.
    """
    found = {}
    rows = work.rows if contestant.ours or work.keys is None else min(work.rows, 256)
    some = torch.arange(rows, device=device)
    some = some if rows < 64 else some[torch.cat([some[:32], some[-32:]])]
    for label, noise in (("100 %", 1.0), ("1 %", 0.01)):
        x = inputs(work, noise, device, rows)
        if per_image and x.keys is not None:
            x = x._replace(keys=torch.stack([x.keys.roll(i, -1) for i in range(work.batch)]))
        got = run(contestant.make(work, x), x.student, "forward+backward")
        found[label] = [
            ((z[-1, some] - y).norm() / y.norm()).item() for z, y in zip(got, _truth(work, x, some), strict=True)
        ]
        if contestant.name == "as published" and work.label.startswith("SEED"):
            found[label][0] = None  # a cross-entropy: the KL and the teacher's entropy
    return found


def limits(work: Work, contestant: Contestant) -> list[float]:
    """The largest errors of the map and of the gradient with which a contestant passes."""
    if not contestant.ours:
        return [_OTHERS_ALLOWED] * 2
    # Twice, since few rows and channels do not average.
    return [2 * max(1, 0.1 / work.teacher_temperature) * x for x in PROMISED[contestant.precision]]


def complaint(work: Work, contestant: Contestant, found: dict[str, list[float]]) -> str | None:
    """Why a contestant gets no time, None if it is correct; what is not ours, at 100 % noise alone."""
    for label in found if contestant.ours else ("100 %",):
        for what, error, limit in zip(("KL", "gradient"), found[label], limits(work, contestant), strict=True):
            if error is not None and not error <= limit:
                return (
                    f"it is wrong: the {what} is off by {error:.2g} of its size at {label} noise, {limit:.2g} allowed"
                )
    return None


def _truth(work: Work, x: Inputs, some: Tensor) -> tuple[Tensor, Tensor]:
    """KL (R,) and gradient (R, C) of rows of the last image, in float64."""
    student = x.student[-1:, some].double().requires_grad_()
    keys = x.teacher[-1:] if x.keys is None else x.keys[-1:] if x.keys.dim() == 3 else x.keys
    wide = Inputs(student, x.teacher[-1:, some].double(), keys.double(), None if x.mask is None else x.mask[-1:])
    kl = _kl(work, wide, student, wide.teacher)
    if x.mask is not None:
        kl = kl * x.mask[-1:, some]
    kl.sum().backward()
    return kl[0].detach(), student.grad[0]
