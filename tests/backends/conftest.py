"""The backends, what their contextual affinity is compared with, and how far from it rounding alone may take it."""

import math

import numpy as np
import pytest
import torch

from dskd_fast.backends.common import accumulation_dtype
from dskd_fast.ops import dispatch

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53


class Truth:
    """KL map and gradient in float64, by formulas that lose no digits however close the student is.

    The textbook in float64 loses T^2 eps (log N + 1/T), which is more than the whole KL of a good student. Here, with
    p = softmax(a) and c = d - sum_j p_j d_j,

        KL / T^2 = log sum_j p_j exp(d_j) - sum_j p_j d_j = log1p(sum_j p_j (expm1(c_j) - c_j)),

    a sum of positive terms. `test_truth_*` compare it with 120-digit arithmetic and with the textbook.
    """

    def __call__(self, student, teacher, temperature, rows=None):
        """(B, N, C) tensors -> KL (B, N) and d KL_i / d student_i (B, N, C), numpy, float64; or of the first `rows`."""
        pairs = [self._image(*self._directions(s, t, rows), temperature) for s, t in zip(student, teacher, strict=True)]
        return tuple(np.stack(x) for x in zip(*pairs, strict=True))

    def limits(self, student, teacher, temperature, precision, draws=8, rows=None):
        """What rounding alone does to the two: root mean square errors, KL (B, N) and gradient (B, N).

        A backend rounds the operands of its products (t_i or k_i, which give the same softmax; s_i - t_i, k_j, and the
        weights p_s - p_t) to a unit roundoff u, and works in float32 from there on. So this evaluates the truth with
        every operand off by the relative amount u, of random sign, and with the errors of float32: a product of C terms
        is off by sqrt(C) u32 |x||y| (Higham and Mary's probabilistic bound), exp and the sums by a few u32. What the KL
        and the gradient then change by is their conditioning at this very input, for any N, C and T; real rounding
        errors lie within +-u, so they come to about half of it. No term depends on how a backend is written.
        """
        random = np.random.default_rng(0)
        u = UNIT_ROUNDOFF[precision]
        double = precision == "fp32" and torch.float64 in (student.dtype, teacher.dtype)
        u, working = (FLOAT64, FLOAT64) if double else (u, FLOAT32)

        def off(x, by):
            return x + by * random.choice(np.array((-1.0, 1.0)), size=x.shape)

        kl_limits, gradient_limits = [], []
        for raw_s, raw_t in zip(student, teacher, strict=True):
            s, t, keys, delta, inverse_norm = self._directions(raw_s, raw_t, rows)
            kl, gradient = self._image(s, t, keys, delta, inverse_norm, temperature)
            sizes = [np.linalg.norm(x, axis=1, keepdims=True) for x in (t, delta, keys)]
            accumulation = math.sqrt(s.shape[1]) * working * sizes[2].T / temperature
            squares = np.zeros((2, len(kl)))
            for _ in range(draws):
                # The subtractions s - t and t - mean t are themselves exact to a rounding of unit vectors in float64.
                k = off(keys, u * np.abs(keys) + FLOAT64)
                a = off(t, u * np.maximum(np.abs(t), np.abs(keys[:rows]))) @ k.T / temperature
                a = off(a, 4 * working + accumulation * sizes[0])
                d = off(delta, u * np.abs(delta) + FLOAT64) @ k.T / temperature
                d = off(d, accumulation * sizes[1])
                noisy_kl, weight = self._rows(a, d)
                raw = temperature * off(weight, u * np.abs(weight)) @ k
                tangent = raw - (raw * s).sum(1, keepdims=True) * s
                noisy = off(tangent, working * np.linalg.norm(raw, axis=1, keepdims=True)) * inverse_norm
                noisy_kl = off(temperature**2 * noisy_kl, 4 * working * kl)
                squares += (noisy_kl - kl) ** 2, ((noisy - gradient) ** 2).sum(1)
            kl_limit, gradient_limit = np.sqrt(squares / draws)
            # Weights below float32's normal range have no digits left.
            smallest = 0 if double else float(np.finfo(np.float32).tiny) * len(keys)
            kl_limits.append(kl_limit + smallest * max(1, temperature**2))
            gradient_limits.append(gradient_limit + smallest * max(1, temperature) * (1 + inverse_norm[:, 0]))
        return np.stack(kl_limits), np.stack(gradient_limits)

    @staticmethod
    def check(result, exact, limits):
        """Assert that (KL, gradient) are as close to the exact ones as rounding permits.

        All positions together within twice the root mean square of `limits`; each alone within 12 times, since a limit
        that is itself estimated from 8 draws can be far too small for one position in thousands.
        """
        kl, gradient = (np.abs(got.double().numpy() - true) for got, true in zip(result, exact, strict=True))
        errors = kl, np.linalg.norm(gradient, axis=-1)
        for name, error, limit in zip(("KL", "gradient"), errors, limits, strict=True):
            assert np.linalg.norm(error) <= 2 * np.linalg.norm(limit), name
            worst = np.unravel_index(np.argmax(error - 12 * limit), error.shape)
            assert error[worst] <= 12 * limit[worst], f"{name} at {worst}"

    @staticmethod
    def _directions(student, teacher, rows):
        s, inverse_norm = _normalise(student.detach().double().numpy())
        t, _ = _normalise(teacher.double().numpy())
        return s[:rows], t[:rows], t - t.mean(0), (s - t)[:rows], inverse_norm[:rows]

    @classmethod
    def _image(cls, s, t, keys, delta, inverse_norm, temperature):
        kl, weight = cls._rows(t @ keys.T / temperature, delta @ keys.T / temperature)
        raw = temperature * weight @ keys
        return temperature**2 * kl, (raw - (raw * s).sum(1, keepdims=True) * s) * inverse_norm

    @staticmethod
    def _rows(a, d):
        """KL / T^2 and p_s - p_t of each row, from the logits a and the differences d (both (N, N))."""
        d = d - np.diagonal(d)[:, None]  # the largest p is there: its c is then the sum of the others' tiny parts
        p, q = _softmax(a), _softmax(a + d)
        mean = (p * d).sum(1, keepdims=True)
        c = d - mean
        small = np.minimum(c, 300)
        tail = _expm1_tail(small)
        v = (p * tail).sum(1, keepdims=True)
        kl = np.log1p(v)
        weight = p * (tail + small - v) / (1 + v)
        far = c.max(1, keepdims=True) > 300  # exp(c) would overflow; a KL of hundreds has no digits to lose
        kl = np.where(far, _logsumexp(a + d) - _logsumexp(a) - mean, kl)
        return kl[:, 0], np.where(far, q - p, weight)


def _normalise(x):
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    inverse_norm = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)
    return x * inverse_norm, inverse_norm


def _logsumexp(x):
    top = x.max(1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(1, keepdims=True))


def _softmax(x):
    return np.exp(x - _logsumexp(x))


def _expm1_tail(x):
    """expm1(x) - x, by its series where that cancels: 0.5^20 / 21! is below float64's roundoff."""
    near = np.clip(x, -0.5, 0.5)
    series = np.zeros_like(x)
    for k in range(20, 1, -1):
        series = series * near + 1 / math.factorial(k)
    return np.where(np.abs(x) <= 0.5, series * near * near, np.expm1(x) - x)


class KeysTruth:
    """The same of the distillation against any keys, with the arguments of `functional.affinity_distillation`."""

    def __call__(self, *call, **options):
        """(B, N, C) twice and keys (B, K, C) -> KL (B, N) and d KL_i / d student_i (B, N, C), numpy, float64."""
        images = [self._image(*image) for image in self._images(*call, **options)]
        return tuple(np.stack(x) for x in zip(*images, strict=True))

    def limits(self, *call, precision, draws=8, **options):
        """What rounding alone does to the two, as `Truth.limits` has it: operands are t / T_t, delta, k, p_s - p_t."""
        random = np.random.default_rng(0)
        double = precision == "fp32" and torch.float64 in (call[0].dtype, call[1].dtype)
        u, working = (FLOAT64, FLOAT64) if double else (UNIT_ROUNDOFF[precision], FLOAT32)

        def off(x, by):
            return x + by * random.choice(np.array((-1.0, 1.0)), size=x.shape)

        found = [], []
        for s, t, delta, keys, mask, *through in self._images(*call, **options):
            kl, gradient = self._image(s, t, delta, keys, mask, *through)
            sizes = [np.linalg.norm(x, axis=1, keepdims=True) for x in (t, delta, keys)]
            accumulation = math.sqrt(s.shape[1]) * working * sizes[2].T
            squares = np.zeros((2, len(kl)))
            for _ in range(draws):
                k = off(keys, u * np.abs(keys) + FLOAT64)
                a = off(t, u * np.abs(t)) @ k.T
                a = off(a, 4 * working + accumulation * sizes[0])
                d = off(off(delta, u * np.abs(delta) + FLOAT64) @ k.T, accumulation * sizes[1])
                noisy_kl, weight = self._rows(a, d, mask)
                # A weight that is computed from its logits again has their rounding, which its sum does not know of.
                logits = working * (sizes[0] + sizes[1]) * sizes[2].T
                by = u * np.abs(weight) + logits * (_softmax(a) + _softmax(a + d)) if mask.any() else 0
                noisy = self._through(off(weight, by) @ k, s, *through)
                raw = np.linalg.norm(weight @ keys, axis=1, keepdims=True) * through[1] / through[2]
                noisy = off(noisy, working * raw)
                noisy_kl = off(noisy_kl, 4 * working * kl)
                squares += (noisy_kl - kl) ** 2, ((noisy - gradient) ** 2).sum(1)
            # Weights below float32's normal range have no digits left.
            smallest = 0 if double else float(np.finfo(np.float32).tiny) * len(keys)
            for limits, x, factor in zip(
                found, np.sqrt(squares / draws), (1, (through[1] / through[2])[:, 0]), strict=True
            ):
                limits.append(x + smallest * (1 + factor))
        return tuple(map(np.stack, found))

    check = staticmethod(Truth.check)

    @staticmethod
    def _images(student, teacher, keys, *, student_temperature, teacher_temperature, key_mask=None, normalize=True):
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            s, t, k = (x.detach().double().numpy() for x in (s, t, keys[i % len(keys)]))
            inverse_norm = np.ones((len(s), 1))
            if normalize:
                (s, inverse_norm), (t, _), (k, _) = map(_normalise, (s, t, k))
            mask = np.ones(len(k), bool) if key_mask is None else key_mask[i % len(key_mask)].numpy()
            t = t / teacher_temperature
            delta = s / student_temperature - t
            yield s, t, delta, k - k.mean(0), mask, normalize, inverse_norm, student_temperature

    @classmethod
    def _image(cls, s, t, delta, keys, mask, *through):
        kl, weight = cls._rows(t @ keys.T, delta @ keys.T, mask)
        return kl, cls._through(weight @ keys, s, *through)

    @staticmethod
    def _through(raw, s, normalize, inverse_norm, student_temperature):
        """The gradient with respect to the student's vectors from that with respect to the logits' rows."""
        along = (raw * s).sum(1, keepdims=True) * s if normalize else 0
        return (raw - along) * inverse_norm / student_temperature

    @staticmethod
    def _rows(a, d, mask):
        if not mask.any():
            return np.zeros(len(a)), np.zeros_like(a)
        a, d = np.where(mask, a, -np.inf), np.where(mask, d, 0)
        d = d - np.take_along_axis(d, a.argmax(1)[:, None], 1)
        p = _softmax(a)
        mean = (p * d).sum(1, keepdims=True)
        c = d - mean
        small = np.clip(c, None, 300)
        tail = _expm1_tail(small)
        v = (p * tail).sum(1, keepdims=True)
        far = np.where(mask, c, 0).max(1, keepdims=True) > 300
        kl = np.where(far, _logsumexp(a + d) - _logsumexp(a) - mean, np.log1p(v))
        return kl[:, 0], np.where(far, _softmax(a + d) - p, p * (tail + small - v) / (1 + v))


class Backend:
    """A backend on a device: takes rows (B, N, C), gives the map (B, N) and the gradient (B, N, C), both on the CPU."""

    def __init__(self, name):
        implementation, where = name.split("-")
        self.module = dispatch.load(implementation)
        self.device = "cuda" if where == "cuda" else "cpu"
        self.is_interpreted = where == "interpreter"

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
        """All of `values`; interpreted, at a fifth of a second per call, the k-th alone, so that k has to go round."""
        return (values[k % len(values)],) if self.is_interpreted else values

    def _maps(self, rows, image):
        return rows.to(self.device).mT.unflatten(2, image or (rows.shape[1], 1))

    def _rows(self, values, gradient):
        return values.flatten(1).cpu(), None if gradient is None else gradient.flatten(2).mT.cpu()


# Implementation and where it runs.
BACKENDS = ("torch-cpu", "cpu-cpu", "triton-interpreter", "torch-cuda", "triton-cuda", "cuda-cuda")


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
    return [pytest.param(name, id=name, marks=[pytest.mark.gpu] if name.endswith("-cuda") else []) for name in names]


@pytest.fixture(scope="session")
def all_backends():
    """Every backend by its name, or the reason why it cannot run here."""
    return {name: _backend_or_reason(name) for name in BACKENDS}


@pytest.fixture
def cpu(all_backends):
    return _available(all_backends, "cpu-cpu")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=_parameters(*BACKENDS))
def backend(request, all_backends):
    """Interpreted, with tiles as they are for the interpreter; `triton_backend` has those of the table."""
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
        from dskd_fast.kernels import configs, prepare

        def config(architecture, precision, width):
            channels = min(width, configs.LARGEST_WIDTH)
            blocks = configs.Blocks(rows, keys, channels, warps=4, stages=1)
            return configs.Config(blocks, blocks, chunk=channels)

        monkeypatch.setattr(configs, "config", config)
        monkeypatch.setattr(configs, "DISTILLATION", {})
        monkeypatch.setattr(prepare, "BLOCK_P", configs.ROW_MULTIPLE)
        monkeypatch.setattr(prepare, "BLOCK_C", configs.SMALLEST_WIDTH)

    return patch


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
