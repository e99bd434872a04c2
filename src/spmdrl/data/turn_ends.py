"""The marks with which a chat template ends an assistant's turn, found by what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spmdrl.data.chat import Chat
from spmdrl.data.messages import Messages
from spmdrl.data.row_problems import BadRow
from spmdrl.data.tool_messages import ASKED, CALL_ID, SAID, calling

_OTHER = "heron-violet"


@dataclass(frozen=True, kw_only=True)
class TurnEnds:
    """Texts of the special tokens with which turns end; None where the template writes none.

    Args:
        last: end of a conversation's last turn.
        history: end of a turn that a message follows.
        calls: end of a turn that calls tools, whose results follow.
    """

    last: str | None
    history: str | None
    calls: str | None

    @property
    def all(self) -> tuple[str, ...]:
        found = (self.last, self.history, self.calls)
        return tuple(dict.fromkeys(end for end in found if end is not None))


def find_ends(chat: Chat, special: Iterable[str]) -> TurnEnds:
    """Find the ends of turns.

    A template that writes no end before the next message writes that message's head there, which is
    no end: it is told by the user's own messages, which then do not end with it either, and by the
    last turn.

    Args:
        special: texts of the special tokens.
    """
    texts = tuple(special)
    turn = {"role": "assistant", "content": SAID}
    last = _first(_between(chat, [ASKED, turn], SAID, None, prompt=False), texts)
    follows = {"role": "user", "content": _OTHER}
    history = _first(_between(chat, [ASKED, turn, follows], SAID, _OTHER, prompt=True), texts)
    asked = _between(chat, [{"role": "user", "content": _OTHER}], _OTHER, None, prompt=False)
    if history != last and (history is None or history not in asked):
        history = None
    result = {"role": "tool", "name": "tool", "tool_call_id": CALL_ID, "content": _OTHER}
    called = _between(chat, [ASKED, calling([result], SAID), result], SAID, _OTHER, prompt=True)
    known = tuple(end for end in (last, history) if end is not None)
    calls = _first(called, known) or _first(called, texts)
    return TurnEnds(last=last, history=history, calls=calls)


def _between(chat: Chat, messages: Messages, start: str, stop: str | None, *, prompt: bool) -> str:
    """Return what the template writes from one text to another (None: to its end); "" if it does
    not write them, or refuses the messages.
    """
    try:
        text = chat.render(chat.prepare(messages), prompt=prompt)
    except BadRow:
        return ""
    at = text.rfind(start) if stop is None else text.rfind(start, 0, max(text.rfind(stop), 0))
    if at < 0:
        return ""
    return text[at + len(start) : None if stop is None else text.rfind(stop)]


def _first(text: str, marks: Sequence[str]) -> str | None:
    """Return the mark that stands first in a text, the longest one there; None without one."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found)[2] if found else None
