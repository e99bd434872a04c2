"""`spmdrl schema`: a JSON Schema of configuration files, with which editors complete and check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import models_json_schema

from spmdrl.config.data_sets import HeldOutSet, WeightedSource
from spmdrl.config.sections import Config

Node = dict[str, Any]
"""A schema: a nested mapping of JSON Schema's keywords."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"

INTERPOLATION: Node = {
    "type": "string",
    "pattern": r"\$\{",
    "description": "${NAME:default} from the environment, or ${section.key} of the configuration.",
}

INCLUDES: Node = {
    "type": "array",
    "items": {"type": "string"},
    "description": "Read these files first; what stands in the file itself wins.",
}

CHANGED = {
    ("RoleSection", "train"): "TrainSection",
    ("EvaluationSection", "sampling"): "SamplingSection",
}
"""Section and key of a mapping -> the section whose keys it overrides."""


def config_schema() -> Node:
    """JSON Schema (draft 2020-12) of one configuration file, as nested mappings.

    A file need not be complete, for others include it. A value may be an interpolation. Unknown
    keys are refused.
    """
    models = [(model, "validation") for model in (Config, WeightedSource, HeldOutSet)]
    defs: dict[str, Node] = models_json_schema(models)[1]["$defs"]  # type: ignore[arg-type]
    for (section, key), other in CHANGED.items():
        _refer(defs[section]["properties"][key], other)
    _refer(defs["DataSection"]["properties"]["mix"]["items"], "WeightedSource")
    sets, own = defs["EvaluationSection"]["properties"], defs["HeldOutSet"]["properties"]
    for key in own.keys() & sets.keys() - {"sets"}:
        own[key]["description"] = sets[key]["description"]
    removable = {"type": "null", "description": "Remove what an included file has of this name."}
    for group, name in ((sets["sets"], "HeldOutSet"), (_roles(defs), "RoleSection")):
        group["additionalProperties"] = {"anyOf": [{"$ref": f"#/$defs/{name}"}, removable]}
    for schema in defs.values():
        schema.pop("required", None)
        for place in _values(schema):
            place.pop("title", None)
            _allow_interpolation(place)
    defs["Config"]["properties"]["includes"] = INCLUDES
    config = defs.pop("Config")
    return {"$schema": DIALECT, **config, "$defs": {**defs, "Interpolation": INTERPOLATION}}


def _roles(defs: dict[str, Node]) -> Node:
    roles: Node = defs["Config"]["properties"]["roles"]
    return roles


def _refer(schema: Node, name: str) -> None:
    """Make a mapping of any keys one of a section's keys."""
    for keyword in ("type", "additionalProperties"):
        del schema[keyword]
    schema["$ref"] = f"#/$defs/{name}"


def _values(schema: Node) -> Iterator[Node]:
    """Schemas of all values within a section, innermost first."""
    inner = [*schema.get("properties", {}).values(), *schema.get("prefixItems", [])]
    inner += [schema[key] for key in ("items", "additionalProperties") if _is_schema(schema, key)]
    for value in inner:
        yield from _values(value)
        yield value
    for choice in schema.get("anyOf", []):
        yield from _values(choice)


def _is_schema(schema: Node, key: str) -> bool:
    return isinstance(schema.get(key), dict)


def _allow_interpolation(schema: Node) -> None:
    """Let a value be an interpolation as well; its description and default stay where they are."""
    notes: Node = {
        key: schema.pop(key) for key in ("description", "default", "basic") if key in schema
    }
    choices = schema.pop("anyOf", None) or [dict(schema)]
    schema.clear()
    schema |= {**notes, "anyOf": [*choices, {"$ref": "#/$defs/Interpolation"}]}
