"""Folded networks give what they gave before."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dskd_fast.models import DSKD
from dskd_fast.models.folding import fold


# The second has layers of timm's own.
@pytest.mark.parametrize("teacher", ["lite", "tf_efficientnet_lite0"])
def test_folded_networks_give_what_they_gave(with_statistics, images, teacher):
    torch.manual_seed(0)
    model = with_statistics(DSKD(teacher, image_size=64, gccb=8, pretrained=False).double())
    before = model(images.double())
    model.fold()
    torch.testing.assert_close(model(images.double()), before, rtol=1e-9, atol=1e-9)
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms == ["global_bottleneck.condense.restore.1"]  # the condensing block's own product has no bias


class Unusual(nn.Module):
    """One convolution for two norms, one whose result goes elsewhere, too, and one that can be folded."""

    def __init__(self):
        super().__init__()
        self.twice, self.branching, self.plain = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (3, 3, 3, 3, 2))

    def forward(self, x):
        x = self.norms[1](self.twice(self.norms[0](self.twice(x))))
        x = self.branching(x)
        x = x + self.norms[2](x)
        return self.norms[4](self.up(self.norms[3](self.plain(x))))


def test_only_what_can_be_folded_is_folded(with_statistics):
    network = with_statistics(Unusual()).double()
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    before = network(x)
    fold(network)
    torch.testing.assert_close(network(x), before, rtol=1e-12, atol=1e-12)
    assert [isinstance(norm, nn.BatchNorm2d) for norm in network.norms] == [True, True, True, False, False]


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class ReadsWeights(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + self[0].weight.sum()


class DependsOnData(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(Standardised(4, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        ReadsWeights(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        DependsOnData(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ],
    ids=["other arithmetic", "weights from others", "groups", "no statistics", "weights read", "code not followed"],
)
def test_what_cannot_be_folded_stays_as_it_is(with_statistics, network):
    network = with_statistics(network).double()
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    before = network(x)
    fold(network)
    assert torch.equal(network(x), before)
    assert isinstance(network[1], nn.BatchNorm2d)
