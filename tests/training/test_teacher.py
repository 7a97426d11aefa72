"""The frozen teacher of a training, and the features that it keeps."""

import pytest
import torch

import dskd_fast.training.teacher as teacher_module
from dskd_fast.data.layout import open_category
from dskd_fast.data.store import ImageStore
from dskd_fast.detection.detector import to_float
from dskd_fast.device import numerics
from dskd_fast.training.distributed import ALONE
from dskd_fast.training.teacher import FrozenTeacher


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_features_are_the_teachers_and_none_are_kept_beyond_the_limit(
    data_root, tiny_options, monkeypatch, precision
):
    images = ImageStore(open_category(data_root, "screw_bag").train, 64)
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
