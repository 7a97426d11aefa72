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


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 0.05)]
)
def test_kept_features_are_the_teachers(images, tiny_options, precision, dtype, tolerance):
    options = tiny_options(precision=precision)
    model = options.networks(pretrained=True).to(memory_format=torch.channels_last)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    teacher = FrozenTeacher(model.teacher, options)
    kept = teacher.features_of(images, 12, ALONE).of([10, 8])
    # Images 8 to 11 are computed together, so that these are the same bits.
    together = teacher(to_float(images.batch(range(8, 12)), "cpu"))
    # The run's own teacher is not folded; in bf16 the two round each layer in other ways.
    with numerics(precision, torch.device("cpu")):
        unfolded = model.teacher(to_float(images.batch([10, 8]), "cpu"))
    for found, same, near in zip(kept, together, unfolded, strict=True):
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, same[[2, 0]])
        assert (found.float() - near.float()).norm() < tolerance * near.float().norm()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


def test_features_are_not_kept_where_memory_is_too_small_and_long_work_says_how_far_it_is(
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

    def no_room(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    too_large = "the teacher's features of the 12 images are too large to be kept, so it runs in every step"
    for place, name, value, group in (
        (teacher_module, "KEPT_BYTES", n_bytes - 1, ALONE),
        (teacher_module, "KEPT_BYTES", 2 * n_bytes - 1, Two(0, 2)),
        (teacher_module, "_physical_memory", lambda: 4 * n_bytes - 4, ALONE),
        (torch.Tensor, "new_empty", no_room, ALONE),
    ):
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert teacher.features_of(images, 12, group) is None
        assert caplog.messages[-1].startswith(too_large)
