import copy
import math

import numpy as np
import pytest
import torch
import torchvision
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


def block(i, width, o, kernel=3, shortcut=None):
    """1x1, kernel x kernel, 1x1, a batch norm after each; a shortcut with a batch norm where it is not the identity."""
    body = i * width + (kernel * width) ** 2 + width * o + 2 * (2 * width + o)
    return body + (i * o * shortcut**2 + 2 * o if shortcut else 0)


def stage(blocks, i, width, o, kernel=3, shortcut=1):
    return block(i, width, o, kernel, shortcut) + (blocks - 1) * block(o, width, o)


STUDENT = sum(stage(*s, kernel=2, shortcut=2) for s in ((3, 2048, 512, 1024), (4, 1024, 256, 512), (6, 512, 128, 256)))
FUSION = 9 * (256 * 512 + 2 * 512 * 1024) + 2 * (512 + 2 * 1024)


def gccb(g):
    """A convolution of the whole 8 x 8 map and one back, between 1x1 ones where g is not the number of channels."""
    around = 0 if g in (0, 2048) else 2 * 2048 * g + 2 * (2048 + g)
    return 2 * (8 * g) ** 2 + 3 * g + around


@pytest.mark.parametrize("g", [0, None, 2048])
def test_parameter_counts_of_the_papers_networks(papers, g):
    model = papers if g is None else on_meta(gccb=g)
    assert (model.teacher.name, model.image_size, model.gccb) == ("wide_resnet50_2", 256, 1024 if g is None else g)
    with torch.device("meta"):
        wide = torchvision.models.wide_resnet50_2()
    assert {name: size_of(getattr(model, name)) for name in ("teacher", *PARTS)} == {
        "teacher": size_of(wide) - size_of(wide.layer4) - size_of(wide.fc),
        "local_bottleneck": FUSION + stage(3, 3072, 1024, 2048),
        "local_student": STUDENT,
        "global_bottleneck": size_of(wide.layer4) + gccb(model.gccb),
        "global_student": STUDENT,
    }
    assert round(size_of(model.teacher) / 1e6, 1) == 24.9  # as the paper says


def test_students_are_resnets_run_backwards_and_embeddings_halve(papers):
    """What numbers of parameters do not tell."""
    features = papers(torch.empty(2, 3, 256, 256, device="meta"))
    for network in features[:3]:
        assert [tuple(x.shape) for x in network] == [(2, 256, 64, 64), (2, 512, 32, 32), (2, 1024, 16, 16)]
    assert features.condensed.shape == (2, 1024)
    embeddings = papers.local_bottleneck(features.teacher), papers.global_bottleneck(features.teacher)[0]
    assert [tuple(embedding.shape) for embedding in embeddings] == [(2, 2048, 8, 8)] * 2
    for bottleneck in (papers.local_bottleneck, papers.global_bottleneck):
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
    features, reached = model(images), set()
    for branch, loss in (
        ("local", CosineDistanceLoss()(features.local_student, features.teacher)),
        ("global", ContextualAffinityLoss()(features.global_student, features.teacher)),
    ):
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name, parameter in model.named_parameters():
            is_own = name.startswith((f"{branch}_bottleneck.", f"{branch}_student."))
            assert (parameter.grad is not None) == is_own, name
            assert not is_own or 0 < parameter.grad.abs().max() < math.inf, name
            reached |= {name} if is_own else set()
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())


@pytest.mark.parametrize(("temperature", "align_corners"), [(1.0, False), (0.1, True)])
def test_anomaly_maps_are_the_sum_of_the_upsampled_levels(small_model, images, temperature, align_corners):
    with torch.no_grad():
        features = small_model(images)
    maps = small_model.anomaly_maps(images, temperature, align_corners=align_corners)
    for got, student, textbook in zip(
        maps,
        (features.local_student, features.global_student),
        (reference.cosine_distance, lambda s, t: reference.contextual_affinity(s, t, temperature)),
        strict=True,
    ):
        expected = 0
        for s, t in zip(student, features.teacher, strict=True):
            values = textbook(*(x.double().flatten(2).mT for x in (s, t))).unflatten(1, s.shape[2:])
            expected += nnf.interpolate(values[:, None], 64, mode="bilinear", align_corners=align_corners)[:, 0]
        assert got.dtype == torch.float32
        assert not got.requires_grad
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def modes(model):
    return {name: part.training for name, part in model.named_modules()}


@pytest.mark.parametrize("fits", [True, False])
def test_anomaly_maps_score_in_eval_mode_and_leave_every_part_and_its_state_as_they_were(small_model, images, fits):
    expected = small_model.anomaly_maps(images)
    model = copy.deepcopy(small_model).train()
    model.local_student.eval()  # as who freezes it does
    model.global_student.up1[0].bn1.eval()
    before, state = modes(model), copy.deepcopy(model.state_dict())
    if fits:
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
        ({"image_size": 100}, UserError, r"size 100 does not .* multiple of 32, such as 96$"),
        ({"image_size": 0}, UserError, r"size 0 does not .* multiple of 32, such as 32$"),
        ({"teacher": "swin_tiny_patch4_window7_224"}, UserError, "image size 256 does not fit .*: use 224$"),
        ({"gccb": -1}, UserError, r"gccb=-1 does not fit the teacher test_resnet: use 0 .* to 384$"),
        ({"gccb": 385}, UserError, r"gccb=385 does not fit the teacher test_resnet: use 0 .* to 384$"),
        ({"gccb": 384, "image_size": 2048}, UserError, "size 2048 and gccb=384 the condensing block would have 1"),
        ({"teacher": "wide_resnet"}, UserError, "timm has no model 'wide_resnet' .similar: .*resnet"),
        ({"stage4_init": "he"}, ValueError, "stage4_init='he' is not known: use 'imagenet' or 'random'"),
        ({"students": "none"}, ValueError, "students='none' is not known: use one of 'both', 'local', 'global'"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        on_meta(**{"teacher": "test_resnet"} | options)
