"""The frozen teacher of a training, and the features that it keeps."""

import logging

import pytest
import torch

import dskd_fast.training.teacher as teacher_module
from dskd_fast.data.layout import open_category
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.detector import to_float
from dskd_fast.device import numerics
from dskd_fast.training.distributed import ALONE, Group
from dskd_fast.training.teacher import FrozenTeacher


@pytest.fixture
def images(data_root):
    return ImageStore(open_category(data_root, "screw_bag").train, 64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_features_are_the_teachers_and_none_are_kept_beyond_the_limit(
    images, tiny_options, monkeypatch, precision
):
    options = tiny_options(precision=precision)
    model = options.networks(pretrained=True).to(memory_format=torch.channels_last)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    teacher = FrozenTeacher(model.teacher, options)
    kept = teacher.features_of(images, 12, ALONE)
    # Images 8 to 11 are computed together, so that these are the same bits.
    for ours, theirs in zip(kept.of([10, 8]), teacher(to_float(images.batch(range(8, 12)), "cpu")), strict=True):
        assert ours.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, theirs[[2, 0]])
    # The run's own teacher is not folded; in bf16 the two round each layer in other ways.
    tolerance = {"fp32": 1e-5, "bf16": 0.05}[precision]
    with numerics(precision, torch.device("cpu")):
        expected = model.teacher(to_float(images.batch([10, 8]), "cpu"))
    for ours, theirs in zip(kept.of([10, 8]), expected, strict=True):
        assert (ours.float() - theirs.float()).norm() < tolerance * theirs.float().norm()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())

    n_bytes = 12 * sum(x[0].nbytes for x in kept.of([0]))
    monkeypatch.setattr(teacher_module, "KEPT_BYTES", n_bytes - 1)
    assert teacher.features_of(images, 12, ALONE) is None


def test_features_are_not_kept_where_the_memory_is_too_small_and_long_work_says_how_far_it_is(
    images, tiny_options, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "dskd_fast")
    options = tiny_options()
    teacher = FrozenTeacher(options.networks(pretrained=True).teacher, options)
    monkeypatch.setattr(teacher_module, "PROGRESS_SECONDS", 0)
    n_bytes = 12 * sum(x[0].nbytes for x in teacher.features_of(images, 12, ALONE).of([0]))
    assert caplog.messages[-2:] == ["features of 8 of 12 images computed", "features of 12 of 12 images computed"]

    class Two(Group):
        """Two processes, of which the other has room."""

        add = staticmethod(lambda values: values)

    too_large = "the teacher's features of the 12 images are too large to be kept, so it runs in every step"
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "KEPT_BYTES", 2 * n_bytes - 1)
        assert teacher.features_of(images, 12, Two(0, 2)) is None
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "_physical_memory", lambda: 4 * n_bytes - 4)
        assert teacher.features_of(images, 12, ALONE) is None

    def no_room(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.Tensor, "new_empty", no_room)
    assert teacher.features_of(images, 12, ALONE) is None
    assert sum(message.startswith(too_large) for message in caplog.messages) == 3
