"""The methods that the paper's tables compare with, a file each: fitted on good images, they give maps and scores."""

from dskd_fast.choices import ANOMALIB
from dskd_fast.models.teacher import Teacher
from dskd_fast.paper.baselines.protocol import Baseline


def make_baseline(name: str, size: int, teacher: Teacher, weights: str | None = None) -> Baseline:
    """A method that is not fitted yet.

    Args:
        name: one of `dskd_fast.choices.METHODS` other than the paper's own and "rd", or "anomalib:NAME".
        size: S of images and maps.
        teacher: of all methods.
        weights: a file of its weights, else its own are taken, where a model of anomalib has a copy of it.

    Raises:
        UserError: anomalib is not installed, or has no model of that name for this teacher.
    """
    # Imported one by one: who asks for one method waits for no other's libraries.
    if name.startswith(ANOMALIB):
        from dskd_fast.paper.baselines.of_anomalib import OfAnomalib

        return OfAnomalib(size, teacher, teacher.load_weights(weights), name.removeprefix(ANOMALIB))
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
    return methods[name](size, [level.channels for level in teacher.levels])
