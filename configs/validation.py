"""Pydantic's findings as sentences: where it was written, which key, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from polyturn.configs.errors import did_you_mean
from polyturn.configs.shapes import KIND, field_paths
from polyturn.configs.yaml_tree import Tree, describe

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section (`key: value` lines)",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a value greater than {gt}",
    "greater_than_equal": "a value of at least {ge}",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "less_than": "a value less than {lt}",
    "less_than_equal": "a value of at most {le}",
    "list_type": "a list",
    "literal_error": "one of {expected}",
    "model_attributes_type": "a section (`key: value` lines)",
    "model_type": "a section (`key: value` lines)",
    "path_type": "a path",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "text of at least {min_length} characters",
    "string_type": "text",
    "too_short": "a list of at least {min_length}",
}


def explain(error: ValidationError, tree: Tree, section: type[BaseModel]) -> Iterator[str]:
    """One sentence for each finding."""
    descriptions = {path: field.description for path, field in field_paths(section)}
    for finding in error.errors(include_url=False):
        path, node, origin = _locate(finding["loc"], tree)
        key = ".".join(path)
        context: Mapping[str, Any] = finding.get("ctx", {})
        if finding["type"] == "missing":
            meaning = descriptions.get(key)
            first = f": {meaning.splitlines()[0]}" if meaning else ""
            yield f"{origin}: '{key}' is required{first}"
        elif finding["type"] in ("union_tag_invalid", "union_tag_not_found"):
            yield _explain_kind(key, node, origin, context)
        elif finding["type"] == "value_error":
            about = f"{key}: " if key else ""
            yield f"{origin}: {about}{context['error']}"
        elif finding["type"] in _EXPECTED:
            expected = _EXPECTED[finding["type"]].format_map(context)
            given = describe(finding["input"])
            yield f"{origin}: '{key}' must be {expected}, got {given}{_hint(finding, node)}"
        else:
            yield f"{origin}: '{key}': {finding['msg']}, got {describe(finding['input'])}"


def _explain_kind(key: str, node: Tree, origin: str, context: Mapping[str, Any]) -> str:
    given = node.value.get(KIND) if isinstance(node.value, dict) else None
    known = str(context.get("expected_tags", "")).replace("'", "").split(", ")
    listed = ", ".join(f"'{kind}'" for kind in known if kind)
    if given is None:
        return f"{origin}: '{key}.{KIND}' is required" + (f": one of {listed}" if listed else "")
    return (
        f"{given.origin}: '{key}.{KIND}' must be one of {listed}, got {describe(given.value)}"
        + did_you_mean(str(given.value), known)
    )


def _hint(finding: Mapping[str, Any], node: Tree) -> str:
    if finding["type"] == "string_type" and node.text is not None:
        return f'; write "{node.text}" in quotes'
    if finding["type"] == "literal_error" and isinstance(finding["input"], str):
        return did_you_mean(
            finding["input"],
            str(finding["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", "),
        )
    return ""


def _locate(location: tuple[int | str, ...], tree: Tree) -> tuple[list[str], Tree, str]:
    """The key's path, the deepest tree on it, and where that was written.

    Pydantic puts the kind of a choice between the keys.
    """
    path: list[str] = []
    for part in location:
        value = tree.value
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, dict) and part in inner:
            tree = inner[part]
        elif isinstance(value, dict) and KIND in value and value[KIND].value == part:
            continue
        elif isinstance(part, int) and isinstance(value, dict | str):
            continue  # one item that stands for a list of one
        path.append(str(part))
    return path, tree, tree.origin
