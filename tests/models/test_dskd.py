import copy
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as nnf

from dskd_fast import ContextualAffinityLoss, CosineDistanceLoss, reference
from dskd_fast.errors import UserError
from dskd_fast.models import DSKD
from dskd_fast.models.bottleneck import WholeMapConv2d, WholeMapConvTranspose2d
from dskd_fast.models.teacher import LITE

PARTS = ("local_bottleneck", "local_student", "global_bottleneck", "global_student")


def on_meta(*args, **options):
    """The networks without memory or numbers."""
    with torch.device("meta"):
        return DSKD(*args, pretrained=False, **options)


@pytest.fixture(scope="module")
def papers():
    return on_meta()


@pytest.fixture(scope="module")
def small_model():
    """Read only: tests that change it copy it."""
    torch.manual_seed(0)
    return DSKD(LITE, image_size=64, gccb=64, pretrained=False).eval()


def size_of(module):
    return sum(p.numel() for p in module.parameters())


def conv(i, o, kernel):
    return i * o * kernel**2


def bn(channels):
    return 2 * channels


def block(i, width, o, kernel=3, shortcut=None):
    """1x1, kernel x kernel, 1x1, a batch norm after each; a shortcut with a batch norm where it is not the identity."""
    body = conv(i, width, 1) + bn(width) + conv(width, width, kernel) + bn(width) + conv(width, o, 1) + bn(o)
    return body + (conv(i, o, shortcut) + bn(o) if shortcut else 0)


def down(blocks, i, width, o):
    return block(i, width, o, shortcut=1) + (blocks - 1) * block(o, width, o)


def up(blocks, i, width, o):
    return block(i, width, o, kernel=2, shortcut=2) + (blocks - 1) * block(o, width, o)


TEACHER = conv(3, 64, 7) + bn(64) + down(3, 64, 128, 256) + down(4, 256, 256, 512) + down(6, 512, 512, 1024)
STUDENT = up(3, 2048, 512, 1024) + up(4, 1024, 256, 512) + up(6, 512, 128, 256)
FUSION = conv(256, 512, 3) + bn(512) + 2 * (conv(512, 1024, 3) + bn(1024))
LOCAL_EMBEDDING = down(3, 3072, 1024, 2048)
GLOBAL_EMBEDDING = down(3, 1024, 1024, 2048)


def gccb(g, size):
    if g == 0:
        return 0
    condense = conv(g, g, size) + g
    restore = conv(g, g, size) + bn(g)
    around = 0 if g == 2048 else conv(2048, g, 1) + bn(g) + conv(g, 2048, 1) + bn(2048)
    return condense + restore + around


@pytest.mark.parametrize("g", [0, None, 2048])
def test_parameter_counts_of_the_papers_networks(papers, g):
    model = papers if g is None else on_meta(gccb=g)
    assert (model.teacher.name, model.image_size, model.gccb) == ("wide_resnet50_2", 256, 1024 if g is None else g)
    counts = {name: size_of(getattr(model, name)) for name in ("teacher", *PARTS)}
    assert counts == {
        "teacher": TEACHER,
        "local_bottleneck": FUSION + LOCAL_EMBEDDING,
        "local_student": STUDENT,
        "global_bottleneck": GLOBAL_EMBEDDING + gccb(model.gccb, 8),
        "global_student": STUDENT,
    }
    assert round(TEACHER / 1e6, 1) == 24.9  # as the paper says


def test_students_are_resnets_run_backwards_and_embeddings_halve(papers):
    """What numbers of parameters do not tell."""
    features = papers(torch.empty(2, 3, 256, 256, device="meta"))
    for network in features[:3]:
        assert [tuple(x.shape) for x in network] == [(2, 256, 64, 64), (2, 512, 32, 32), (2, 1024, 16, 16)]
    assert features.condensed.shape == (2, 1024)
    embeddings = papers.local_bottleneck(features.teacher), papers.global_bottleneck(features.teacher)[0]
    for bottleneck, embedding in zip((papers.local_bottleneck, papers.global_bottleneck), embeddings, strict=True):
        assert embedding.shape == (2, 2048, 8, 8)
        assert [block.conv2.stride for block in bottleneck.embed] == [(2, 2), (1, 1), (1, 1)]
    for student in (papers.local_student, papers.global_student):
        stages = [student.up3, student.up2, student.up1]
        assert [len(stage) for stage in stages] == [3, 4, 6]
        for part in (part for stage in stages for part in (stage[0].conv2, stage[0].downsample[0])):
            assert isinstance(part, nn.ConvTranspose2d)
            assert (part.kernel_size, part.stride) == ((2, 2), (2, 2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_whole_map_convolutions_are_convolutions(memory_format, is_autocast):
    """The same numbers, in float32 under autocast too, and gradients that lie as the weights do."""
    torch.manual_seed(0)
    x, vector = torch.randn(3, 6, 4, 4), torch.randn(3, 5, 1, 1)
    for part, given in ((WholeMapConv2d(6, 5, 4), x), (WholeMapConvTranspose2d(5, 6, 4), vector)):
        part = part.to(memory_format=memory_format)
        given = given.to(memory_format=memory_format).requires_grad_()
        kind = type(part).__mro__[1]
        expected = kind.forward(part, given)
        wanted = torch.autograd.grad(expected.square().sum(), [given, part.weight])
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            got = part(given)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)
        found = torch.autograd.grad(got.square().sum(), [given, part.weight])
        torch.testing.assert_close(found, wanted)
        assert found[1].stride() == part.weight.stride()


def test_initialisation_keeps_the_variance(small_model):
    """He's, fan out: standard deviation sqrt(2 / (kernel area x output channels)), up to the transposed ones' view."""
    for name in PARTS:
        for part in getattr(small_model, name).modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d) and part.weight.numel() > 5000:
                fan_out = part.weight[0, 0].numel() * part.weight.shape[0]
                assert part.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
            if isinstance(part, nn.BatchNorm2d):
                assert torch.equal(part.weight, torch.ones_like(part.weight))
                assert torch.equal(part.bias, torch.zeros_like(part.bias))


@pytest.mark.parametrize("g", [0, 8, 384])
def test_each_loss_reaches_all_of_its_own_branch_and_nothing_else(images, g):
    torch.manual_seed(0)
    model = DSKD("test_resnet", image_size=64, gccb=g, pretrained=False).train()
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    assert not any(part.training for part in model.teacher.modules())
    own = [
        {name for name, _ in model.named_parameters() if name.split(".")[0] in names}
        for names in (("local_bottleneck", "local_student"), ("global_bottleneck", "global_student"))
    ]
    assert own[0] | own[1] == {name for name, p in model.named_parameters() if p.requires_grad}
    features = model(images)
    for branch, loss in zip(
        own,
        (
            CosineDistanceLoss()(features.local_student, features.teacher),
            ContextualAffinityLoss()(features.global_student, features.teacher),
        ),
        strict=True,
    ):
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in branch), name
            assert name not in branch or 0 < parameter.grad.abs().max() < math.inf, name
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())


@pytest.mark.parametrize(("temperature", "align_corners"), [(1.0, False), (0.1, True)])
def test_anomaly_maps_are_the_sum_of_the_upsampled_levels(small_model, images, temperature, align_corners):
    model = small_model
    with torch.no_grad():
        features = model(images)
    expected = []
    for student, textbook in (
        (features.local_student, reference.cosine_distance),
        (features.global_student, lambda s, t: reference.contextual_affinity(s, t, temperature)),
    ):
        total = 0
        for s, t in zip(student, features.teacher, strict=True):
            values = textbook(*(x.double().flatten(2).mT for x in (s, t))).unflatten(1, s.shape[2:])
            total = total + nnf.interpolate(values[:, None], 64, mode="bilinear", align_corners=align_corners)[:, 0]
        expected.append(total)
    maps = model.anomaly_maps(images, temperature, align_corners=align_corners)
    for got, want in zip(maps, expected, strict=True):
        assert got.shape == (2, 64, 64)
        assert got.dtype == torch.float32
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def modes(model):
    return {name: part.training for name, part in model.named_modules()}


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 32, 64)], ids=["fits", "raises"])
def test_anomaly_maps_score_in_eval_mode_and_leave_every_part_and_its_state_as_they_were(small_model, images, shape):
    expected = small_model.anomaly_maps(images)
    model = copy.deepcopy(small_model).train()
    model.local_student.eval()  # as who freezes it does
    model.global_student.up1[0].bn1.eval()
    before, state = modes(model), copy.deepcopy(model.state_dict())
    assert 0 < sum(before.values()) < len(before)
    if shape == images.shape:
        torch.testing.assert_close(model.anomaly_maps(images), expected, rtol=0, atol=0)
    else:
        with pytest.raises(ValueError, match="images has shape"):
            model.anomaly_maps(images[:, :, :32])
    assert modes(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: (255 * x).byte(), ValueError, "images has dtype uint8: pass floating values from 0 to 1"),
        (lambda x: 255 * x, ValueError, r"images has values from .* to 25\d.*: pass values from 0 to 1"),
        (lambda x: x - 0.5, ValueError, "images has values from -0.*not normalised"),
        (lambda x: torch.where(x > 0.5, torch.nan, x).bfloat16(), ValueError, "images has values from nan"),
        (lambda x: x.numpy(), TypeError, "images is a ndarray: pass a tensor"),
    ],
)
def test_anomaly_maps_refuse_what_is_no_image_from_0_to_1(small_model, images, change, error, message):
    with pytest.raises(error, match=message):
        small_model.anomaly_maps(change(images))


def pooled(features):
    """The mean of each position and its neighbours, as many as there are, (B, C, h, w) in float64."""
    ones, window = np.ones(features.shape[2:]), np.ones((3, 3))
    n_there = ndimage.convolve(ones, window, mode="constant")
    return ndimage.convolve(features.double().numpy(), window[None, None], mode="constant") / n_there


def test_patches_are_pooled_features_of_the_teachers_second_and_third_level(small_model, images, bilinear):
    with torch.no_grad():
        _, second, third = small_model.teacher(images)
    found = small_model.measure(images).patches
    assert found.dtype == torch.float32
    assert found.shape == (2, *second.shape[2:], second.shape[1] + third.shape[1])
    weights = bilinear(third.shape[-1], second.shape[-1])
    expected = np.concatenate([pooled(second), weights @ pooled(third) @ weights.T], 1).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(
            ({"image_size": s}, UserError, rf"size {s} does not .* multiple of 32, such as {n}$")
            for s, n in ((100, 96), (0, 32))
        ),
        ({"teacher": "swin_tiny_patch4_window7_224"}, UserError, "image size 256 does not fit .*: use 224$"),
        *(
            ({"gccb": g}, UserError, rf"gccb={g} does not fit the teacher test_resnet: use 0 .* to 384$")
            for g in (-1, 385)
        ),
        ({"gccb": 384, "image_size": 2048}, UserError, "size 2048 and gccb=384 the condensing block would have 1"),
        ({"teacher": "wide_resnet"}, UserError, "timm has no model 'wide_resnet' .similar: .*resnet"),
        ({"stage4_init": "he"}, ValueError, "stage4_init='he' is not known: use 'imagenet' or 'random'"),
        ({"students": "none"}, ValueError, "students='none' is not known: use one of 'both', 'local', 'global'"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        on_meta(**{"teacher": "test_resnet"} | options)
