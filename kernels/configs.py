"""Block sizes, warps and pipeline stages: one fixed table per architecture, operand type and number of channels.

How the entries were chosen is in README.md. `python -m dskd_fast.kernels.report` shows what the compiler makes of each,
`bench.triton_tune` times them on a GPU.
"""

import copy
from typing import NamedTuple

# N is padded to a multiple of this, which all block sizes divide.
ROW_MULTIPLE = 128
# Channels are padded to a power of two from the first to the second, beyond to a multiple of the second.
SMALLEST_WIDTH, LARGEST_WIDTH = 64, 512


class Blocks(NamedTuple):
    """Rows and keys of a tile, channels per product, warps, stages of the software pipeline."""

    m: int
    n: int
    c: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_C": self.c}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages}


class Config(NamedTuple):
    """Blocks of the two kernels over pairs; `chunk`: columns of the gradient per program."""

    forward: Blocks
    gradient: Blocks
    chunk: int


class CosineBlocks(NamedTuple):
    """Positions and channels of a block of the cosine distance's kernel."""

    p: int
    c: int

    def launch(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {"BLOCK_P": self.p, "BLOCK_C": self.c}


def _entry(forward: tuple[int, ...], gradient: tuple[int, ...], chunk: int) -> Config:
    return Config(Blocks(*forward), Blocks(*gradient), chunk)


# By width: padded channels. `WIDE` serves all multiples of 512 from 1024 on.
WIDE = 1024

_MMA_HALF = {
    64: _entry((64, 64, 64, 4, 3), (64, 64, 64, 4, 2), 64),
    128: _entry((64, 64, 128, 4, 2), (32, 64, 128, 4, 2), 128),
    256: _entry((64, 32, 256, 4, 2), (32, 64, 256, 4, 2), 256),
}
_MMA_TF32 = {
    64: _entry((64, 64, 64, 4, 2), (64, 32, 64, 4, 2), 64),
    128: _entry((64, 32, 128, 4, 2), (32, 32, 128, 4, 2), 128),
}
_FP32 = {
    64: _entry((64, 64, 16, 8, 2), (32, 32, 16, 8, 2), 64),
    128: _entry((64, 64, 16, 8, 2), (64, 32, 16, 8, 2), 128),
    256: _entry((64, 64, 16, 8, 2), (64, 32, 16, 8, 2), 128),
    512: _entry((64, 64, 16, 8, 2), (64, 32, 16, 8, 2), 128),
    WIDE: _entry((64, 64, 16, 8, 2), (64, 32, 16, 8, 2), 128),
}
# 99 KiB of shared memory: rows of 512 channels do not fit.
_SMALL_MEMORY = {
    "half": _MMA_HALF
    | {
        64: _entry((64, 32, 64, 4, 2), (64, 64, 64, 4, 2), 64),
        512: _entry((64, 64, 64, 4, 2), (32, 64, 64, 8, 2), 512),
        WIDE: _entry((64, 64, 64, 4, 2), (32, 64, 64, 8, 2), 512),
    },
    "tf32": _MMA_TF32
    | {
        256: _entry((64, 64, 32, 4, 2), (32, 64, 32, 8, 2), 256),
        512: _entry((64, 64, 32, 4, 2), (32, 64, 32, 8, 2), 256),
        WIDE: _entry((64, 64, 32, 4, 2), (32, 64, 32, 8, 2), 256),
    },
    "fp32": _FP32,
}
_WARPGROUP_TF32 = {
    64: _entry((64, 64, 64, 4, 2), (64, 32, 64, 4, 2), 64),
    128: _entry((64, 32, 128, 4, 2), (64, 32, 128, 4, 2), 128),
    256: _entry((64, 32, 256, 4, 2), (64, 32, 256, 8, 2), 256),
    512: _entry((64, 128, 32, 8, 2), (64, 64, 32, 8, 2), 256),
    WIDE: _entry((64, 128, 32, 8, 2), (64, 64, 32, 8, 2), 256),
}
_TABLE = {
    "sm_80": {
        "half": _MMA_HALF
        | {
            512: _entry((32, 64, 512, 4, 1), (32, 32, 512, 8, 1), 512),
            WIDE: _entry((128, 64, 64, 8, 2), (32, 64, 64, 8, 2), 512),
        },
        "tf32": _MMA_TF32
        | {
            256: _entry((32, 32, 256, 4, 1), (32, 32, 256, 8, 1), 256),
            512: _entry((64, 64, 32, 4, 2), (32, 64, 32, 8, 2), 512),
            WIDE: _entry((64, 64, 32, 4, 2), (32, 64, 32, 8, 2), 512),
        },
        "fp32": _FP32 | {width: _entry((64, 64, 16, 8, 2), (32, 32, 32, 8, 2), 256) for width in (256, 512, WIDE)},
    },
    "sm_89": _SMALL_MEMORY
    | {
        "fp32": _FP32
        | {
            64: _entry((32, 32, 16, 4, 2), (32, 32, 16, 8, 2), 64),
            128: _entry((32, 32, 16, 4, 2), (64, 32, 16, 8, 2), 128),
        },
    },
    "sm_90": {
        "half": {
            64: _entry((64, 64, 64, 4, 2), (64, 64, 64, 4, 2), 64),
            128: _entry((64, 64, 128, 4, 2), (64, 64, 128, 4, 2), 128),
            256: _entry((64, 32, 256, 4, 2), (128, 16, 256, 8, 2), 256),
            512: _entry((64, 32, 512, 4, 2), (64, 16, 512, 8, 2), 512),
            WIDE: _entry((64, 128, 64, 8, 3), (64, 64, 64, 8, 3), 256),
        },
        "tf32": _WARPGROUP_TF32,
        "fp32": _FP32
        | {
            64: _entry((32, 64, 32, 8, 2), (32, 32, 16, 8, 2), 64),
            128: _entry((32, 64, 32, 8, 2), (64, 32, 16, 8, 2), 128),
        },
    },
    "sm_100": {
        "half": {
            64: _entry((64, 64, 64, 4, 2), (64, 32, 64, 4, 2), 64),
            128: _entry((64, 64, 128, 4, 2), (64, 32, 128, 4, 2), 128),
            256: _entry((64, 32, 256, 4, 2), (64, 32, 256, 4, 2), 256),
            512: _entry((64, 32, 512, 4, 2), (64, 32, 512, 8, 2), 512),
            WIDE: _entry((64, 128, 64, 8, 3), (64, 64, 64, 8, 3), 256),
        },
        "tf32": _WARPGROUP_TF32 | {64: _entry((64, 64, 64, 4, 2), (64, 64, 64, 4, 2), 64)},
        "fp32": _FP32,
    },
    "sm_120": _SMALL_MEMORY,
    "gfx942": {
        "half": {
            64: _entry((64, 64, 64, 4, 2), (128, 64, 64, 4, 2), 64),
            128: _entry((64, 64, 128, 4, 2), (64, 32, 128, 4, 2), 128),
            256: _entry((64, 64, 256, 4, 2), (64, 32, 256, 4, 2), 256),
            512: _entry((64, 128, 64, 8, 2), (64, 32, 64, 4, 2), 512),
            WIDE: _entry((64, 128, 64, 8, 2), (64, 32, 64, 4, 2), 512),
        },
        "tf32": {
            64: _entry((64, 64, 64, 4, 2), (64, 32, 64, 4, 2), 64),
            128: _entry((64, 32, 128, 4, 2), (64, 32, 128, 4, 2), 128),
            256: _entry((64, 64, 32, 4, 2), (64, 64, 32, 4, 2), 256),
            512: _entry((64, 64, 32, 4, 2), (64, 64, 32, 4, 2), 256),
            WIDE: _entry((64, 64, 32, 4, 2), (64, 64, 32, 4, 2), 256),
        },
        "fp32": _FP32 | {width: _entry((64, 64, 16, 8, 2), (32, 32, 32, 8, 2), 256) for width in (256, 512, WIDE)},
    },
}


# Each architecture has entries of its own, which tuning may replace.
TABLE: dict[str, dict[str, dict[int, Config]]] = copy.deepcopy(_TABLE)

# What the kernels of `distillation.py` have in place of the table's blocks, where with those they would spill.
DISTILLATION: dict[tuple[str, str, int], dict[str, Blocks]] = {
    ("sm_80", "tf32", 256): {"forward": Blocks(32, 64, 256, 4, 1)},
    ("sm_89", "tf32", 64): {"gradient": Blocks(32, 32, 64, 4, 2)},
    ("sm_120", "half", 128): {"forward": Blocks(64, 32, 128, 4, 2)},
    ("sm_90", "half", 512): {"gradient": Blocks(64, 32, 512, 8, 1)},
    ("sm_100", "half", 512): {"gradient": Blocks(64, 32, 512, 8, 1)},
    ("sm_100", "tf32", 256): {"gradient": Blocks(64, 32, 256, 8, 1)},
}


def config(architecture: str, precision: str, width: int) -> Config:
    """The table's entry for padded channels `width`."""
    return TABLE[architecture][operand_class(precision)][min(width, WIDE)]


def distillation_config(architecture: str, precision: str, width: int) -> Config:
    """The entry for the kernels of `distillation.py`: the table's, but where it would spill registers."""
    changed = DISTILLATION.get((architecture, operand_class(precision), min(width, WIDE)), {})
    return config(architecture, precision, width)._replace(**changed)


def operand_class(precision: str) -> str:
    """bf16 and fp16 share the entries of 16-bit operands."""
    return precision if precision in ("tf32", "fp32") else "half"


def padded_rows(n: int) -> int:
    """N_PAD of the kernels for n positions."""
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE


def padded_channels(c: int) -> int:
    """C_PAD of the kernels for c channels: one of the table's widths or a multiple of the largest."""
    if c > LARGEST_WIDTH:
        return -(-c // LARGEST_WIDTH) * LARGEST_WIDTH
    return max(SMALLEST_WIDTH, 1 << (c - 1).bit_length())


def cosine_blocks(n: int) -> CosineBlocks:
    """Blocks for maps of n positions; n = 1, one long row, is what the local loss makes of a map that it flattens."""
    return CosineBlocks(1, 1024) if n == 1 else CosineBlocks(32, 32)


def nvidia_architecture(major: int, minor: int) -> str:
    """The table's name for a compute capability; later ones than are known get the entries that need least.

    Raises:
        ValueError: below 8.0, which has no bf16 products.
    """
    if major < 8:
        raise ValueError(f"its compute capability is {major}.{minor}, and the kernels need 8.0")
    if (major, minor) == (8, 0):
        return "sm_80"
    return {8: "sm_89", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


def amd_architecture(name: str) -> str:
    """The table's name for AMD's, such as "gfx942:sramecc+:xnack-".

    Raises:
        ValueError: for any that the table has not been made for.
    """
    if name.split(":")[0] != "gfx942":
        raise ValueError(f"its architecture is {name}, and the kernels are made for gfx942")
    return "gfx942"
