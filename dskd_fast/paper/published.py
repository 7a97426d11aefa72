"""The paper's printed figures."""

import json
from pathlib import Path
from typing import Any


def read_paper() -> dict[str, Any]:
    """What paper.json beside this file holds.

    "loco" and "mvtec-ad" have "methods"; "students" and "gccb" are rows of ablations on MVTec LOCO AD. A record has its
    figures under "auroc" and "spro" (at 0.05), and only those that the paper prints; "misprint" names one that the
    others contradict.
    """
    return json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
