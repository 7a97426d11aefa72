"""The operators in plain operations: as accurate as the backends, and nothing of ours left in an exported program."""

import functools

import onnxruntime
import openvino
import pytest
import torch
from torch import nn

from dskd_fast import functional
from dskd_fast.backends import torch as torch_tiled
from dskd_fast.backends import torch_distillation
from dskd_fast.ops import portable


def features(noise, size=12, channels=24, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn((2, channels, size, size), generator=generator).relu()
    student = (scale * (teacher + noise * torch.randn(teacher.shape, generator=generator))).relu()
    return student, teacher


def contextual_affinity(student, teacher, temperature):
    return portable.contextual_affinity(student, teacher, temperature, "fp32", "auto", False)[0]


def exact_affinity(student, teacher, temperature):
    return torch_tiled.contextual_affinity(student.double(), teacher.double(), temperature, "fp32", False)[0]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("noise", [1, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize(("temperature", "limit"), [(100, 3e-7), (4, 3e-7), (1, 3e-7), (0.1, 1e-6), (0.01, 5e-5)])
def test_contextual_affinity_keeps_its_digits(noise, temperature, limit):
    student, teacher = features(noise)
    found = contextual_affinity(student, teacher, temperature)
    assert found.dtype == torch.float32
    assert relative_error(found, exact_affinity(student, teacher, temperature)) < limit
    assert torch.equal(contextual_affinity(student, teacher, torch.tensor(temperature, dtype=torch.float64)), found)


@pytest.mark.parametrize("scale", [1.3, 1e-17, 1e-11, 1e-4, 1e8, 1e17])
def test_a_student_of_another_length_than_its_teacher_loses_no_digits(scale):
    """Only directions count, so students learn no lengths, and a plain difference would be rounded to the teacher's."""
    student, teacher = features(1e-3, scale=scale)
    assert student.dtype == torch.float32
    assert relative_error(contextual_affinity(student, teacher, 1.0), exact_affinity(student, teacher, 1.0)) < 3e-7
    expected, _ = torch_tiled.cosine_distance(student.double(), teacher.double(), None)
    assert relative_error(portable.cosine_distance(student, teacher, "auto"), expected) < 2e-7


@pytest.mark.parametrize("temperature", [100, 1, 0.01])
def test_opposite_and_equal_and_zero_vectors(temperature):
    _, teacher = features(1)
    teacher[:, :, 3] = 0
    for student in (-teacher, teacher.clone(), torch.zeros_like(teacher)):
        found, expected = (f(student, teacher, temperature) for f in (contextual_affinity, exact_affinity))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-12)
        expected, _ = torch_tiled.cosine_distance(student, teacher, None)
        torch.testing.assert_close(portable.cosine_distance(student, teacher, "auto"), expected)


def test_slabs_do_not_matter(monkeypatch):
    student, teacher = features(0.1)
    whole = contextual_affinity(student, teacher, 1.0)
    monkeypatch.setattr(portable, "_SLAB_ELEMENTS", 1)
    # 144 rows in slabs of 21, of which the last is shorter.
    monkeypatch.setattr(portable, "_MAX_SLABS", 7)
    torch.testing.assert_close(contextual_affinity(student, teacher, 1.0), whole, rtol=1e-6, atol=0)


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="no_grad"):
        portable.contextual_affinity(*features(1), 1.0, "fp32", "auto", True)


@pytest.mark.parametrize("noise", [1, 1e-3])
@pytest.mark.parametrize(("temperatures", "limit"), [((0.1, 0.1), 1e-6), ((0.07, 0.01), 1e-5)])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_distillation_keeps_its_digits(noise, temperatures, limit, normalize):
    student, teacher = features(noise, size=6)
    keys = torch.randn(1, 70, 24, generator=torch.Generator().manual_seed(1)).relu()
    if not normalize:
        student, teacher, keys = (x / 8 for x in (student, teacher, keys))
    key_mask, row_mask = torch.arange(70)[None] % 3 > 0, torch.arange(72).view(2, 6, 6) % 5 > 0
    masks = torch.cat((key_mask, key_mask & False)), row_mask
    doubles = (student.double(), teacher.double(), keys.double())
    expected, _ = torch_distillation.affinity_distillation(*doubles, *temperatures, *masks, normalize, "fp32", False)
    of_tensors = (torch.tensor(t, dtype=torch.float64) for t in temperatures)
    call = student, teacher, [keys], None, *of_tensors, *masks, normalize, "fp32", "auto", False
    found, _ = portable.affinity_distillation(*call)
    assert found.dtype == torch.float32
    assert (found[1] == 0).all()
    assert relative_error(found, expected) < limit
    with pytest.raises(NotImplementedError, match="export with the keys themselves"):
        portable.affinity_distillation(*call[:3], 70, *call[4:])


def test_an_exported_program_holds_no_operator_of_ours_and_takes_any_batch():
    class All(nn.Module):
        def forward(self, student, teacher):
            kl = functional.affinity_distillation(student, teacher, student_temperature=0.1, teacher_temperature=0.2)
            return functional.contextual_affinity(student, teacher), functional.cosine_distance(student, teacher), kl

    free = {0: torch.export.Dim("batch")}
    export = functools.partial(torch.export.export, All(), features(1), dynamic_shapes=(free, free), strict=False)
    with torch.no_grad(), portable.without_operators():
        program = export()
    assert "dskd_fast" not in str(program.graph)
    assert "dskd_fast" in str(export().graph)  # and no longer
    values = [x for node in program.graph.nodes if isinstance(x := node.meta.get("val"), torch.Tensor)]
    # But for the temperature.
    assert {x.dtype for x in values if x.dim() and x.is_floating_point()} == {torch.float32}
    student, teacher = (torch.cat([x, x[:1].flip(1)]) for x in features(1))
    for batch in (1, 3):
        found = program.module()(student[:batch], teacher[:batch])
        torch.testing.assert_close(found, All()(student[:batch], teacher[:batch]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_runtimes_keep_the_digits(tmp_path):
    """What they fuse and reorder is theirs: students within 0.1 % of their teacher, longer than it."""
    temperatures = (0.1, 1.0, 10.0)

    class Losses(nn.Module):
        def forward(self, student, teacher):
            maps = [functional.contextual_affinity(student, teacher, T) for T in temperatures]
            return *maps, functional.cosine_distance(student, teacher)

    pair = features(1e-3, scale=1.3)
    with torch.no_grad(), portable.without_operators():
        program = torch.export.export(Losses(), pair, strict=False)
    path = tmp_path / "losses.onnx"
    torch.onnx.export(program, input_names=["s", "t"], dynamo=True, verbose=False).save(path)
    expected = [exact_affinity(*pair, T) for T in temperatures]
    expected.append(torch_tiled.cosine_distance(*(x.double() for x in pair), None)[0])
    inputs = {name: x.numpy() for name, x in zip("st", pair, strict=True)}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found in (session.run(None, inputs), [x.copy() for x in compiled(inputs).values()]):
        for ours, truth in zip(found, expected, strict=True):
            assert relative_error(torch.from_numpy(ours), truth) < 2e-6
