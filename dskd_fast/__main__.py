"""`python -m dskd_fast`, the same as `dskd-fast`."""

from dskd_fast.cli import main

raise SystemExit(main())
