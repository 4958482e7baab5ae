"""The JSON schema of the TOML format, generated from the section classes.

An editor that knows TOML completes and checks a recipe with it; the recipe names it in its first line:

    #:schema ../titan_fp8/config/schema.json
"""

import json
from pathlib import Path
from typing import Any

from titan_fp8.config.section import NOT_SUPPORTED_YET, ONLY_WITH, PARKED_BY, UNIT, UNSUPPORTED_VALUES, Section

SCHEMA_FILE = Path(__file__).with_name("schema.json")
_OWN_WORDS = (UNIT, NOT_SUPPORTED_YET, UNSUPPORTED_VALUES, ONLY_WITH, PARKED_BY)


def schema_text(root: type[Section]) -> str:
    """The schema as it stands in `schema.json`."""
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **root.model_json_schema()}
    schema["title"] = "titan_fp8 training job"
    return json.dumps(_plain(schema), indent=1, ensure_ascii=False) + "\n"


def _plain(node: Any) -> Any:
    """Our words become standard ones: a unit joins the description, an unsupported key allows its default only."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {name: _plain(value) for name, value in node.items() if name not in _OWN_WORDS}
    if UNIT in node and "default" in node:
        plain["description"] = f"{node.get('description', '')} Unit: {node[UNIT]}."
    if node.get(NOT_SUPPORTED_YET) is True:
        plain["description"] = f"{node.get('description', '')} Not supported yet."
        plain["const"] = node["default"]
    if isinstance(node.get(UNSUPPORTED_VALUES), list):
        plain["not"] = {"enum": node[UNSUPPORTED_VALUES]}
    if "$ref" in node:
        plain.pop("default", None)  # a whole section's defaults, which its keys say anyway
    if "default" in node:
        plain.pop("title", None)  # it repeats the name
    return plain
