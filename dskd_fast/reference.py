"""The textbook formulas, dense and differentiable: the twin that every fast path is tested against in float64.

Nothing here is fast or frugal: `contextual_affinity` stores several (B, N, N) matrices, and in float32 the KL of a
trained student is lost in rounding (see `dskd_fast.backends.torch` for the form that keeps it). Call these with
float64 tensors.
"""

import torch
from torch import Tensor


def normalise(x: Tensor) -> Tensor:
    """L2-normalise the last dimension; a zero vector stays zero and passes no gradient (it has no direction)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.where(norm > 0, 1 / norm.clamp_min(torch.finfo(x.dtype).tiny), 0)


def contextual_affinity(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Per-position KL divergence of the affinity rows (paper eq. 3-6), by the formulas as printed.

    Args:
        student: (B, N, C), floating.
        teacher: (B, N, C), the same dtype.
        temperature: T > 0.

    Returns:
        (B, N): T^2 * KL(softmax_j <t_i, t_j>/T  ||  softmax_j <s_i, t_j>/T). The keys are always the teacher's.
    """
    s, t = normalise(student), normalise(teacher)
    log_p_teacher = torch.log_softmax(t @ t.mT / temperature, dim=-1)
    log_p_student = torch.log_softmax(s @ t.mT / temperature, dim=-1)
    return temperature**2 * (log_p_teacher.exp() * (log_p_teacher - log_p_student)).sum(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Per-position cosine distance 1 - <s_i, t_i> (paper eq. 1): (B, N, C) twice -> (B, N)."""
    return 1 - (normalise(student) * normalise(teacher)).sum(-1)
