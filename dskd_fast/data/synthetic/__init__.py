from dskd_fast.data.synthetic.scene import CATEGORY, MANIFEST, make_screw_bag

__all__ = ["CATEGORY", "MANIFEST", "make_screw_bag"]
