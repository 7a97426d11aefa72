import importlib.util
import itertools
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dskd_fast import functional
from dskd_fast.backends import native_build
from dskd_fast.errors import UserError
from dskd_fast.ops import dispatch
from dskd_fast.ops.dispatch import BACKEND_VARIABLE, BACKENDS, PRECISIONS, BackendError, choose, refusal

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")


def of(dtype, device="cpu", shape=(1, 2, 3, 4)):
    """A tensor of that description and nothing in it: of any size, and on devices that this machine lacks."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def no_cuda_extension(monkeypatch):
    """These tests make up GPUs, for which kernels would be built for a minute."""
    if not torch.cuda.is_available():
        monkeypatch.setitem(native_build._STATES, "cuda", native_build.State("it is not built for GPUs made up", ""))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FUNCTIONS = [functional.contextual_affinity, functional.cosine_distance]


@pytest.fixture
def backends(monkeypatch):
    """Stands for the backends: {name: why it refuses, or the error of loading it}; others serve every call."""
    refusals = {}

    def load(name):
        if isinstance(error := refusals.get(name), Exception):
            raise error
        return SimpleNamespace(refusal=lambda student, teacher, precision: refusals.get(name))

    monkeypatch.setattr(dispatch, "load", load)
    return refusals


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps", "meta"])
def test_the_first_of_the_devices_backends_is_chosen(backends, device):
    x = of(torch.float32, device)
    names = dispatch.AUTOMATIC.get(device, dispatch.AUTOMATIC_ELSEWHERE)
    for i, name in enumerate(names):
        assert choose("auto", x, x, "fp32") == (name, {passed: f"not {passed}" for passed in names[:i]})
        backends[name] = f"not {name}"
    with pytest.raises(RuntimeError, match="no backend can serve this call") as raised:
        choose("auto", x, x, "fp32")
    assert all(f"not {name}" in str(raised.value) for name in names)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "No module named 'triton'"),
        (ImportError("libcuda is missing"), "libcuda is missing"),
        (
            ModuleNotFoundError("No module named 'dskd_fast.kernels'", name="dskd_fast.kernels"),
            "dskd_fast is imported from its repository, without its kernels: pip install -e . there",
        ),
        (OSError("a broken installation"), "importing it failed: OSError: a broken installation"),
    ],
)
def test_a_backend_that_cannot_be_imported_is_passed_over_with_the_reason(backends, error, reason):
    backends["triton"] = error
    x = of(torch.float32, "cuda")
    assert choose("auto", x, x, "bf16") == (dispatch.AUTOMATIC["cuda"][1], {"triton": reason})


@needs_triton
@without_gpu
@pytest.mark.usefixtures("interpreter")
def test_a_cpu_never_takes_the_interpreter_by_itself():
    x = of(torch.float32)
    assert refusal("triton", x, x, "fp32") is None
    choice = choose("auto", x, x, "fp32")
    assert "triton" not in (choice.name, *choice.passed_over)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
def test_the_torch_backend_refuses_nothing(device):
    for dtype, precision in itertools.product(FLOATS, (*PRECISIONS, None)):
        x = of(dtype, device, (1 << 10,) * 4)
        assert refusal("torch", x, x, precision) is None


def test_what_the_cuda_backend_refuses(monkeypatch):
    """On a GPU made up: of capability 7.5, with the kernels built, and a trial that fails."""
    module, capability, trials = dispatch.load("cuda"), [(7, 5)], []

    def fail(*call):
        trials.append(call)
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # it needs a driver
    monkeypatch.setattr(torch, "ones", lambda shape, device: of(torch.float32, device, shape))
    monkeypatch.setattr(native_build, "load", lambda name: None)
    monkeypatch.setattr(module, "_REFUSALS", {})
    monkeypatch.setattr(module, "cosine_distance", fail)
    x, most = of(torch.float32, "cuda"), module.MAX_POSITIONS
    failed = "a trial on cuda:0 failed: no kernel image"
    for shape, precision, reason in (
        ((1, 2, 3, 4), "fp32", failed),
        ((1, 2, 2, most // 2), "bf16", failed),
        ((1, 2, 1, most + 1), "bf16", f"it takes at most {most} positions, not {most + 1}"),
        ((1, 2, 1, most + 1), None, failed),
        ((1 << 26, 2, 32, 32), None, f"it takes at most {32 * module.MAX_BLOCKS} positions of all images together"),
    ):
        tensor = of(torch.float32, "cuda", shape)
        assert refusal("cuda", tensor, tensor, precision) == reason
    assert len(trials) == 1
    assert refusal("cuda", x, of(torch.float64, "cuda"), None) == "it does not take float64"
    assert refusal("cuda", of(torch.float32), of(torch.float32), None) == "it does not run on cpu devices"
    capability[0] = (7, 0)
    assert refusal("cuda", x, x, None) == "it needs compute capability 7.5, and 7.0 is what this GPU has"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert refusal("cuda", x, x, None) == "it runs on NVIDIA's GPUs"


@pytest.mark.parametrize("error", [ImportError, str])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_named_is_used_or_is_an_error_never_another_backend(backends, monkeypatch, backend, error):
    """One line without a traceback on the command line; elsewhere a RuntimeError like torch's own."""
    x = of(torch.float32)
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    assert choose("auto", x, x, "fp32") == choose(backend, x, x, "fp32") == (backend, {})
    backends[backend] = error("it has no time")
    for asked, named, remedy in (
        (backend, f"backend={backend!r}", "leave the choice to backend='auto'"),
        ("auto", f"{BACKEND_VARIABLE}={backend}", "unset it"),
    ):
        with pytest.raises(BackendError) as raised:
            choose(asked, x, x, "fp32")
        assert str(raised.value) == f"{named} cannot serve this call: it has no time; {remedy}"
    other = BACKENDS[0] if backend != BACKENDS[0] else BACKENDS[1]
    assert choose(other, x, x, "fp32") == (other, {})  # whatever the variable says
    assert issubclass(BackendError, UserError)
    assert issubclass(BackendError, RuntimeError)


@pytest.mark.parametrize("backend", ["Torch", "torch ", "nonsense", "", None, 0])
def test_an_unknown_backend_is_an_error(backend):
    x = of(torch.float32)
    for call in (dispatch.check_backend, lambda backend: choose(backend, x, x, "fp32")):
        with pytest.raises(ValueError, match="is not known: use one of 'auto', ") as raised:
            call(backend)
        assert str(raised.value).startswith(f"backend={backend!r} ")
        assert all(repr(name) in str(raised.value) for name in BACKENDS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_variable_and_the_argument_reach_the_operators(monkeypatch, function):
    x = torch.ones(1, 2, 3, 4, dtype=torch.float64)
    with pytest.raises(BackendError, match="backend='triton' cannot serve this call"):
        function(x, x, backend="triton")
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(BackendError, match=f"{BACKEND_VARIABLE}=triton cannot serve this call"):
        function(x, x)
    assert torch.equal(function(x, x, backend="torch"), torch.zeros(1, 3, 4, dtype=torch.float64))


def run_python(code, **environment):
    """The output of a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_without_triton_everything_else_works():
    output = run_python("""
        import sys
        sys.modules["triton"] = None  # what an import then finds is as good as nothing
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from dskd_fast import functional
        from dskd_fast.ops.dispatch import choose
        student, teacher = torch.randn(2, 1, 4, 3, 3).unbind()
        for function in (functional.contextual_affinity, functional.cosine_distance):
            function(student.requires_grad_(), teacher).sum().backward()
            try:
                function(student, teacher, backend="triton")
            except RuntimeError as error:
                print(error)
        unwanted = ("dskd_fast.kernels", "dskd_fast.backends.triton")
        print(bool(student.grad.isfinite().all()), [name for name in sys.modules if name.startswith(unwanted)])
        with FakeTensorMode():
            x = torch.empty(1, 4, 3, 3, device="cuda")
        choice = choose("auto", x, x, "fp32")
        print(choice.name, choice.passed_over["triton"])
    """)
    *errors, on_a_cpu, choice = output.splitlines()
    assert on_a_cpu == "True []"  # nor does a call there load any kernels
    assert len(errors) == 2
    assert all(error.startswith("backend='triton' cannot serve this call: ") and "triton" in error for error in errors)
    assert choice.startswith("torch ")
    assert "triton" in choice.removeprefix("torch ")


def test_precision_of_a_pair():
    """A forced one holds; float64 is never rounded; autocast counts before the inputs' own half precision."""
    halves = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    for student, teacher, cast in itertools.product(FLOATS, FLOATS, (None, *halves)):
        expected = "fp32" if torch.float64 in (student, teacher) else halves.get(cast)
        if expected is None:
            expected = halves.get(student, dispatch.AMBIENT) if student == teacher else dispatch.AMBIENT
        pair = of(student), of(teacher)
        with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
            assert dispatch.resolve_precision(None, *pair) == expected
            assert [dispatch.resolve_precision(forced, *pair) for forced in PRECISIONS] == list(PRECISIONS)


def test_the_former_name_of_fp32_is_understood():
    x, y = torch.randn(2, 1, 8, 3, 3, dtype=torch.float64)
    assert dispatch.resolve_precision("ieee", x, y) == "fp32"
    operator = torch.ops.dskd_fast.contextual_affinity
    former, current = (operator(x, y, 1.0, name, "auto", False)[0] for name in ("ieee", "fp32"))
    assert torch.equal(former, current)
    assert operator(x.to("meta"), y.to("meta"), torch.tensor(1.0), "ieee", "auto", False)[0].dtype == former.dtype


@pytest.mark.parametrize("precision", ["float32", "BF16", "", dispatch.AMBIENT, torch.float16, 16])
def test_an_unknown_precision_is_an_error(precision):
    with pytest.raises(ValueError, match="is not known: use None or one of 'fp32', 'tf32', 'bf16', 'fp16'") as raised:
        dispatch.resolve_precision(precision, of(torch.float32), of(torch.float32))
    assert str(raised.value).startswith(f"precision={precision!r} ")


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_cuda"),
    [("highest", "fp32", "fp32"), ("high", "fp32", "tf32"), ("medium", "bf16", "bf16")],
)
def test_ambient_precision(restore_precision, setting, on_cpu, on_cuda):
    torch.set_float32_matmul_precision(setting)
    assert (dispatch.ambient_precision("cpu"), dispatch.ambient_precision("cuda")) == (on_cpu, on_cuda)
