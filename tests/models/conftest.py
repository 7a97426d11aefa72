import pytest
import torch
from torch import nn


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def with_statistics():
    """Gives a network's batch norm what training leaves there, where it was the identity."""

    def randomise(network):
        generator = torch.Generator().manual_seed(1)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d) and part.track_running_stats:
                part.running_mean.normal_(0, 0.2, generator=generator)
                part.running_var.uniform_(0.5, 2, generator=generator)
                nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(part.bias, -0.5, 0.5, generator=generator)
        return network.eval()

    return randomise
