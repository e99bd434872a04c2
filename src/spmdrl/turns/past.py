"""`Past`: an answered turn of a sample, and what such turns make together: the context of the next
one, the conversation so far, and what a stopped call keeps of them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spmdrl.turns.environment import Message

_COUNT = struct.Struct("<I")


class Renderer(Protocol):
    """Tokens of messages, and texts of turns."""

    def opening(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """Return the tokens of a conversation and of the beginning of the turn that follows it."""

    def reads_alike(self, tokens: Sequence[int], others: Sequence[int]) -> bool:
        """Whether two contexts have the same text and the same added tokens in it."""

    def observation(self, messages: Sequence[Message], *, ended: bool) -> list[int]:
        """Return the tokens that follow a turn and begin the next one.

        Args:
            ended: whether the turn's tokens end with the template's end of a turn.
        """

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a turn's tokens end with the template's end of a turn."""

    def text(self, tokens: Sequence[int], *, special: bool) -> str:
        """Return the text of a turn without its end; its special tokens if `special`."""


@dataclass(frozen=True, kw_only=True)
class Past:
    """A turn that was answered.

    Args:
        tokens: those that were drawn.
        text: the turn's text, as its object has read it.
        given: the answer's.
        end: number of the sample's tokens with both.
        begins_part: whether `given` is a context of its own (`Answer.begins_part`).
        messages: the answer's; None where a stopped call has not kept them.
    """

    tokens: tuple[int, ...]
    text: str
    given: tuple[int, ...]
    end: int
    begins_part: bool = False
    messages: Sequence[Message] | None = None


@dataclass(frozen=True, kw_only=True)
class Given:
    """Tokens that follow a turn; with `begins_part` they are the whole context of the next one."""

    tokens: tuple[int, ...]
    begins_part: bool = False


def context_of(prompt: Sequence[int], past: Sequence[Past]) -> tuple[int, ...]:
    """Return the tokens that a model reads before the turn that follows `past`."""
    found = tuple(prompt)
    for turn in past:
        found = turn.given if turn.begins_part else (*found, *turn.tokens, *turn.given)
    return found


def conversation_of(opening: Sequence[Message], past: Sequence[Past]) -> list[Message]:
    """Return the messages so far: the opening, the turns and their answers."""
    found = list(opening)
    for turn in past:
        assert turn.messages is not None, "a stopped call keeps the messages with a state"
        found += [{"role": "assistant", "content": turn.text}, *turn.messages]
    return found


def follow(
    renderer: Renderer,
    prompt: Sequence[int],
    past: Sequence[Past],
    turn: Past,
    *,
    rendered: Mapping[str, Any] | None,
) -> Given:
    """Return what follows a turn.

    Args:
        past: the sample's turns before it.
        turn: the turn with its answer's messages, not yet `given`.
        rendered: `messages` and `tools` with which the conversation begins: where the template
            would write it otherwise than what was there, it begins a part. None: it never does.
    """
    assert turn.messages is not None, turn
    ended = renderer.ends(turn.tokens)
    given = tuple(renderer.observation(turn.messages, ended=ended))
    if rendered is None:
        return Given(tokens=given)
    talk = conversation_of(rendered["messages"], [*past, turn])
    whole = tuple(renderer.opening(talk, rendered["tools"]))
    if renderer.reads_alike((*context_of(prompt, past), *turn.tokens, *given), whole):
        return Given(tokens=given)
    return Given(tokens=whole, begins_part=True)


def packed(past: Sequence[Past], state: bytes, *, with_messages: bool) -> bytes:
    """Pack the state of an object with the number of its turns, and the messages of their answers
    if a conversation is made of them.
    """
    told = b""
    if with_messages:
        told = json.dumps([list(turn.messages or ()) for turn in past]).encode()
        told = _COUNT.pack(len(told)) + told
    return _COUNT.pack(len(past)) + told + state


def unpacked(
    data: bytes | None, num_turns: int, *, with_messages: bool
) -> tuple[bytes | None, list[Sequence[Message]] | None]:
    """Return the state that `packed` has packed, and the messages; None if it is not the one after
    this many turns.
    """
    if data is None or _COUNT.unpack_from(data)[0] != num_turns:
        return None, None
    if not with_messages:
        return data[_COUNT.size :], None
    first = 2 * _COUNT.size
    last = first + _COUNT.unpack_from(data, _COUNT.size)[0]
    found: list[Any] = json.loads(data[first:last])
    return data[last:], [list(map(_message, told)) for told in found]


def _message(found: Mapping[str, Any]) -> Message:
    return dict(found)
