"""A rendered `screw_bag` category in the layout of MVTec LOCO AD, so that no download is needed.

A good image shows one transparent zip bag with exactly one long screw, one short screw, two equal nuts and
two equal washers. Structural anomalies damage something that belongs there; logical anomalies change which
parts are there while each part is perfect in itself.

The way from a seed to a file: `sample_scene` describes a good bag (`Scene`), a `Kind` edits the description
and says which region is then defective, and `render` turns any description into an image. `render` draws
nothing at random that is not in the description, so a scene and its edited twin differ only by the defect.

Lengths are in scene units. The canvas is 480 x 336 units, fitted into the image without distortion; x runs to
the right, y downwards, angles turn clockwise. Parts and marks are placed in the frame of the bag: origin in
its middle, moving with it.
"""

from dskd_fast.data.synthetic.dataset import CATEGORY, MANIFEST, make_screw_bag

__all__ = ["CATEGORY", "MANIFEST", "make_screw_bag"]
