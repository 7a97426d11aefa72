import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dskd_fast import functional
from dskd_fast.backends import native_build
from dskd_fast.errors import UserError
from dskd_fast.ops import dispatch
from dskd_fast.ops.dispatch import (
    AMBIENT,
    AUTOMATIC,
    AUTOMATIC_ELSEWHERE,
    BACKEND_VARIABLE,
    BACKENDS,
    PRECISIONS,
    BackendError,
    ambient_precision,
    choose,
    refusal,
    resolve_precision,
)

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
    """Stands for the backends: {name: why it refuses, or the ImportError of loading it}; others serve every call."""
    refusals = {}

    def load(name):
        if isinstance(error := refusals.get(name), ImportError):
            raise error
        return SimpleNamespace(refusal=lambda student, teacher, precision: refusals.get(name))

    monkeypatch.setattr(dispatch, "load", load)
    return refusals


# The table


@pytest.mark.parametrize("names", [*AUTOMATIC.values(), AUTOMATIC_ELSEWHERE])
def test_every_device_ends_with_the_backend_that_serves_everything(names):
    assert names[-1] == "torch"
    assert set(names) <= set(BACKENDS)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps", "meta"])
def test_the_first_of_the_devices_backends_is_chosen(backends, device):
    x = of(torch.float32, device)
    names = AUTOMATIC.get(device, AUTOMATIC_ELSEWHERE)
    for i, name in enumerate(names):
        assert choose("auto", x, x, "ieee") == (name, {passed: f"not {passed}" for passed in names[:i]})
        backends[name] = f"not {name}"
    with pytest.raises(RuntimeError, match="no backend can serve this call") as raised:
        choose("auto", x, x, "ieee")
    assert all(f"not {name}" in str(raised.value) for name in names)


@pytest.mark.parametrize(
    "missing", [ImportError("libcuda is missing"), ModuleNotFoundError("No module named 'triton'")]
)
def test_a_backend_that_cannot_be_imported_is_passed_over_with_the_reason(backends, missing):
    backends["triton"] = missing
    x = of(torch.float32, "cuda")
    choice = choose("auto", x, x, "bf16")
    assert choice.name == AUTOMATIC["cuda"][1]
    assert choice.passed_over == {"triton": str(missing)}


def test_a_refusal_sees_the_call(monkeypatch):
    calls = []
    module = SimpleNamespace(refusal=lambda *call: calls.append(call))
    monkeypatch.setattr(dispatch, "load", lambda name: module)
    student, teacher = of(torch.float32), of(torch.bfloat16)
    for backend in ("auto", "torch"):
        for precision in ("fp16", None):
            choose(backend, student, teacher, precision)
            seen_student, seen_teacher, seen_precision = calls.pop()
            assert seen_student is student
            assert seen_teacher is teacher
            assert seen_precision == precision
    assert calls == []


@needs_triton
@without_gpu
def test_a_cpu_never_takes_the_interpreter_by_itself():
    x = of(torch.float32)
    assert refusal("triton", x, x, "ieee") is None
    choice = choose("auto", x, x, "ieee")
    assert choice.name != "triton"
    assert "triton" not in choice.passed_over


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_loaded_or_says_why_not(backend):
    x = of(torch.float32, "meta")
    try:
        module, missing = dispatch.load(backend), None
    except ImportError as error:
        module, missing = None, str(error)
    assert refusal(backend, x, x, None) == (missing or module.refusal(x, x, None))
    assert missing != ""
    assert backend != "torch" or missing is None


# Refusals


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_torch_backend_refuses_nothing(device, dtype):
    x = of(dtype, device, (1 << 10, 1 << 10, 1 << 10, 1 << 10))
    for precision in (*PRECISIONS, None):
        assert refusal("torch", x, x, precision) is None


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", None])
def test_the_triton_backend_has_no_float64(precision):
    single, double = of(torch.float32), of(torch.float64)
    for pair in ((double, single), (single, double), (double, double)):
        assert refusal("triton", *pair, precision) == "it does not take float64"


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", None])
def test_the_triton_backend_serves_other_devices_not_at_all(precision):
    for device in ("meta", "mps"):
        x = of(torch.float32, device)
        assert refusal("triton", x, x, precision) == f"it does not run on {device} devices"


@needs_triton
def test_the_triton_backend_serves_a_cpu_under_the_interpreter_alone():
    code = """
        import torch
        from dskd_fast.ops.dispatch import refusal
        x = torch.ones(1, 2, 3, 4)
        print(refusal("triton", x, x, "ieee"), refusal("triton", x, x, None), sep="\\n")
    """
    assert run_python(code, TRITON_INTERPRET="1").splitlines() == ["None"] * 2
    for reason in run_python(code, TRITON_INTERPRET="0").splitlines():
        assert "it runs on GPUs" in reason
        assert "TRITON_INTERPRET=1" in reason


@pytest.fixture
def triton_fused(monkeypatch):
    """The backend's module, with a GPU on which the trial succeeded."""
    module = pytest.importorskip("dskd_fast.backends.triton", exc_type=ImportError)
    monkeypatch.setattr(module, "_REFUSALS", {of(torch.float32, "cuda").device: None})
    monkeypatch.setattr(module, "_is_interpreted", lambda: False)  # as it is where there is a GPU
    return module


def test_the_triton_backend_takes_so_many_positions(triton_fused):
    for height, width in ((1, triton_fused.MAX_POSITIONS), (triton_fused.MAX_POSITIONS // 2, 2)):
        most = of(torch.float32, "cuda", (1, 1, height, width))
        assert refusal("triton", most, most, "ieee") is None
        more = of(torch.float32, "cuda", (1, 1, height, width + 1))
        reason = refusal("triton", more, more, "ieee")
        assert str(triton_fused.MAX_POSITIONS) in reason
        assert str(height * (width + 1)) in reason
        assert choose("auto", more, more, "ieee").passed_over["triton"] == reason
        assert refusal("triton", more, more, None) is None  # the cosine distance relates no pairs of positions


def test_the_triton_backend_takes_so_many_elements(triton_fused):
    positions = triton_fused.MAX_POSITIONS
    channels = triton_fused.MAX_ELEMENTS // positions
    few, many = (of(torch.float32, "cuda", (1, c, 1, positions)) for c in (channels // 2, channels))
    assert refusal("triton", few, few, "ieee") is None
    assert "elements per image" in refusal("triton", many, many, "ieee")
    assert refusal("triton", many, many, None) is None


@pytest.fixture
def trial(triton_fused, monkeypatch):
    """Lets the trial on a GPU, which this machine may lack, end as the test says; returns a list of those made."""

    def arrange(error=None):
        made = []

        def run(student, teacher, with_gradient):
            made.append(student.device)
            if error is not None:
                raise error

        monkeypatch.setattr(triton_fused, "_REFUSALS", {})
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # it needs a driver
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch, "ones", lambda shape, device: of(torch.float32, device, shape))
        monkeypatch.setattr(triton_fused, "cosine_distance", run)
        return made

    return arrange


def test_a_gpu_on_which_the_trial_succeeds_takes_triton(trial):
    x, made = of(torch.float32, "cuda"), trial()
    for precision in ("bf16", None):
        assert choose("auto", x, x, precision) == ("triton", {})
    assert made == [x.device]


def test_a_failed_trial_on_the_gpu_is_passed_over_with_the_reason_and_not_repeated(trial):
    x, made = of(torch.float32, "cuda"), trial(RuntimeError("  ptxas is missing\nand a log of many lines"))
    for precision in ("bf16", None):
        choice = choose("auto", x, x, precision)
        assert choice.name != "triton"
        assert choice.passed_over["triton"] == f"a trial on {x.device} failed: ptxas is missing"
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot serve this call: a trial on .* ptxas is missing;"):
        choose("triton", x, x, "bf16")
    assert made == [x.device]


def test_a_trial_that_fails_without_a_word_is_named_by_its_error(trial):
    trial(AssertionError())
    x = of(torch.float32, "cuda")
    assert refusal("triton", x, x, "ieee") == f"a trial on {x.device} failed: AssertionError"


def test_a_gpu_that_is_full_is_no_reason_to_give_a_backend_up(trial):
    x, made = of(torch.float32, "cuda"), trial(torch.OutOfMemoryError("full"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            choose("auto", x, x, "ieee")
    assert len(made) == 2


def test_a_gpu_for_which_there_are_no_kernels_is_named_and_not_tried(trial, monkeypatch):
    x, made = of(torch.float32, "cuda"), trial()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    choice = choose("auto", x, x, "ieee")
    assert choice.name != "triton"
    assert "7.5" in choice.passed_over["triton"]
    made_again = trial()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    card = SimpleNamespace(gcnArchName="gfx906:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    choice = choose("auto", x, x, "ieee")
    assert choice.name != "triton"
    assert "gfx906" in choice.passed_over["triton"]
    assert made == made_again == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_takes_triton():
    x = torch.ones(1, 2, 3, 4, device="cuda")
    for precision in (*PRECISIONS, None):
        assert choose("auto", x, x, precision) == ("triton", {})


# A backend by its name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_is_used_and_nothing_else_is_asked(backends, backend):
    for other in BACKENDS:
        backends[other] = "not this one"
    del backends[backend]
    x = of(torch.float32, "cuda")
    assert choose(backend, x, x, "ieee") == (backend, {})


@pytest.mark.parametrize("error", [ImportError, str])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_named_backend_that_cannot_serve_is_an_error_never_another_backend(backends, backend, error):
    backends[backend] = error("it has no time")
    x = of(torch.float32)
    with pytest.raises(RuntimeError) as raised:
        choose(backend, x, x, "ieee")
    message = str(raised.value)
    assert message.startswith(f"backend={backend!r} cannot serve this call: it has no time;")
    assert message.endswith("leave the choice to backend='auto'")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_error_reaches_the_caller(function):
    x = torch.ones(1, 2, 3, 4, dtype=torch.float64)
    refused = {name: reason for name in BACKENDS if (reason := refusal(name, x, x, None)) is not None}
    assert "triton" in refused
    for name, reason in refused.items():
        with pytest.raises(RuntimeError) as raised:
            function(x, x, backend=name)
        assert f"backend={name!r} cannot serve this call: {reason};" in str(raised.value)


@pytest.mark.parametrize("backend", ["Torch", "torch ", "nonsense", "", None, 0])
def test_an_unknown_backend_is_an_error(backend):
    x = of(torch.float32)
    for call in (dispatch.check_backend, lambda backend: choose(backend, x, x, "ieee")):
        with pytest.raises(ValueError, match="is not known: use one of 'auto', ") as raised:
            call(backend)
        assert str(raised.value).startswith(f"backend={backend!r} ")
        assert all(repr(name) in str(raised.value) for name in BACKENDS)


# The environment variable


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_variable_sets_the_default_and_the_argument_overrides_it(backends, monkeypatch, backend):
    x = of(torch.float32)
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    assert choose("auto", x, x, "ieee") == (backend, {})
    for named in BACKENDS:
        assert choose(named, x, x, "ieee") == (named, {})
    backends[backend] = "it has no time"
    for other in BACKENDS:
        if other != backend:
            assert choose(other, x, x, "ieee") == (other, {})


def test_the_command_line_can_show_the_error_as_the_users_own(backends, monkeypatch):
    """One line without a traceback; where the loss is used as a library it is a RuntimeError like torch's own."""
    assert issubclass(BackendError, UserError)
    assert issubclass(BackendError, RuntimeError)
    backends["triton"] = "it has no time"
    x = of(torch.float32)
    with pytest.raises(BackendError):
        choose("triton", x, x, "ieee")
    for value in ("triton", "nonsense"):
        monkeypatch.setenv(BACKEND_VARIABLE, value)
        with pytest.raises(BackendError):
            choose("auto", x, x, "ieee")


def test_an_empty_variable_is_none(backends, monkeypatch):
    x = of(torch.float32, "cuda")
    monkeypatch.setenv(BACKEND_VARIABLE, "")
    assert choose("auto", x, x, "ieee") == (AUTOMATIC["cuda"][0], {})


@pytest.mark.parametrize("error", [ImportError, str])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_variables_backend_too_is_used_or_is_an_error(backends, monkeypatch, backend, error):
    backends[backend] = error("it has no time")
    monkeypatch.setenv(BACKEND_VARIABLE, backend)
    x = of(torch.float32)
    with pytest.raises(RuntimeError) as raised:
        choose("auto", x, x, "ieee")
    message = str(raised.value)
    assert message.startswith(f"{BACKEND_VARIABLE}={backend} cannot serve this call: it has no time;")
    assert message.endswith("unset it")  # the call has left the choice to backend='auto' already


@pytest.mark.parametrize("value", ["Torch", "torch ", "nonsense"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unknown_value_of_the_variable_is_an_error_that_names_it(monkeypatch, function, value):
    x = torch.ones(1, 2, 3, 4)
    monkeypatch.setenv(BACKEND_VARIABLE, value)
    with pytest.raises(BackendError, match="is not known") as raised:
        function(x, x)
    message = str(raised.value)
    assert f"{BACKEND_VARIABLE}={value} " in message
    assert "unset" in message
    assert all(name in message for name in BACKENDS)
    assert torch.equal(function(x, x, backend="torch"), torch.zeros(1, 3, 4))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_variable_reaches_the_operators(monkeypatch, function):
    x = torch.ones(1, 2, 3, 4, dtype=torch.float64)
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=f"{BACKEND_VARIABLE}=triton cannot serve this call"):
        function(x, x)
    assert torch.equal(function(x, x, backend="torch"), torch.zeros(1, 3, 4, dtype=torch.float64))


# What is imported, and when


def run_python(code, **environment):
    """The output of a process of its own."""
    code = "\n".join(line.removeprefix("        ") for line in code.splitlines())
    environment = os.environ | environment
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_imports_no_triton_and_a_cpu_call_no_kernels():
    """Triton itself torch imports, on the first call of whatever custom operator."""
    output = run_python("""
        import sys
        import torch
        before = set(sys.modules)
        import dskd_fast
        from dskd_fast import functional
        from dskd_fast.ops import dispatch
        print("triton" in set(sys.modules) - before)
        student = torch.randn(1, 4, 3, 3, requires_grad=True)
        for function in (functional.contextual_affinity, functional.cosine_distance):
            function(student, torch.randn(1, 4, 3, 3)).sum().backward()
        unwanted = ("dskd_fast.kernels", "dskd_fast.backends.triton")
        print([name for name in sys.modules if name.startswith(unwanted)])
    """)
    assert output.splitlines() == ["False", "[]"]


def test_without_triton_everything_else_works():
    output = run_python("""
        import sys
        sys.modules["triton"] = None  # what an import then finds is as good as nothing
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from dskd_fast import functional
        from dskd_fast.ops.dispatch import choose
        student = torch.randn(1, 4, 3, 3, requires_grad=True)
        teacher = torch.randn(1, 4, 3, 3)
        for function in (functional.contextual_affinity, functional.cosine_distance):
            function(student, teacher).sum().backward()
            try:
                function(student, teacher, backend="triton")
            except RuntimeError as error:
                print(error)
        print(bool(student.grad.isfinite().all()))
        with FakeTensorMode():
            x = torch.empty(1, 4, 3, 3, device="cuda")
        choice = choose("auto", x, x, "ieee")
        print(choice.name, choice.passed_over["triton"])
    """)
    *errors, finite, choice = output.splitlines()
    assert len(errors) == 2
    assert all(error.startswith("backend='triton' cannot serve this call: ") and "triton" in error for error in errors)
    assert finite == "True"
    assert choice.startswith("torch ")
    assert "triton" in choice.removeprefix("torch ")


@needs_triton
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_importing_the_kernels_launches_and_compiles_nothing(tmp_path, interpret):
    output = run_python(
        """
        import pkgutil
        import torch
        from triton.runtime.jit import KernelInterface
        launches = []
        KernelInterface.__getitem__ = lambda kernel, grid: lambda *arguments, **options: launches.append(kernel)
        import dskd_fast.kernels
        from dskd_fast.backends import triton as triton_fused
        for module in pkgutil.iter_modules(dskd_fast.kernels.__path__, "dskd_fast.kernels."):
            __import__(module.name)
        print(len(launches), torch.cuda.is_initialized())
        triton_fused.cosine_distance(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), True)
        print(len(launches))
        """,
        TRITON_INTERPRET=interpret,
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert output.splitlines() == ["0 False", "1"]
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


# Precisions


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_forced_precision_holds_whatever_the_inputs(precision, dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert resolve_precision(precision, of(dtype), of(dtype)) == precision
    assert resolve_precision(precision, of(dtype), of(dtype)) == precision


@pytest.mark.parametrize("precision", ["fp32", "BF16", "", AMBIENT, torch.float16, 16])
def test_an_unknown_precision_is_an_error(precision):
    with pytest.raises(ValueError, match="is not known: use None or one of 'ieee', 'tf32', 'bf16', 'fp16'") as raised:
        resolve_precision(precision, of(torch.float32), of(torch.float32))
    assert str(raised.value).startswith(f"precision={precision!r} ")


@pytest.mark.parametrize("student", FLOATS)
@pytest.mark.parametrize("teacher", FLOATS)
def test_precision_of_a_pair(student, teacher):
    if torch.float64 in (student, teacher):
        expected = "ieee"
    elif student == teacher and student != torch.float32:
        expected = {torch.float16: "fp16", torch.bfloat16: "bf16"}[student]
    else:
        expected = AMBIENT
    assert resolve_precision(None, of(student), of(teacher)) == expected


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_autocast_counts_before_the_inputs_but_not_before_float64(dtype, expected):
    with torch.autocast("cpu", dtype=dtype):
        for student in (torch.float16, torch.bfloat16, torch.float32):
            assert resolve_precision(None, of(student), of(student)) == expected
        assert resolve_precision(None, of(torch.float64), of(torch.float32)) == "ieee"
        with torch.autocast("cpu", enabled=False):
            assert resolve_precision(None, of(torch.float32), of(torch.float32)) == AMBIENT


def test_autocast_of_another_device_does_not_count():
    x = of(torch.float32, "meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert resolve_precision(None, x, x) == AMBIENT


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_cuda"),
    [("highest", "ieee", "ieee"), ("high", "ieee", "tf32"), ("medium", "bf16", "bf16")],
)
def test_ambient_precision(setting, on_cpu, on_cuda):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert (ambient_precision("cpu"), ambient_precision("cuda")) == (on_cpu, on_cuda)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_cuda"), [("ieee", "ieee", "ieee"), ("tf32", "ieee", "tf32"), ("none", "ieee", "ieee")]
)
def test_ambient_precision_by_the_newer_settings(setting, on_cpu, on_cuda):
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = setting
        assert (ambient_precision("cpu"), ambient_precision("cuda")) == (on_cpu, on_cuda)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
    torch.get_float32_matmul_precision()  # would raise if a setting had been left behind
