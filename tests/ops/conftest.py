"""Where the operators are tested: each backend on the devices that it serves."""

import importlib.util
from typing import NamedTuple

import pytest
import torch

from dskd_fast.backends import native_build
from dskd_fast.ops import dispatch


class Place(NamedTuple):
    backend: str
    device: str


PLACES = [
    *(Place(backend, "cpu") for backend in ("torch", "cpu", "triton")),
    *(Place(backend, "cuda") for backend in ("torch", "triton", "cuda")),
]


def pytest_make_parametrize_id(val):
    return f"{val.backend} on {val.device}" if isinstance(val, Place) else None


@pytest.fixture(
    params=[pytest.param(place, marks=pytest.mark.gpu if place.device == "cuda" else ()) for place in PLACES]
)
def place(request) -> Place:
    """A backend and a device for its tensors."""
    backend, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if backend in native_build.EXTENSIONS:
        try:
            native_build.load(backend)
        except ImportError as error:
            pytest.skip(str(error))
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if backend == "triton" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a GPU, whose own variant of this test runs instead")
    if backend == "triton" and device == "cpu":
        one = torch.ones(1, 1, 1, 1)
        reason = dispatch.refusal("triton", one, one, None) or ""
        if "does not work with numpy" in reason:
            pytest.skip(reason)
    return Place(backend, device)
