"""Rubrics of a configuration's judges, with the judges' own tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from spmdrl.config.judges import JudgeSection
from spmdrl.config.roles import JUDGE
from spmdrl.config.sections import Config
from spmdrl.data.chat import Chat
from spmdrl.models.config import read_config
from spmdrl.models.files.token_texts import token_texts
from spmdrl.models.files.tokenizers import load_tokenizer
from spmdrl.planning.questions import judge_section, questions_of
from spmdrl.rewards.rubric import Encode, Rubric, make_rubric


def judge_names(config: Config) -> list[str]:
    """The judges of a configuration."""
    return [name for name in config.roles if config.role_kind(name) == JUDGE]


def read_rubrics(config: Config, now: datetime) -> dict[str, Rubric]:
    """Read the rubrics of all judges, by role.

    Args:
        now: the time that chat templates are given.

    Raises:
        ValueError: a judge's tokenizer has no chat template, or a template or a function that its
            section names cannot be used.
    """
    found = {}
    for name in judge_names(config):
        path, section = config.model_path(name), judge_section(config, name)
        tokenizer = load_tokenizer(path)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"roles.{name}.model={path}: its tokenizer has no chat template, by which a judge "
                "is asked: give it one, or take a model that follows instructions"
            )
        encode = encoder(tokenizer, section, now)
        try:
            encode("question")
        except ValueError as error:  # its own, or a row's
            raise ValueError(f"roles.{name}.model={path}: {error}") from error
        positions = read_config(path).max_position
        found[name] = make_rubric(
            name,
            section,
            token_texts(tokenizer, chat=True),
            encode,
            questions_of(config, name, positions).prompt_tokens,
        )
    return found


def encoder(tokenizer: Any, section: JudgeSection, now: datetime) -> Encode:
    """Make the function from a question to the conversation's tokens; see `Chat.prepare` on texts
    that spell added tokens.
    """
    chat = Chat(tokenizer=tokenizer, now=now, options=section.chat_template_kwargs)
    system = [] if section.system is None else [{"role": "system", "content": section.system}]

    def encode(question: str) -> Sequence[int]:
        talk = chat.prepare([*system, {"role": "user", "content": question}])
        return chat.ids(chat.render(talk, prompt=True), talk.mark)

    return encode
