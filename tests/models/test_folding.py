"""Folded networks give what they gave before."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from dskd_fast.models import DSKD
from dskd_fast.models.folding import fold
from dskd_fast.runs.options import TrainingOptions

# Of the detectors below as they were before there was any folding.
SCORES = {
    "calibrated": [0.691950798034668, 0.5316815972328186, 0.5710782408714294, 2.4113123416900635],
    "paper": [3.0310473442077637, 3.4822897911071777, 3.817066192626953, 3.2423787117004395],
}


def networks():
    torch.manual_seed(0)
    return with_statistics(DSKD("lite", image_size=64, gccb=8, pretrained=False))


def with_statistics(model):
    """Batch norm as training leaves it, not as the identity."""
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d) and part.track_running_stats:
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(part.bias, -0.5, 0.5, generator=generator)
    return model.eval()


def images(n, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 3, 8, 8), generator=generator)
    return (255 * nn.functional.interpolate(coarse, scale_factor=8, mode="bilinear")).to(torch.uint8)


@pytest.mark.parametrize("scoring", SCORES)
def test_scores_of_folded_networks_are_those_from_before(scoring):
    model = networks()
    detector = TrainingOptions("lite", image_size=64, gccb=8, scoring=scoring).detector(model)
    detector.calibrate([images(6, 0)], "validation", training=[images(12, 1)])
    model.fold()
    assert detector.find(images(4, 2)).scores["combined"] == pytest.approx(SCORES[scoring], abs=1e-4)
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


def test_only_what_can_be_folded_is_folded():
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


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(Standardised(4, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        ReadsWeights(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
    ],
)
def test_a_pair_that_cannot_be_folded_stays_as_it_is(network):
    network = with_statistics(network).double()
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    before = network(x)
    fold(network)
    assert torch.equal(network(x), before)
    assert isinstance(network[1], nn.BatchNorm2d)


def test_code_that_cannot_be_followed_stays_as_it_is():
    class DependsOnData(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    network = DependsOnData(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    fold(network)
    assert isinstance(network[1], nn.BatchNorm2d)
