"""Text that every parser of picture files takes: control characters but the line feed stand as JSON escapes.

PNG's text chunks may hold them on paper ("discouraged"), and checkers and readers refuse them.
"""

from __future__ import annotations

import json
import re
from typing import Any

_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def escape_controls(text: str) -> str:
    """The same text with `\\u001b` in place of a control character. JSON stays the JSON it was."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def json_text(value: Any) -> str:
    """JSON in printable ASCII. Python's own lets U+007F through."""
    return escape_controls(json.dumps(value))
