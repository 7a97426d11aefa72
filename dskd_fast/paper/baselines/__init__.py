"""The methods that the paper's tables compare with, a file each: fitted on good images, they give maps and scores."""

from collections.abc import Sequence

from dskd_fast.choices import ANOMALIB
from dskd_fast.paper.baselines.protocol import Baseline


def make_baseline(name: str, size: int, channels: Sequence[int]) -> Baseline:
    """A method that is not fitted yet.

    Args:
        name: one of `dskd_fast.choices.METHODS` other than the paper's own and "rd", or "anomalib:NAME".
        size: S of images and maps.
        channels: of the teacher's levels, finest first.

    Raises:
        UserError: anomalib is not installed, or has no model of that name.
    """
    # Imported one by one: who asks for one method waits for no other's libraries.
    if name.startswith(ANOMALIB):
        from dskd_fast.paper.baselines.of_anomalib import OfAnomalib

        return OfAnomalib(size, channels, name.removeprefix(ANOMALIB))
    from dskd_fast.paper.baselines.ae import Autoencoder
    from dskd_fast.paper.baselines.f_anogan import FAnoGan
    from dskd_fast.paper.baselines.gcad import Gcad
    from dskd_fast.paper.baselines.mnad import Mnad
    from dskd_fast.paper.baselines.patchcore import PatchCore
    from dskd_fast.paper.baselines.spade import Spade
    from dskd_fast.paper.baselines.us import UninformedStudents
    from dskd_fast.paper.baselines.vae import VariationalAutoencoder
    from dskd_fast.paper.baselines.vm import VariationModel

    methods: dict[str, type[Baseline]] = {
        "ae": Autoencoder,
        "vae": VariationalAutoencoder,
        "mnad": Mnad,
        "vm": VariationModel,
        "f-anogan": FAnoGan,
        "spade": Spade,
        "us": UninformedStudents,
        "patchcore-25": PatchCore,
        "gcad": Gcad,
    }
    return methods[name](size, channels)
