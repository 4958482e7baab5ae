"""Values as they are written in TOML, for messages and tables."""

import json
from typing import Any

_LONGEST = 120


def show(value: Any, limit: int | None = _LONGEST) -> str:
    """`value` as TOML would have it, cut to `limit` characters. An unset key is `unset`."""
    text = _show(value)
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


def _show(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_show(item)}" for name, item in value.items()) + "}"
    return str(value)
