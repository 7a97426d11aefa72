"""Contextual Affinity Distillation (DSKD, arXiv 2307.03101) for image anomaly detection."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dskd_fast import functional
    from dskd_fast.losses import AffinityDistillationLoss, ContextualAffinityLoss, CosineDistanceLoss
    from dskd_fast.models import DSKD
    from dskd_fast.runs.folder import load

__version__ = "0.2.0"

__all__ = [
    "DSKD",
    "AffinityDistillationLoss",
    "ContextualAffinityLoss",
    "CosineDistanceLoss",
    "__version__",
    "functional",
    "load",
]

# Imported when asked for: the losses need no timm, which takes seconds, and the command line's help no torch.
_MODULES = {
    "functional": "dskd_fast.functional",
    "AffinityDistillationLoss": "dskd_fast.losses",
    "ContextualAffinityLoss": "dskd_fast.losses",
    "CosineDistanceLoss": "dskd_fast.losses",
    "DSKD": "dskd_fast.models",
    "load": "dskd_fast.runs.folder",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'dskd_fast' has no attribute {name!r}")
    module = import_module(_MODULES[name])
    globals()[name] = module if name == "functional" else getattr(module, name)
    return globals()[name]


if "torch" in sys.modules:
    # What torch.export saved with a loss in it needs its operator; `import dskd_fast.functional` registers it always.
    import_module("dskd_fast.functional")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
