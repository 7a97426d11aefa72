"""A rendered `screw_bag` category in the layout of MVTec LOCO AD, so that no download is needed.

A good image shows one transparent zip bag with exactly one long screw, one short screw, two equal nuts and two equal
washers. Structural anomalies damage something that belongs there; logical anomalies change which parts are there while
each part is perfect in itself.

From a seed to a file: `sample_scene` describes a good bag (`Scene`), a `Kind` edits the description and says which
region is then defective, and `render` turns any description into an image. It draws nothing at random that is not in
the description, so a scene and its edited twin differ only by the defect.
"""

from dskd_fast.data.synthetic.dataset import CATEGORY, MANIFEST, make_screw_bag

__all__ = ["CATEGORY", "MANIFEST", "make_screw_bag"]
