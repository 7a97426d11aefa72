"""Every way to compute the contextual affinity and the cosine distance that is timed, ours and others'.

Each takes a student and a teacher (B, C, H, W) and returns the map (B, N) or (B, H, W). What is not ours is written as
a good PyTorch programmer would, without anything of this library.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from dskd_fast import functional
from dskd_fast.ops import dispatch


class Contestant(NamedTuple):
    """One way to compute a map.

    Attributes:
        name, precision: as shown; the precision is the operands' of the matrix products.
        make: called once for each work, returns the function to time.
        refuse: why it cannot run a shape (B, C, H, W) on a device, None if it can.
        ours: whether it is this library's.
        matrices: N x N matrices in float32 that a process takes which keeps the memory it frees, after some calls with
            and without gradient (measured; about twice what one call holds, as freed blocks rarely fit the next; for
            the refusal of what would not fit alone, never shown as a figure).
    """

    name: str
    precision: str
    make: Callable[[], Callable[[Tensor, Tensor], Tensor]]
    refuse: Callable[[tuple[int, ...], torch.device], str | None] = lambda shape, device: None
    ours: bool = False
    matrices: float = 0

    def refusal(self, shape: tuple[int, ...], device: torch.device, free: int) -> str | None:
        """Why it cannot run a shape, None if it can; `free` is the device's free memory in bytes."""
        needed = self.matrices * 4 * shape[0] * (shape[2] * shape[3]) ** 2
        if needed > 0.8 * free:
            return f"it would take about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
        return self.refuse(shape, device)


# Contextual affinity


def _rows(maps: Tensor) -> Tensor:
    return nnf.normalize(maps.flatten(2).mT, dim=-1)


def textbook(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The paper's eq. 3-6 as printed."""
    s, t = _rows(student), _rows(teacher)
    log_p_teacher = torch.log_softmax(t @ t.mT / temperature, dim=-1)
    log_p_student = torch.log_softmax(s @ t.mT / temperature, dim=-1)
    return temperature**2 * nnf.kl_div(log_p_student, log_p_teacher, reduction="none", log_target=True).sum(-1)


def textbook_bf16(student: Tensor, teacher: Tensor) -> Tensor:
    """The same under autocast: operands in bf16, softmax in float32."""
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        return textbook(student, teacher)


def difference_form(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL = T^2 log1p(sum p (expm1(c) - c)), all of it dense: the form the kernels stream."""
    s, t = _rows(student), _rows(teacher)
    keys = t - t.mean(1, keepdim=True)
    p = torch.softmax(t @ keys.mT / temperature, dim=-1)
    d = (s - t) @ keys.mT / temperature
    c = d - (p * d).sum(-1, keepdim=True)
    series = c * c * (0.5 + c * (1 / 6 + c * (1 / 24 + c * (1 / 120 + c / 720))))
    tail = torch.where(c.abs() < 0.3, series, torch.expm1(c) - c)
    return temperature**2 * (p * tail).sum(-1).log1p()


def tiled(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The textbook form for 512 rows at a time, each block recomputed in the backward pass: what saves memory."""
    s, t = _rows(student), _rows(teacher)

    def block(s_rows: Tensor, t_rows: Tensor) -> Tensor:
        log_p_teacher = torch.log_softmax(t_rows @ t.mT / temperature, dim=-1)
        log_p_student = torch.log_softmax(s_rows @ t.mT / temperature, dim=-1)
        return (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(-1)

    blocks = zip(s.split(512, 1), t.split(512, 1), strict=True)
    if torch.is_grad_enabled():
        found = [checkpoint(block, s_rows, t_rows, use_reentrant=False) for s_rows, t_rows in blocks]
    else:
        found = [block(s_rows, t_rows) for s_rows, t_rows in blocks]
    return temperature**2 * torch.cat(found, 1)


def attention(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Through fused attention with the teacher as keys and values.

    With o = softmax(q k^T) v and its log-sum-exp for q = t and q = s: KL = T <t - s, o_t> - T^2 (lse_t - lse_s), and
    its gradient is T (o_s - o_t).
    """
    s, t = _rows(student).contiguous(), _rows(teacher).contiguous()  # other strides give wrong values
    return _AttentionKl.apply(s, t, temperature)


class _AttentionKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s: Tensor, t: Tensor, temperature: float) -> Tensor:
        o_t, lse_t = _attend(t[:, None], t[:, None], 1 / temperature)
        o_s, lse_s = _attend(s[:, None], t[:, None], 1 / temperature)
        ctx.save_for_backward(temperature * (o_s - o_t))
        return temperature * ((t - s) * o_t).sum(-1) - temperature**2 * (lse_t - lse_s)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.unsqueeze(-1) * ctx.saved_tensors[0], None, None


def _attend(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B, 1, N, C) -> output (B, N, C) and log-sum-exp (B, N), by the internals of scaled_dot_product_attention."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=scale)
    else:
        # The other fused kernels take no float32, or no heads of more than 256 channels.
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, k, None, True, scale=scale)[:2]
    return out[:, 0], lse.reshape(q.shape[0], -1)[:, : q.shape[2]]


def keops(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Symbolic matrices of KeOps, reduced without being stored."""
    from pykeops.torch import LazyTensor

    s, t = _rows(student).contiguous(), _rows(teacher).contiguous()
    scale = temperature**-0.5
    queries_s, queries_t = LazyTensor((s * scale)[:, :, None]), LazyTensor((t * scale)[:, :, None])
    keys = LazyTensor((t * scale)[:, None])
    a_s, a_t = (queries_s * keys).sum(-1), (queries_t * keys).sum(-1)
    mean = a_t.sumsoftmaxweight(a_t - a_s, axis=2)
    return temperature**2 * (mean - a_t.logsumexp(axis=2) + a_s.logsumexp(axis=2)).squeeze(-1)


def _refuse_keops(shape: tuple[int, ...], device: torch.device) -> str | None:
    if importlib.util.find_spec("pykeops") is None:
        return 'KeOps is not installed: pip install -e ".[baselines]"'
    return None


def _compiled(function: Callable) -> Callable:
    # By default a function is compiled for eight shapes, and then silently run eagerly.
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=False)


def refuse_backend(backend: str, precision: str | None):
    """What refuses a shape on a device where a backend of ours cannot serve it."""

    def refuse(shape: tuple[int, ...], device: torch.device) -> str | None:
        x = torch.empty(1, shape[1], 1, 1, device=device)
        if backend == "triton" and device.type == "cpu":
            return "on a CPU the Triton kernels run in an interpreter, which tests and does not perform"
        return dispatch.refusal(backend, x, x, precision)

    return refuse


def _ours(backend: str, precision: str) -> Contestant:
    function = functools.partial(functional.contextual_affinity, precision=precision, backend=backend)
    return Contestant(backend, precision, lambda: function, refuse_backend(backend, precision), ours=True)


EAGER = Contestant("eager", "fp32", lambda: textbook, matrices=14)
_OTHERS = (
    EAGER,
    Contestant("eager", "bf16", lambda: textbook_bf16, matrices=12.5),
    Contestant("eager, difference form", "fp32", lambda: difference_form, matrices=30),
    Contestant("torch.compile of eager", "fp32", lambda: _compiled(textbook), matrices=6.5),
    Contestant("torch.compile of the difference form", "fp32", lambda: _compiled(difference_form), matrices=8.5),
    Contestant("tiles of rows, checkpointed", "fp32", lambda: tiled),
    Contestant("fused attention", "fp32", lambda: attention),
    Contestant("KeOps", "fp32", lambda: keops, _refuse_keops),
)
AFFINITY = _OTHERS + tuple(_ours(backend, p) for backend in dispatch.BACKENDS for p in dispatch.PRECISIONS)


# Cosine distance


def cosine_textbook(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 1 with PyTorch's own function."""
    return 1 - nnf.cosine_similarity(student, teacher, dim=1)


def _our_cosine(backend: str) -> Contestant:
    function = functools.partial(functional.cosine_distance, backend=backend)
    return Contestant(backend, "fp32", lambda: function, refuse_backend(backend, None), ours=True)


COSINE = (
    Contestant("eager", "fp32", lambda: cosine_textbook),
    Contestant("torch.compile of eager", "fp32", lambda: _compiled(cosine_textbook)),
    *(_our_cosine(backend) for backend in dispatch.BACKENDS),
)
