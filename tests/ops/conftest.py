"""Where the operators are tested: each backend on the devices that it serves."""

import importlib.util
from typing import NamedTuple

import pytest
import torch

from dskd_fast import functional
from dskd_fast.backends import native_build
from dskd_fast.ops import dispatch

FUNCTIONS = [functional.contextual_affinity, functional.cosine_distance]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(seed, dtype=torch.float32, batch=1):
    return random(batch, 5, 3, 4, seed=seed, dtype=dtype)


class Place(NamedTuple):
    backend: str
    device: str


PLACES = [
    *(Place(backend, "cpu") for backend in ("torch", "cpu", "triton")),
    *(Place(backend, "cuda") for backend in ("torch", "triton", "cuda")),
]


def pytest_make_parametrize_id(val):
    return f"{val.backend} on {val.device}" if isinstance(val, Place) else None


def _parameters(places):
    return [pytest.param(place, marks=pytest.mark.gpu if place.device == "cuda" else ()) for place in places]


@pytest.fixture(params=_parameters(PLACES))
def place(request) -> Place:
    """A backend and a device for its tensors."""
    return _available(request.param)


@pytest.fixture(params=_parameters([PLACES[0], Place("triton", "cuda")]))
def any_place(request) -> Place:
    """One for each device: for what the operators do around the backends, of which the others know no more."""
    return _available(request.param)


def _available(place):
    backend, device = place
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
    return place


@pytest.fixture
def restore_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def pristine_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
