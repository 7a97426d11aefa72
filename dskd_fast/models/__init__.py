"""The networks of DSKD: a frozen teacher, a local and a global student."""

from dskd_fast.models.dskd import DSKD, Features, Measurements

__all__ = ["DSKD", "Features", "Measurements"]
