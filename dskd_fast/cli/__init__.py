"""The command line: `dskd-fast`."""

from dskd_fast.cli.main import main

__all__ = ["main"]
