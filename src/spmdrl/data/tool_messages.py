"""Messages that call tools: reading of their calls, and the form in which templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from spmdrl.data.row_problems import BadRow, shown

CALLS = "tool_calls"
"""Key of an assistant's message with its calls."""
SAID = "fjord-quartz"
"""Words of an assistant in conversations that are written to look at the template."""
ASKED: Mapping[str, str] = {"role": "user", "content": "Hello"}
CALL_ID = "fjordcall"  # some templates take nine letters and no other number


def read_calls(value: Any, column: str) -> list[Mapping[str, Any]]:
    """Read calls: a list or its JSON, of `{function: {name, arguments}}` or `{name, arguments}`;
    the arguments are an object or its JSON. They become objects of `function` with `type`.

    Raises:
        BadRow: they are something else.
    """
    calls = _parsed(value)
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRow(f"column {column!r}: tool_calls is no list of calls but {shown(value)}")
    return [_read_call(call, column) for call in calls]


def _read_call(call: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    inner = call.get("function", call)
    given = inner if isinstance(inner, Mapping) else {}
    arguments = _parsed(given.get("arguments") or {})
    if not isinstance(given.get("name"), str) or not isinstance(arguments, Mapping):
        raise BadRow(
            f"column {column!r}: a call of a tool has a name, and arguments that are an object or "
            f"its JSON, unlike {shown(call)}"
        )
    rest = {key: part for key, part in call.items() if key not in ("function", "name", "arguments")}
    function = (
        {**given, "arguments": dict(arguments)}
        if "function" in call
        else {"name": given["name"], "arguments": dict(arguments)}
    )
    return {"type": "function", **rest, "function": function}


def _parsed(value: Any) -> Any:
    """Parse a text as JSON; None if it is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else {}
    except (ValueError, RecursionError):
        return None


def with_json_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message whose calls have their arguments as JSON texts."""
    if not message.get(CALLS):
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message[CALLS]
    ]
    return {**message, CALLS: calls}


def calling(results: Sequence[Mapping[str, Any]], said: str) -> dict[str, Any]:
    """Make an assistant's message that calls the tools whose results these messages are.

    Args:
        said: value of the calls' only argument.
    """
    calls = [
        {
            "type": "function",
            "id": str(message.get("tool_call_id", CALL_ID)),
            "function": {"name": str(message.get("name", "tool")), "arguments": {"value": said}},
        }
        for message in results
    ]
    return {"role": "assistant", "content": "", CALLS: calls}
