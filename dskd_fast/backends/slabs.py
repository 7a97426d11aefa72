"""What both affinity losses of the "torch" backend share: slabs of rows, unit vectors, products of rounded operands."""

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# On a CPU a slab's working set should stay in the second-level cache; on a GPU it should fill the device.
SLAB_ELEMENTS = {"cpu": 1 << 18}
SLAB_ELEMENTS_ELSEWHERE = 1 << 23
# But fewer rows would have all keys read from memory for little work: with 16, N = 16,384 took twice as long.
FEWEST_ROWS = 64
# A CPU's products add up float32 key after key: over 2^18 of them the gradient of two rows was off by 8e-5.
MOST_KEYS = {"cpu": 1 << 13}

# |d| up to which expm1(d) - d is summed as a series.
SERIES_RADIUS = 1.0
# Two calls at once must not restore each other's settings.
_SETTINGS_LOCK = threading.RLock()


def directions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors s and t, their difference s - t, and 1/|student|, in float64 where the device has it.

    In float32 the difference of two nearly equal unit vectors would already have lost the digits that the difference
    form exists to keep. A zero vector stays zero, with 1/|student| = 0: it has no direction and takes no gradient.
    """
    s, inverse_norm = normalise(student)
    t, _ = normalise(teacher)
    return s, t, s - t, inverse_norm


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(widest_dtype(x.device))
    norm = torch.linalg.vector_norm(x, dim=-1)
    inverse_norm = torch.where(norm > 0, 1 / norm, 0.0)
    return x * inverse_norm.unsqueeze(-1), inverse_norm


def widest_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def slab_sizes(device: torch.device, rows: int, keys: int) -> tuple[int, int]:
    """Rows and keys of a slab of the distillation against any keys."""
    slab = SLAB_ELEMENTS.get(device.type, SLAB_ELEMENTS_ELSEWHERE)
    rows = min(rows, max(FEWEST_ROWS, slab // keys))
    return rows, min(keys, max(1, slab // rows), MOST_KEYS.get(device.type, keys))


def expm1_tail(c: Tensor) -> Tensor:
    """expm1(c) - c for |c| <= 1."""
    return expm1_tail_series(c, SERIES_RADIUS)


def expm1_tail_series(c: Tensor, radius: float) -> Tensor:
    """expm1(c) - c = c^2/2! + c^3/3! + ... for |c| <= radius <= 1, to the last bit or two."""
    # Horner on c^2 (1/2! + c/3! + c^2/4! + ...), cut where the next term is below half an ulp of the first.
    last = 2
    while 2 * radius ** (last - 1) / math.factorial(last + 1) > torch.finfo(c.dtype).eps / 2:
        last += 1
    tail = torch.full_like(c, 1 / math.factorial(last))
    for k in range(last - 1, 1, -1):
        torch.addcmul(torch.full((), 1 / math.factorial(k), dtype=c.dtype, device=c.device), tail, c, out=tail)
    return tail.mul_(c).mul_(c)


class Product:
    """Matrix products of rounded operands with accumulation in `dtype`, whatever the process-wide settings say."""

    def __init__(self, precision: str, dtype: torch.dtype, device: torch.device) -> None:
        self.precision = precision
        self.dtype = dtype
        self.device = device

    @contextlib.contextmanager
    def flags(self) -> Iterator[None]:
        """Hold off autocast and the process-wide float32 product settings, either of which would round behind our back.

        Where the settings are as they should be, as they are by default, they are only read. Changing them is what
        torch offers, but other threads' products see it while it lasts.
        """
        with torch.autocast(self.device.type, enabled=False):
            if self.device.type == "cuda":
                setting, wanted = torch.backends.cuda.matmul, "tf32" if self.precision == "tf32" else "ieee"
            elif self.device.type == "cpu":
                # torch's own types leave it out.
                setting, wanted = torch.backends.mkldnn.matmul, "ieee"  # type: ignore[attr-defined]
            else:
                yield
                return
            with _SETTINGS_LOCK:
                before = setting.fp32_precision
                if before == wanted or (before, wanted) == ("none", "ieee"):
                    yield
                    return
                setting.fp32_precision = wanted
                try:
                    yield
                finally:
                    setting.fp32_precision = before

    def operand(self, x: Tensor, scale_dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Round x to the operand type; returns (operand, scale) with x = operand * scale.

        fp16 alone has a range to mind: x is brought to a largest magnitude in [1/2, 1) over `scale_dims`, by a power
        of two, since differences of unit vectors reach below fp16's smallest normal number.
        """
        if self.precision == "fp32":
            return x, None
        if self.precision == "tf32":
            return round_to_tf32(x), None
        if self.precision == "bf16":
            rounded = x.to(torch.bfloat16)
            return (rounded if self.device.type == "cuda" else rounded.float()), None
        exponent = torch.frexp(x.abs().amax(scale_dims, keepdim=True)).exponent
        scale = torch.ldexp(torch.ones_like(exponent, dtype=x.dtype), exponent)
        rounded = (x / scale).to(torch.float16)
        return (rounded if self.device.type == "cuda" else rounded.float()), scale

    def __call__(
        self,
        left: tuple[Tensor, Tensor | None],
        right: tuple[Tensor, Tensor | None],
        transpose: bool = False,
    ) -> Tensor:
        (x, x_scale), (y, y_scale) = left, right
        y = y.mT if transpose else y
        out = torch.bmm(x, y) if x.dtype == self.dtype else torch.bmm(x, y, out_dtype=self.dtype)
        if x_scale is not None and y_scale is not None:
            out.mul_(x_scale * y_scale)
        return out


def round_to_tf32(x: Tensor) -> Tensor:
    """Nearest value with tf32's 10-bit mantissa, so that every device multiplies the same operands."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
