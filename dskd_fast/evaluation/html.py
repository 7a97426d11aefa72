"""Pages of one file: style, script and data are in them, and their content security policy allows nothing else."""

import base64
import hashlib
import importlib.resources
import json
from typing import Any


def resource(package: str, name: str) -> str:
    """A text file of a package, by its path with "/"."""
    return (importlib.resources.files(package) / name).read_text(encoding="utf-8")


def filled(page: str, style: str, script: str, data: dict[str, Any]) -> str:
    """A page with what belongs into its places: {{style}}, {{script}}, {{data}}, {{style-hash}} and {{script-hash}}.

    Args:
        page: HTML with each of these places once.
        style, script: what is put in, and what the two hashes are of.
        data: as JSON, which the browser does not take for markup; any strings, lone surrogates included.

    Raises:
        ValueError: a number in the data is NaN or infinite.
    """
    # With "<" escaped the text cannot end its element; ASCII alone can hold what is not valid Unicode.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    # The data comes last, so that nothing in it is taken for a place to fill.
    for place, content in {
        "{{style-hash}}": _csp_hash(style),
        "{{script-hash}}": _csp_hash(script),
        "{{style}}": style,
        "{{script}}": script,
        "{{data}}": text,
    }.items():
        page = page.replace(place, content, 1)
    return page


def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
