"""Initial weights: He's, or none at all where a file brings them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# The random ones among the functions that modules call when they are built; each returns the tensor that it fills.
_FILLS = {
    *(nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_, nn.init.orthogonal_),
    *(nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_),
    *(Tensor.uniform_, Tensor.normal_),
}


def initialise(module: nn.Module) -> None:
    """He initialisation of all convolutions (fan out, ReLU), as ResNets are; batch norm starts as the identity."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


class WithoutRandomWeights(TorchFunctionMode):
    """Modules built inside keep whatever is in memory as their weights, for a state dict that is loaded next.

    Unlike modules on the meta device they have all buffers, those that no state dict holds, too.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **kwargs or {})
