"""What the backends are compared with, and how far from it rounding alone may take them."""

import math

import numpy as np
import torch

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53
# Weights below float32's normal range have no digits left.
SMALLEST = float(np.finfo(np.float32).tiny)


class KeysTruth:
    """KL map and gradient of the distillation against any keys, in float64, without losing digits to a close student.

    The textbook in float64 loses eps (log N + 1/T), which is more than the whole KL of a good student. Here, with
    p = softmax(a) and c = d - sum_j p_j d_j,

        KL = log sum_j p_j exp(d_j) - sum_j p_j d_j = log1p(sum_j p_j (expm1(c_j) - c_j)),

    a sum of positive terms. `test_truth` compares it with 120-digit arithmetic. Arguments are those of
    `functional.affinity_distillation`.
    """

    def __call__(self, *call, **options):
        """(B, N, C) twice and keys (B, K, C) -> KL (B, N) and d KL_i / d student_i (B, N, C), numpy, float64."""
        images = [self._image(*image) for image in self._images(*call, **options)]
        return tuple(np.stack(x) for x in zip(*images, strict=True))

    def limits(self, *call, precision, are_own_keys=False, **options):
        """What rounding alone does to the two: root mean square errors, KL (B, N) and gradient (B, N).

        A backend rounds the operands of its products (t, or the keys where they are the same, s - t, k, and the weights
        p_s - p_t) to a unit roundoff u, and works in float32 from there on. So this evaluates the truth with every
        operand off by the relative amount u, of random sign, and with the errors of float32: a product of C terms is
        off by sqrt(C) u32 |x||y| (Higham and Mary's probabilistic bound), exp and the sums by a few u32. What the KL
        and the gradient then change by is their conditioning at this very input, for any N, C and T; real rounding
        errors lie within +-u, so they come to about half of it. No term depends on how a backend is written.
        """
        random, draws = np.random.default_rng(0), 8
        double = precision == "fp32" and torch.float64 in (call[0].dtype, call[1].dtype)
        u, working = (FLOAT64, FLOAT64) if double else (UNIT_ROUNDOFF[precision], FLOAT32)

        def off(x, by):
            return x + by * random.choice(np.array((-1.0, 1.0)), size=x.shape)

        found = [], []
        for s, t, delta, keys, mask, *through in self._images(*call, **options):
            kl, gradient = self._image(s, t, delta, keys, mask, *through)
            _, inverse_norm, temperature = through
            sizes = [np.linalg.norm(x, axis=1, keepdims=True) for x in (t, delta, keys)]
            accumulation = math.sqrt(s.shape[1]) * working * sizes[2].T
            operand = np.maximum(np.abs(t), np.abs(keys[: len(t)]) / temperature) if are_own_keys else np.abs(t)
            squares = np.zeros((2, len(kl)))
            for _ in range(draws):
                # The subtractions s - t and k - mean k are themselves exact to a rounding of unit vectors in float64.
                k = off(keys, u * np.abs(keys) + FLOAT64)
                a = off(t, u * operand) @ k.T
                a = off(a, 4 * working + accumulation * sizes[0])
                d = off(delta, u * np.abs(delta) + FLOAT64 * (np.abs(s) / temperature + np.abs(t)))
                d = off(d @ k.T, accumulation * sizes[1])
                noisy_kl, weight = self._rows(a, d, mask)
                by = u * np.abs(weight)
                if mask.any() and not are_own_keys:
                    # A weight that is computed from its logits again has their rounding, unknown to its sum.
                    logits = working * (sizes[0] + sizes[1]) * sizes[2].T
                    by = by + logits * (_softmax(a) + _softmax(a + d))
                raw = off(weight, by) @ k
                length = np.linalg.norm(raw, axis=1, keepdims=True)
                noisy = off(self._through(raw, s, *through), working * length * inverse_norm / temperature)
                noisy_kl = off(noisy_kl, 4 * working * kl)
                squares += (noisy_kl - kl) ** 2, ((noisy - gradient) ** 2).sum(1)
            smallest = 0 if double else SMALLEST * len(keys)
            factors = 1, (inverse_norm / temperature)[:, 0]
            for limits, x, factor in zip(found, np.sqrt(squares / draws), factors, strict=True):
                limits.append(x + smallest * (1 + factor))
        return tuple(map(np.stack, found))

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
    def _images(student, teacher, keys, *, student_temperature, teacher_temperature, key_mask=None, normalize=True):
        for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
            s, t, k = (x.detach().double().numpy() for x in (s, t, keys[i % len(keys)]))
            inverse_norm = np.ones((len(s), 1))
            if normalize:
                (s, inverse_norm), (t, _), (k, _) = map(_normalise, (s, t, k))
            mask = np.ones(len(k), bool) if key_mask is None else key_mask[i % len(key_mask)].numpy()
            delta = s - t if student_temperature == teacher_temperature else None
            t = t / teacher_temperature
            delta = s / student_temperature - t if delta is None else delta / student_temperature
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
        """KL and p_s - p_t of each row, from the logits a and the differences d."""
        if not mask.any():
            return np.zeros(len(a)), np.zeros_like(a)
        a, d = np.where(mask, a, -np.inf), np.where(mask, d, 0)
        # The c of the largest p is then the sum of the others' tiny parts.
        d = d - np.take_along_axis(d, a.argmax(1)[:, None], 1)
        p = _softmax(a)
        mean = (p * d).sum(1, keepdims=True)
        c = d - mean
        small = np.clip(c, None, 300)
        tail = _expm1_tail(small)
        v = (p * tail).sum(1, keepdims=True)
        # exp(c) would overflow; a KL of hundreds has no digits to lose.
        far = np.where(mask, c, 0).max(1, keepdims=True) > 300
        kl = np.where(far, _logsumexp(a + d) - _logsumexp(a) - mean, np.log1p(v))
        return kl[:, 0], np.where(far, _softmax(a + d) - p, p * (tail + small - v) / (1 + v))


class Truth:
    """The same of the contextual affinity, T^2 times that against the teacher's own keys; of the first `rows` alone."""

    keys_truth = KeysTruth()
    check = staticmethod(KeysTruth.check)

    def __call__(self, student, teacher, temperature, rows=None):
        call, options = self._call(student, teacher, temperature, rows)
        return tuple(temperature**2 * x for x in self.keys_truth(*call, **options))

    def limits(self, student, teacher, temperature, precision, rows=None):
        call, options = self._call(student, teacher, temperature, rows)
        kl, gradient = self.keys_truth.limits(*call, precision=precision, are_own_keys=True, **options)
        is_double = precision == "fp32" and torch.float64 in (student.dtype, teacher.dtype)
        smallest = 0 if is_double else SMALLEST * teacher.shape[1]
        inverse = _normalise(call[0].double().numpy())[1][..., 0]
        gradient = temperature**2 * gradient + smallest * max(1, temperature) * (1 + inverse)
        return temperature**2 * kl + smallest, gradient

    @staticmethod
    def _call(student, teacher, temperature, rows):
        of_both = {"student_temperature": temperature, "teacher_temperature": temperature}
        return (student.detach()[:, :rows], teacher[:, :rows], teacher), of_both


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
