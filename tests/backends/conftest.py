"""What a backend's contextual affinity is compared with, and how far from it rounding alone may take it."""

import math

import numpy as np
import pytest
import torch

UNIT_ROUNDOFF = {"ieee": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53


class Truth:
    """KL map and gradient in float64, by formulas that lose no digits however close the student is.

    The textbook in float64 loses T^2 eps (log N + 1/T), which is more than the whole KL of a good student. Here, with
    p = softmax(a) and c = d - sum_j p_j d_j,

        KL / T^2 = log sum_j p_j exp(d_j) - sum_j p_j d_j = log1p(sum_j p_j (expm1(c_j) - c_j)),

    a sum of positive terms. `test_truth_*` compare it with 120-digit arithmetic and with the textbook.
    """

    def __call__(self, student, teacher, temperature):
        """(B, N, C) tensors -> KL (B, N) and d KL_i / d student_i (B, N, C), numpy, float64."""
        pairs = [self._image(*self._directions(s, t), temperature) for s, t in zip(student, teacher, strict=True)]
        return tuple(np.stack(x) for x in zip(*pairs, strict=True))

    def limits(self, student, teacher, temperature, precision, draws=8):
        """What rounding alone does to the two: root mean square errors, KL (B, N) and gradient (B, N).

        A backend rounds the operands of its products (t_i, s_i - t_i, k_j, and the weights p_s - p_t) to a unit
        roundoff u, and works in float32 from there on. So this evaluates the truth with every operand off by the
        relative amount u, of random sign, and with the errors of float32: a product of C terms is off by
        sqrt(C) u32 |x||y| (Higham and Mary's probabilistic bound), exp and the sums by a few u32. What the KL and the
        gradient then change by is their conditioning at this very input, for any N, C and T; real rounding errors lie
        within +-u, so they come to about half of it. No term depends on how a backend is written.
        """
        random = np.random.default_rng(0)
        u = UNIT_ROUNDOFF[precision]
        double = precision == "ieee" and torch.float64 in (student.dtype, teacher.dtype)
        u, working = (FLOAT64, FLOAT64) if double else (u, FLOAT32)

        def off(x, by):
            return x + by * random.choice(np.array((-1.0, 1.0)), size=x.shape)

        kl_limits, gradient_limits = [], []
        for raw_s, raw_t in zip(student, teacher, strict=True):
            s, t, keys, delta, inverse_norm = self._directions(raw_s, raw_t)
            kl, gradient = self._image(s, t, keys, delta, inverse_norm, temperature)
            sizes = [np.linalg.norm(x, axis=1, keepdims=True) for x in (t, delta, keys)]
            accumulation = math.sqrt(s.shape[1]) * working * sizes[2].T / temperature
            squares = np.zeros((2, len(kl)))
            for _ in range(draws):
                k = off(keys, u * np.abs(keys))
                a = off(t, u * np.abs(t)) @ k.T / temperature
                a = off(a, 4 * working + accumulation * sizes[0])
                # The subtraction s - t itself is exact to a rounding of s and t in float64.
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
            smallest = 0 if double else float(np.finfo(np.float32).tiny) * len(kl)
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
    def _directions(student, teacher):
        s, inverse_norm = _normalise(student.detach().double().numpy())
        t, _ = _normalise(teacher.double().numpy())
        return s, t, t - t.mean(0), s - t, inverse_norm

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


@pytest.fixture(scope="session")
def truth():
    return Truth()


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
