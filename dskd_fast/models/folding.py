"""Networks that do not learn, made cheaper: batch norm within the convolutions, weights rounded once."""

import sys
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights


def _of_timm(name: str) -> tuple[type[nn.Module], ...]:
    """One of timm's kinds of layers, or none where nothing has imported them: then no network has any."""
    layers = sys.modules.get("timm.layers")
    return () if layers is None else (getattr(layers, name),)


def _convolutions() -> tuple[type[nn.Module], ...]:
    return (nn.Conv2d, nn.ConvTranspose2d, *_of_timm("Conv2dSame"))


def fold(network: nn.Module) -> None:
    """Put each batch norm of a network, as it is in eval mode, into the convolution before it, in place.

    The network then gives the same but for float32 rounding, cannot be trained any more, and has another state dict.
    Where a convolution's result goes elsewhere, too, a convolution is none of PyTorch's own kinds, or a backbone's code
    cannot be followed, batch norm stays.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception:  # of any kind: what a backbone's own code makes of stand-ins for tensors
        return
    modules = dict(network.named_modules())
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in nodes]
    # Of these the backbone's code takes the weights themselves.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in nodes:
        before, name = node.args[0], str(node.target)
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv: Any = modules[str(before.target)]
        norm: Any = modules[name]
        once = targets.count(name) == targets.count(str(before.target)) == 1
        if once and not {name, str(before.target)} & read and _can_hold_bias(conv) and _can_be_folded(norm):
            _fold_pair(conv, norm)
            parent, _, own_name = name.rpartition(".")
            has_more = isinstance(norm, _of_timm("BatchNormAct2d"))
            left = nn.Sequential(norm.drop, norm.act) if has_more else nn.Identity()
            setattr(network.get_submodule(parent), own_name, left)


def round_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Keep the weights of convolutions and linear layers in `dtype`, in place.

    Under autocast to `dtype` nothing changes but that they are not rounded again in every call.
    """
    for part in network.modules():
        if _is_plain(part, *_convolutions(), nn.Linear):
            part.to(dtype)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_of_a_pair = isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d)
        return is_of_a_pair or super().is_leaf_module(m, module_qualified_name)


def _is_plain(part: nn.Module, *kinds: type[nn.Module]) -> bool:
    # Subclasses may compute with other weights than they hold, as those that standardise them do, or, as the condensing
    # block, in float32 whatever autocast says.
    return type(part) in kinds and not parametrize.is_parametrized(part)


def _can_hold_bias(part: nn.Module) -> bool:
    # The weights of groups that are transposed lie in another order.
    return _is_plain(part, *_convolutions()) and not (isinstance(part, nn.ConvTranspose2d) and part.groups > 1)


def _can_be_folded(part: nn.Module) -> bool:
    return type(part) in (nn.BatchNorm2d, *_of_timm("BatchNormAct2d")) and part.running_var is not None


@torch.no_grad()
def _fold_pair(conv: Any, norm: Any) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
        transpose=isinstance(conv, nn.ConvTranspose2d),
    )
