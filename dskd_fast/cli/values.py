"""Values of options: text to a number or a path, or a sentence that says what is accepted."""

import argparse
import contextlib
import math
from pathlib import Path
from typing import TypeVar

from dskd_fast.choices import ANOMALIB, BITS_RANGE, METHODS, TEMPERATURE_RANGE, is_method

Number = TypeVar("Number", int, float)

# A promise of less would need more images than there can be.
_LEAST_RATE = 1e-9


def path(text: str) -> Path:
    if not text:  # as from a shell's variable that is not set; to Path it is the current folder
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def natural(text: str) -> int:
    return _number(text, int, "a whole number from 0 up to 2^63 - 1", low=0, high=2**63 - 1)


def positive(text: str) -> int:
    return _number(text, int, "a whole number from 1 up to 2^31 - 1", low=1, high=2**31 - 1)


def port(text: str) -> int:
    return _number(text, int, "a whole number from 0 to 65535", low=0, high=65535)


def bits(text: str) -> int:
    low, high = BITS_RANGE
    return _number(text, int, f"a whole number from {low} to {high}", low=low, high=high)


def positive_number(text: str) -> float:
    return _number(text, float, "a number above 0", low=math.ulp(0.0))


def temperature(text: str) -> float:
    low, high = TEMPERATURE_RANGE
    return _number(text, float, f"a number from {low} to {high:g}", low=low, high=high)


def share(text: str) -> float:
    return _number(text, float, "a number from 0 up to, not including, 1", low=0, high=math.nextafter(1, 0))


def rate(text: str) -> float:
    """A share above 0 and below 1, or a percentage."""
    number = text.strip().removesuffix("%")
    percents = 100 if text.strip().endswith("%") else 1
    value = math.nan
    with contextlib.suppress(ValueError):
        value = float(number) / percents
    if not _LEAST_RATE <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.005 or a percentage such as 0.5%")
    return value


def method(text: str) -> str:
    """A method of the paper's tables, or a model of anomalib."""
    if not is_method(text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(METHODS)} and {ANOMALIB}NAME")
    return text


def finite(text: str) -> float:
    return _number(text, float, "a number")


def _number(text: str, kind: type[Number], accepted: str, *, low: float = -math.inf, high: float = math.inf) -> Number:
    value = None
    with contextlib.suppress(ValueError):
        value = kind(text)
    if value is None or not low <= value <= high or math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {accepted}")
    return value
