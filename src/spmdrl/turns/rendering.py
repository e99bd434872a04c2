"""`TurnRenderer`: tokens of prompts and observations by a chat template, and the text of turns.

The context of a turn is the tokens that were there. An observation only adds tokens: what the
template writes after an assistant's turn in a conversation that is always the same, [user,
assistant, the observation's messages], up to the beginning of the next turn. So its tokens depend
neither on the clock nor on what was said before, and nothing that was sampled is tokenised again.
A template that rewrites earlier turns (by leaving out their thinking) would write another context
for the next one: `rewritten` says so. The tokens stay those that were there, unless conversations
are rendered (`rollout.turns.history`): then a context that does not read as the template writes the
conversation (`reads_alike`) is replaced by what it writes (`opening`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import groupby
from typing import Any

from spmdrl.data.chat import Chat, check_chat_template
from spmdrl.data.messages import Messages, checked_text
from spmdrl.data.plain_text import Mark
from spmdrl.data.row_problems import BadRow, shown
from spmdrl.data.tool_messages import ASKED, CALL_ID, CALLS, SAID, calling, read_calls
from spmdrl.data.turn_ends import TurnEnds, find_ends
from spmdrl.turns.environment import Message

_TOOL = "tool"
_PROBE = "heron-violet"


@dataclass(frozen=True)
class TurnRenderer:
    """Writes the messages of environments as tokens, and reads turns as text.

    Args:
        tokenizer: a `transformers` tokenizer with a chat template.
        now: the time that the template is given.
        kwargs: further variables of the template (`chat_template_kwargs`).
    """

    tokenizer: Any
    now: datetime
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_chat_template("rollout.turns", self.tokenizer, chat=True)

    @cached_property
    def chat(self) -> Chat:
        return Chat(tokenizer=self.tokenizer, now=self.now, options=self.kwargs)

    @cached_property
    def ends(self) -> TurnEnds:
        return find_ends(self.chat, self._special.values())

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids of the tokens with which the template ends a turn. A turn whose last token is one of
        them is `ended` for `observation`.
        """
        texts = self.ends.all
        return frozenset(i for i, text in self._special.items() if text in texts)

    def opening(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """Encode a prompt, the beginning of the first turn included, as prompts of data are.

        Args:
            tools: JSON schemas of the tools that the template names.

        Raises:
            ValueError: the template refuses the messages, or they are malformed.
        """
        talk = self.chat.prepare(_checked(messages), tools)
        return self.chat.ids(self.chat.render(talk, prompt=True), talk.mark)

    def reads_alike(self, tokens: Sequence[int], others: Sequence[int]) -> bool:
        """Whether two contexts have the same text and the same added tokens in it, however the text
        is cut into tokens: a model does not draw the tokens that a tokenizer would make.
        """
        return list(tokens) == list(others) or self._read(tokens) == self._read(others)

    def _read(self, tokens: Sequence[int]) -> list[int | str]:
        """Return the added tokens, and the texts between them."""
        found: list[int | str] = []
        for is_added, own in groupby(tokens, key=lambda token: token in self.chat.plain.added):
            ids = list(own)
            found += ids if is_added else [self.tokenizer.decode(ids, skip_special_tokens=False)]
        return found

    def observation(self, messages: Sequence[Message], *, ended: bool) -> list[int]:
        """Encode what follows a turn: its end, the messages, and the beginning of the next turn.

        Args:
            ended: whether the turn's last token is one of `end_ids`, which is then left out here;
                otherwise (it was cut, or ended with another token) the end comes first.

        Raises:
            ValueError: the template refuses the messages, does not write them, or they are
                malformed; the message names their roles.
        """
        given = _checked(messages)
        if not given or any(message["role"] == "assistant" for message in given):
            raise ValueError(
                "an observation has messages, of any role but assistant: without one the sample "
                f"ends; these are {shown(given)}"
            )
        roles = tuple(str(message["role"]) for message in given)
        if roles not in self._written:
            probes = [{**m, "content": f"{_PROBE}-{i}"} for i, m in enumerate(given)]
            rest, _ = self._rest(probes)
            missing = [m["role"] for m in probes if m["content"] not in rest.text]
            if missing:
                raise ValueError(
                    f"the chat template does not write messages of the role {missing[0]}: use a "
                    "model whose template does, or another role"
                )
            self._written.add(roles)
        rest, mark = self._rest(given)
        if rest.end_at is None:
            return self._continued(rest.text, mark)
        ids = self.chat.ids(rest.text[rest.end_at :], mark)
        if ended:
            return ids[1:]
        before = rest.text[: rest.end_at]
        return [*(self._continued(before, mark) if before else []), *ids]

    def check(self, roles: Sequence[str]) -> None:
        """Raise ValueError if the template does not write messages of one of these roles after a
        turn; the message names the role.
        """
        for role in roles:
            message = {"role": role, "content": _PROBE}
            if role == _TOOL:
                message |= {"name": "tool", "tool_call_id": CALL_ID}
            self.observation([message], ended=True)

    def check_calls(self, key: str) -> None:
        """Raise ValueError unless the text of a call, as content of a turn, is written as the call
        is, since conversations are rendered from texts; the message begins with `key`.
        """
        result = {"role": _TOOL, "name": "tool", "tool_call_id": CALL_ID, "content": _PROBE}
        call = self.chat.prepare([ASKED, calling([result], ""), result])
        plain = self.chat.prepare([ASKED, {"role": "assistant", "content": SAID}])
        try:
            prompt = self.chat.render(call.first(1), prompt=True)
            end = self.chat.render(plain, prompt=False).rpartition(SAID)[-1]
            turn = self.chat.render(call.first(2), prompt=False)
            said = turn.removeprefix(prompt).removesuffix(end)
            told = self.chat.prepare([ASKED, {"role": "assistant", "content": said}, result])
            both = [self.chat.render(talk, prompt=True) for talk in (call, told)]
            if turn.startswith(prompt) and turn.endswith(end) and both[0] == both[1]:
                return
            problem = "writes a call otherwise than its text"
        except BadRow as error:
            problem = str(error)
        raise ValueError(
            f"{key}: conversations are rendered from the texts of turns, but the model's chat "
            f"template {problem}: set it to kept, or use a model whose calls are text (hermes)"
        )

    @cached_property
    def rewritten(self) -> tuple[str, ...]:
        """Names of what the template writes otherwise once another turn is to come: `turns` (any of
        them), `thinking`, `calls`, `tools`. The tokens of a sample stay those that were there.
        """
        user = {"role": "user", "content": _PROBE}
        thought = {"role": "assistant", "content": f"<think>\n{SAID}\n</think>\n\n{SAID}"}
        result = {"role": _TOOL, "name": "tool", "tool_call_id": CALL_ID, "content": _PROBE}
        tool = {"type": "function", "function": {"name": "tool", "description": SAID}}
        plain = {"role": "assistant", "content": SAID}
        probes: dict[str, tuple[Messages, list[Message]]] = {
            "turns": ([ASKED, plain, user], []),
            "thinking": ([ASKED, thought, user], []),
            "calls": ([ASKED, calling([result], SAID), result], []),
            "tools": ([ASKED, plain, user], [tool]),
        }
        return tuple(name for name, given in probes.items() if self._is_rewritten(*given))

    def _is_rewritten(self, messages: Messages, tools: Sequence[Message]) -> bool:
        """Whether a conversation of three messages begins otherwise than its first two, but for
        the end of the turn. A conversation that the template refuses is not rewritten.
        """
        talk = self.chat.prepare(messages, tools)
        try:
            prompt = self.chat.render(talk.first(1), prompt=True)
            turn = self.chat.render(talk.first(2), prompt=False)
            whole = self.chat.render(talk, prompt=True)
        except BadRow:
            return False
        spoken = turn[: turn.rfind(SAID) + len(SAID)]
        return not (whole.startswith(prompt) and whole.startswith(spoken))

    def text(self, tokens: Sequence[int], *, special: bool) -> str:
        """Decode a sampled turn without its end.

        Args:
            tokens: ids of the turn.
            special: whether the text holds the turn's special tokens.
        """
        own = list(tokens)
        if own and (own[-1] in self.end_ids or own[-1] == self.tokenizer.eos_token_id):
            own.pop()
        return str(self.tokenizer.decode(own, skip_special_tokens=not special))

    @cached_property
    def _special(self) -> Mapping[int, str]:
        """Special tokens by their ids."""
        added = self.tokenizer.added_tokens_decoder.items()
        found = {int(i): str(token) for i, token in added if token.special}
        named = map(str, self.tokenizer.all_special_tokens)
        return found | {int(self.tokenizer.convert_tokens_to_ids(text)): text for text in named}

    @cached_property
    def _written(self) -> set[tuple[str, ...]]:
        """Roles, one after the other, that the template was seen to write after a turn."""
        return set()

    def _rest(self, messages: Messages) -> tuple[_Rest, Mark]:
        """Render what follows a turn. ValueError: the template refuses the messages."""
        problem = ""
        for turn in self._turns(messages):
            try:
                talk = self.chat.prepare([ASKED, turn.message, *messages])
                return _after(self.chat.render(talk, prompt=True), turn), talk.mark
            except BadRow as error:
                problem = problem or str(error)
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise ValueError(f"messages of the role {roles} after a turn: {problem}")

    def _turns(self, messages: Messages) -> list[_Turn]:
        """List the turns that may precede an observation: results of tools follow a call, if the
        template can write one.
        """
        said = SAID
        while any(said in str(message) for message in messages):
            said += "-quartz"
        plain = {"role": "assistant", "content": said}
        turns = [_Turn(message=plain, said=said, end=self.ends.history, is_call=False)]
        results = [message for message in messages if message["role"] == _TOOL]
        if results and self.ends.calls is not None:
            call = calling(results, said)
            turns.insert(0, _Turn(message=call, said=said, end=self.ends.calls, is_call=True))
        return turns

    def _continued(self, text: str, mark: Mark) -> list[int]:
        """Encode a text that follows other tokens: some tokenizers begin every text with a space,
        but none after an added token, which is encoded before it and left out.
        """
        end = self.tokenizer.eos_token_id
        if end is not None and not self.tokenizer.added_tokens_decoder[end].rstrip:
            first, *ids = self.chat.ids(str(self.tokenizer.eos_token) + text, mark)
            if first == end:
                return ids
        return self.chat.ids(text, mark)


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """A turn that is rendered before an observation.

    Args:
        said: text in it that is found again.
        end: text of the token that ends it; None if the template writes none.
        is_call: whether it calls tools; what closes the calls is then written before its end.
    """

    message: Message
    said: str
    end: str | None
    is_call: bool


@dataclass(frozen=True, kw_only=True)
class _Rest:
    """Text of a rendered conversation after its turn.

    Args:
        end_at: place of the turn's end in it; None if the template writes none.
    """

    text: str
    end_at: int | None


def _after(text: str, turn: _Turn) -> _Rest:
    """Return what a rendered conversation has after its turn. BadRow: the turn is not there."""
    place = text.rfind(turn.said)
    if place < 0:
        raise BadRow("the chat template does not write a turn before them")
    rest = text[place + len(turn.said) :]
    at = -1 if turn.end is None else rest.find(turn.end)
    if turn.is_call:  # what closes the call was sampled
        return _Rest(text=rest[at:], end_at=0)
    is_end = at >= 0 and not rest[:at].strip()
    return _Rest(text=rest, end_at=at if is_end else None)


def _checked(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose content is text. ValueError: they are malformed."""
    found: list[Message] = []
    for message in messages:
        given = dict(message) if isinstance(message, Mapping) else {}
        if given.get(CALLS):
            given = {
                **given,
                "content": given.get("content") or "",
                CALLS: read_calls(given[CALLS], "messages"),
            }
        if not isinstance(given.get("role"), str) or not isinstance(given.get("content"), str):
            raise ValueError(
                "a message of an environment has a role and a text as content, unlike "
                f"{shown(message)}"
            )
        checked_text(given["content"], None)
        found.append({key: part for key, part in given.items() if part is not None})
    return found
