"""The blocks of dskd_fast/losses/README.md, and the formula that they are compared with."""

from pathlib import Path

from torch.nn.functional import log_softmax, normalize

import dskd_fast


def blocks(chapter):
    """The code of a chapter's sections, by their titles."""
    readme = (Path(dskd_fast.__file__).parent / "losses/README.md").read_text(encoding="utf-8")
    sections = readme.partition(f"\n## {chapter}\n")[2].partition("\n## ")[0].split("\n### ")[1:]
    return {section.partition("\n")[0]: section.partition("```python\n")[2].partition("```")[0] for section in sections}


def kl(teacher_logits, student_logits):
    log_p, log_q = log_softmax(teacher_logits, -1), log_softmax(student_logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def unit(*tensors):
    return [normalize(x.double(), dim=-1) for x in tensors]


def dense(student, teacher, temperature):
    """The paper's loss (eq. 3-6) of maps (B, C, H, W) or tokens (B, N, C), in float64, with all N x N affinities."""
    s, t = unit(*(x.flatten(2).mT if x.dim() == 4 else x for x in (student, teacher)))
    return temperature**2 * kl(t @ t.mT / temperature, s @ t.mT / temperature).mean()
