"""The benchmarks lie beside the installed package, which comes first where both are found."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
