"""JSON that every reader takes."""

import json
import math
from typing import Any


def finite(content: Any) -> Any:
    """Plain data with null (None) for every number that JSON has no word for: NaN and the infinities of Python."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def to_json(content: Any) -> str:
    """The text of a JSON file, indented by two spaces."""
    return json.dumps(finite(content), indent=2, allow_nan=False)
