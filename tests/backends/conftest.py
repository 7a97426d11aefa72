"""The backends, each on a device that it serves, and what goes into them."""

import contextlib
import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dskd_fast.backends.common import PreparedKeys, accumulation_dtype
from dskd_fast.ops import dispatch

from .emulated import HERE, SOURCES, Emulation, compile_with_emulation, native_build
from .truth import KeysTruth, Truth


class Backend:
    """A backend on a device: takes rows (B, N, C), gives the map (B, N) and the gradient (B, N, C), both on the CPU."""

    def __init__(self, name, module=None):
        implementation, where = name.split("-")
        self.name = name
        self.module = module or dispatch.load(implementation)
        self.device = "cuda" if where == "cuda" else "cpu"
        self.is_interpreted = where == "interpreter"
        self.is_slow = self.is_interpreted or implementation == "emulation"

    def affinity(self, student, teacher, temperature, precision="fp32", with_gradient=True, image=None):
        """Rows are seen as an image of one column, or as one of (H, W)."""
        return self._rows(*self.affinity_of_maps(
            *(self._maps(x, image) for x in (student, teacher)), temperature, precision, with_gradient
        ))  # fmt: skip

    def distillation(self, student, teacher, keys, *, precision="fp32", with_gradient=True, row_mask=None, **options):
        """Rows (B, N, C), keys (B, K, C) or what the backend has prepared, row_mask (B, N), options of `KeysTruth`."""
        maps = [self._maps(x, None) for x in (student, teacher)]
        keys = keys.to(self.device) if isinstance(keys, torch.Tensor) else keys
        masks = [options.get("key_mask"), None if row_mask is None else row_mask.unsqueeze(-1)]
        masks = [None if x is None else x.to(self.device) for x in masks]
        assert self.module.distillation_refusal(*maps, keys, precision) is None
        temperatures = options["student_temperature"], options["teacher_temperature"]
        normalize = options.get("normalize", True)
        return self._rows(*self.module.affinity_distillation(
            *maps, keys, *temperatures, *masks, normalize, precision, with_gradient
        ))  # fmt: skip

    def prepared(self, keys, precision="fp32", normalize=True):
        packed = self.module.prepare_keys(keys.to(self.device), normalize, precision)
        return PreparedKeys(packed, tuple(keys.shape), normalize, precision, "")

    def cosine(self, student, teacher, with_gradient=True):
        return self._rows(*self.cosine_of_maps(*(self._maps(x, None) for x in (student, teacher)), with_gradient))

    def affinity_of_maps(self, student, teacher, temperature, precision="fp32", with_gradient=True):
        """The same on maps (B, C, H, W) that are where the backend runs, which has to take them."""
        assert self.module.refusal(student, teacher, precision) is None
        return self.module.contextual_affinity(student, teacher, temperature, precision, with_gradient)

    def cosine_of_maps(self, student, teacher, with_gradient=True):
        assert self.module.refusal(student, teacher, None) is None
        shape, dtype = (student.shape[0], *student.shape[2:]), accumulation_dtype(student, teacher, "fp32")
        weights = torch.ones(shape, dtype=dtype, device=student.device) if with_gradient else None
        return self.module.cosine_distance(student, teacher, weights)

    def some(self, values, k):
        """All of `values`; where a call takes a fifth of a second, the k-th alone, so that k has to go round."""
        return (values[k % len(values)],) if self.is_slow else values

    def _maps(self, rows, image):
        return rows.to(self.device).mT.unflatten(2, image or (rows.shape[1], 1))

    def _rows(self, values, gradient):
        return values.flatten(1).cpu(), None if gradient is None else gradient.flatten(2).mT.cpu()


# Implementation and where it runs.
BACKENDS = ("torch-cpu", "cpu-cpu", "triton-interpreter", "torch-cuda", "triton-cuda", "cuda-cuda")
EMULATIONS = {"emulation-sm80": 80, "emulation-sm75": 75}


def _backend_or_reason(name):
    """The backend, or why it cannot run here."""
    if name.endswith("-cuda") and not torch.cuda.is_available():
        return "there is no GPU"
    try:
        backend = Backend(name)
    except ImportError as error:
        return str(error)
    if name.startswith("triton-") and backend.module._is_interpreted() != backend.is_interpreted:
        if not backend.is_interpreted:
            return "TRITON_INTERPRET is set, so that the kernels are not compiled for the GPU"
        return "the kernels are not interpreted: TRITON_INTERPRET is off, as it is by itself where there is a GPU"
    one = torch.ones(1, 1, 1, 1, device=backend.device)
    return backend.module.refusal(one, one, None) or backend


def _parameters(*names):
    def marks(name):
        return pytest.mark.gpu if name.endswith("-cuda") else pytest.mark.slow if name in EMULATIONS else ()

    return [pytest.param(name, id=name, marks=marks(name)) for name in names]


@pytest.fixture(scope="session")
def all_backends():
    """Every backend by its name, or the reason why it cannot run here."""
    return {name: _backend_or_reason(name) for name in BACKENDS}


@pytest.fixture
def one_of(all_backends):
    """one_of(name) -> the backend, where it runs here."""
    return partial(_available, all_backends)


@pytest.fixture
def cpu(one_of):
    return one_of("cpu-cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulations(made_once):
    """emulations(name) -> the backend."""
    opened = {}

    def get(name):
        if name not in opened:
            csrc, capability = native_build.csrc_folder() / "cuda", EMULATIONS[name]
            sources = [*(csrc / f"{stem}.cu" for stem in SOURCES), HERE / "driver.cpp"]
            folder = made_once(
                name, lambda folder: compile_with_emulation(folder / "driver", sources, capability >= 80)
            )
            opened[name] = Backend(name, Emulation(folder, capability))
        return opened[name]

    yield get
    for backend in opened.values():
        backend.module.close()


@pytest.fixture(params=_parameters(*BACKENDS, *EMULATIONS))
def backend(request, all_backends):
    """Interpreted, with tiles as they are for the interpreter; `triton_backend` has those of the table."""
    if request.param in EMULATIONS:
        return request.getfixturevalue("emulations")(request.param)
    opened = _available(all_backends, request.param)
    if opened.is_interpreted:
        request.getfixturevalue("set_tiles")(64, 64)
    return opened


@pytest.fixture
def set_tiles(monkeypatch):
    """Sets rows and keys of a tile in place of the table's, and the largest blocks for all else.

    Those that the backend comes with fit into a GPU's memories. The interpreter takes about as long for a large block
    as for a small one, so that it does the same work in a tenth of the time.
    """

    def patch(rows, keys):
        from dskd_fast.kernels import configs, distillation, prepare, prepare_distillation

        def config(architecture, precision, width):
            channels = min(width, configs.LARGEST_WIDTH)
            blocks = configs.Blocks(rows, keys, channels, warps=4, stages=1)
            return configs.Config(blocks, blocks, chunk=channels)

        monkeypatch.setattr(configs, "config", config)
        monkeypatch.setattr(configs, "DISTILLATION", {})
        monkeypatch.setattr(prepare, "BLOCK_P", configs.ROW_MULTIPLE)
        monkeypatch.setattr(prepare, "BLOCK_C", configs.SMALLEST_WIDTH)
        monkeypatch.setattr(distillation, "MERGE_BLOCK", (configs.ROW_MULTIPLE, distillation.MERGE_BLOCK[1]))
        elements = configs.ROW_MULTIPLE * configs.SMALLEST_WIDTH
        monkeypatch.setattr(prepare_distillation, "SUM_BLOCK", (prepare_distillation.SUM_BLOCK[0], elements))

    return patch


@pytest.fixture
def guarded(monkeypatch):
    """`with guarded():` every new buffer lies inside a larger one, whose other elements have to stay as they are."""

    @contextlib.contextmanager
    def run(guard=1024, mark=77):
        around, empty_like = [], torch.empty_like

        def guarded_empty(shape, *, dtype, device):
            around.append(torch.full((math.prod(shape) + 2 * guard,), mark, dtype=dtype, device=device))
            return around[-1][guard:-guard].view(shape)

        def guarded_like(x, *, dtype):
            inside = guarded_empty((x.numel(),), dtype=dtype, device=x.device)
            return inside.as_strided(x.shape, empty_like(x, dtype=dtype).stride(), guard)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", guarded_empty)
            patch.setattr(torch, "empty_like", guarded_like)
            yield
        assert len(around) > 10
        for outer in around:
            assert (torch.cat((outer[:guard], outer[-guard:])) == mark).all()

    return run


class Watch(TorchDispatchMode):
    """Counts launches of kernels (by name), which need not happen, and what a backend has torch do around them."""

    def __init__(self, monkeypatch, kernels, launches=True):
        super().__init__()
        self.launches, self.operations = Counter(), Counter()
        for name, kernel in kernels.items():
            # Before 3.7 the interpreter's kernels go past their `run`.
            monkeypatch.setattr(
                type(kernel), "__getitem__", lambda kernel, grid: partial(kernel.run, grid=grid, warmup=False)
            )
            monkeypatch.setattr(kernel, "run", partial(self._launch, name, kernel.run if launches else None))

    def _launch(self, name, run, *arguments, **keywords):
        self.launches[name] += 1
        if run is not None:
            run(*arguments, **keywords)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations[func.overloadpacket._qualified_op_name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(monkeypatch):
    return partial(Watch, monkeypatch)


@pytest.fixture
def use_tiles(monkeypatch):
    """Sets (rows, keys, channels of a product) of both kernels over pairs, and columns of the gradient at a time."""

    def use(forward, gradient, chunk=64):
        from dskd_fast.kernels import configs

        forward, gradient = (configs.Blocks(*sizes, warps=4, stages=1) for sizes in (forward, gradient))
        monkeypatch.setattr(configs, "config", lambda *_: configs.Config(forward, gradient, chunk))

    return use


@pytest.fixture(params=_parameters("triton-interpreter", "triton-cuda"))
def triton_backend(request, all_backends):
    return _available(all_backends, request.param)


def _available(all_backends, name):
    if isinstance(all_backends[name], str):
        pytest.skip(all_backends[name])
    return all_backends[name]


def _inside_nan(x):
    """Every second position of a window of something larger that is NaN everywhere else."""
    b, c, h, w = x.shape
    around = torch.full((b + 2, c + 2, h + 2, 2 * w + 2), math.nan, dtype=x.dtype, device=x.device)
    view = around[1:-1, 1:-1, 1:-1, 1:-1:2]
    return view.copy_(x)


# Views on the values of a contiguous (B, C, H, W), or on some of them.
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "images innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "inside NaN": _inside_nan,
    "one image for all": lambda x: x[:1].expand_as(x),
    "one vector for a row": lambda x: x[..., :1].expand_as(x),
    "overlapping windows": lambda x: x.as_strided(x.shape, (3, 2, 1, 1)),
}


@pytest.fixture(params=list(LAYOUTS))
def layouts(request):
    """A layout for the student and another one for the teacher, in turn."""
    names = list(LAYOUTS)
    other = names[(names.index(request.param) + 3) % len(names)]
    return LAYOUTS[request.param], LAYOUTS[other]


@pytest.fixture(scope="session")
def truth():
    return Truth()


@pytest.fixture(scope="session")
def keys_truth():
    return KeysTruth()


@pytest.fixture(scope="session")
def check_affinity(truth):
    """Has a backend compute an affinity, asserts that it is as exact as rounding permits, and returns it."""

    def check(backend, student, teacher, temperature, precision="fp32", **options):
        result = backend.affinity(student, teacher, temperature, precision, **options)
        limits = truth.limits(student, teacher, float(temperature), precision)
        truth.check(result, truth(student, teacher, float(temperature)), limits)
        return result

    return check


@pytest.fixture(scope="session")
def check_distillation(keys_truth):
    """The same of a distillation: rows that the mask leaves out are 0, whatever they hold."""

    def check(backend, student, teacher, keys, *, precision="fp32", row_mask=None, **options):
        result = backend.distillation(student, teacher, keys, precision=precision, row_mask=row_mask, **options)
        taken = torch.ones(student.shape[:2], dtype=torch.bool) if row_mask is None else row_mask
        call = torch.where(taken.unsqueeze(-1), student, teacher), teacher, keys
        kl, gradient = keys_truth(*call, **options)
        exact = kl * taken.numpy(), gradient * taken.unsqueeze(-1).numpy()
        keys_truth.check(result, exact, keys_truth.limits(*call, precision=precision, **options))
        assert all((x[~taken] == 0).all() for x in result)
        return result

    return check


@pytest.fixture(scope="session")
def make_features():
    """Student and teacher (B, N, C), float32: the student is the teacher plus noise, relative to its own size."""

    def make(n, c, noise, kind="rectified", batch=1, seed=0):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=random, dtype=torch.float64)

        if kind == "normal":
            teacher = normal(batch, n, c)
        elif kind == "rectified":
            teacher = (normal(batch, n, c) + 0.5).relu()
        else:  # "clustered": four materials, with a texture each
            material = torch.randint(4, (batch, n), generator=random)
            teacher = (normal(4, c).relu()[material] + 0.3 * normal(batch, n, c)).relu()
        student = teacher + noise * teacher.square().mean().sqrt() * normal(batch, n, c)
        return student.float(), teacher.float()

    return make
