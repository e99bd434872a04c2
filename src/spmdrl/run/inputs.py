"""Inputs that a run reads before it starts: tokenizer, data, and the ends of responses (how long
rows may become, and which tokens end a response).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from spmdrl.config.data import DataKind, PromptsSection
from spmdrl.config.data_sets import (
    HELD_OUT,
    HeldOutSet,
    held_out_sets,
    rows_read,
    train_sources,
    uses_chat,
)
from spmdrl.config.sections import Config, SamplingSection
from spmdrl.data.chat import tells_time
from spmdrl.data.conversations import load_conversations
from spmdrl.data.examples import RowProgress, unreported
from spmdrl.data.item_set import ItemSet
from spmdrl.data.preferences import load_preferences
from spmdrl.data.prompts import PromptSet, join_prompts, load_prompts
from spmdrl.data.source import DataSource
from spmdrl.data.split import limited, split, split_examples, without_overlap
from spmdrl.models.files.token_texts import Decode, TokenTexts, token_texts
from spmdrl.models.files.tokenizer_files import notes
from spmdrl.models.files.tokenizers import check_tokenizer, difference, load_tokenizer
from spmdrl.planning.engines import ends_of_text
from spmdrl.rewards.rubric import Rubric
from spmdrl.role_spec import RoleSpec
from spmdrl.rollout.protocol import MAX_SUPPORT, SamplingParams
from spmdrl.rollout.vllm_requests import SUPPORT_NEEDS_TOP_K
from spmdrl.run.rubrics import judge_names, read_rubrics

log = logging.getLogger(__name__)


def check_lengths(config: Config, spec: RoleSpec) -> None:
    """Raise ValueError if the longest row exceeds the model's positions."""
    for rows in rows_read(config):
        if rows.longest > spec.model.max_position:
            has = spec.model.describe_positions()
            raise ValueError(f"{rows.describe()}, but the model of roles.{spec.name} has {has}")


def check_ends(config: Config, spec: RoleSpec, texts: TokenTexts) -> None:
    """Warn of the tokens that end a response if the rollout's model and its tokenizer differ.

    Raises:
        ValueError: only the maximum length would end a response.
    """
    files = f"{spec.path}/config.json and generation_config.json"
    ends = ends_of_text(spec.model, texts)
    if not ends:
        _check_stops(config, files)
        return
    named = [token for token in ends if token in spec.model.eos_ids]
    others = [end for end in texts.ends if end.token in ends and end.token not in named]
    if others:
        more = " and ".join(f"{end.text!r} ({end.token}), {end.source}" for end in others)
        said = f"name {named} as eos_token_id" if named else "name no eos_token_id"
        log.warning("%s %s, not %s: a response ends with each of them", files, said, more)


def _check_stops(config: Config, files: str) -> None:
    for rows in rows_read(config):
        sampling = rows.sampling
        if sampling is not None and not sampling.stop and not sampling.stop_token_ids:
            raise ValueError(
                f"no token ends a response: {files} name no eos_token_id, and the tokenizer has no "
                f"eos_token. Name one there, or set {rows.sampling_key}.stop or "
                f"{rows.sampling_key}.stop_token_ids"
            )


AnySet = PromptSet | ItemSet[Any]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tokenizer, texts of its tokens, and data: prompts, conversations or preference pairs.

    Args:
        shares: (items, weight) of each source of the training data.
        held_out: name -> set.
        now: the time that chat templates are given.
        tell_time: whether a chat template writes it.
        rubrics: by judge, its questions and the reading of its answers.
    """

    tokenizer: Any
    texts: TokenTexts
    train: AnySet
    shares: tuple[tuple[int, float], ...]
    held_out: Mapping[str, AnySet]
    now: datetime
    tell_time: bool = False
    rubrics: Mapping[str, Rubric] = field(default_factory=dict)

    @property
    def judge_texts(self) -> dict[str, TokenTexts]:
        """Texts of each judge's own tokens."""
        return {name: rubric.texts for name, rubric in self.rubrics.items()}

    @property
    def decode(self) -> Decode:
        """Function from token ids to text, without special tokens."""
        return self.texts.decode


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Values needed to read the sets that sections describe.

    Args:
        now: the time that chat templates are given.
        report: called with the progress in the source being read.
    """

    tokenizer: Any
    now: datetime
    report: RowProgress = unreported


def read_inputs(
    config: Config,
    kind: DataKind = "prompts",
    report: RowProgress = unreported,
    clock: Callable[[], datetime] = datetime.now,
) -> Inputs:
    """Read and tokenise everything; ValueError as in `spmdrl.data`'s loaders and `data.split`.

    Args:
        report: called with the progress in the source being read.
        clock: gives the time for chat templates, called if one of them writes the date.
    """
    tokenizer = load_tokenizer(config.model.path)
    for note in notes(Path(config.model.path), tokenizer):
        log.warning("%s", note)
    is_dated = tell_time(config, tokenizer)
    now = clock() if is_dated else datetime.now()
    reading = Reading(tokenizer=tokenizer, now=now, report=report)
    sections = train_sources(config)
    keys = ["data.train", *(f"data.mix.{i}" for i in range(len(sections) - 1))]
    sources = [load_data(*given, kind, reading) for given in zip(keys, sections, strict=True)]
    held_out: dict[str, AnySet] = {}
    evaluation, seed = config.evaluation, config.seed
    if evaluation.held_out:
        divide = split if kind == "prompts" else split_examples
        most = None if isinstance(evaluation.held_out, int) else evaluation.max_items
        parts = divide(join_sets(sources), held_out=evaluation.held_out, seed=seed, at_most=most)
        held_out[HELD_OUT] = limited(parts.held_out, most, seed=seed)
        sources = [without_questions(source, parts.held_out) for source in sources]
    train = join_sets(sources)
    held_out |= read_held_out(held_out_sets(config), kind, reading, train.openings(), seed)
    check_enough(config, train, held_out.get(HELD_OUT))
    return Inputs(
        tokenizer=tokenizer,
        texts=token_texts(tokenizer, chat=uses_chat(config)),
        train=train,
        shares=tuple((len(s), w.weight) for s, w in zip(sources, sections, strict=True)),
        held_out=held_out,
        now=now,
        tell_time=is_dated,
        rubrics=read_rubrics(config, now),
    )


def tell_time(config: Config, tokenizer: Any) -> bool:
    """Whether a chat template that the run renders writes the date."""
    others = [name for name, role in config.roles.items() if role.retokenize]
    others += judge_names(config)
    return tells_time(tokenizer) or any(
        tells_time(load_tokenizer(config.model_path(name))) for name in others
    )


def read_held_out(
    sets: Mapping[str, HeldOutSet],
    kind: DataKind,
    reading: Reading,
    trained: Sequence[str],
    seed: int,
) -> dict[str, AnySet]:
    """Read the sets with data of their own, without items whose opening is trained on.

    Args:
        kind: the kind of data of sets that name none.
        trained: the openings (first user messages) of the training data.
        seed: seed of the choice if a set has more than its `max_items`.
    """
    found: dict[str, AnySet] = {}
    for name, described in sets.items():
        if described.data is None:
            continue
        where = f"evaluation.sets.{name}.data"
        own = load_data(where, described.data, described.kind or kind, reading)
        kept, note = without_overlap(own, trained)
        found[name] = limited(kept, described.max_items, seed=seed)
        if len(found[name]) < len(kept):
            note += f"; {len(found[name])} of them are evaluated (evaluation.max_items)"
        log.info("evaluation.sets.%s: %s", name, note)
    return found


def check_enough(config: Config, train: AnySet, held_out: AnySet | None) -> None:
    """Raise ValueError if there are fewer items than a step draws.

    Args:
        held_out: the items held out of the training data; None if there are none.
    """
    wanted, kind = config.data.prompts_per_step, config.data_kind()
    if len(train) >= wanted:
        return
    text = f"data.prompts_per_step={wanted}, but data.train has {len(train)} {kind}"
    if held_out is not None:
        amount = config.evaluation.held_out
        text += f" as well as {len(held_out)} that are held out (evaluation.held_out={amount})"
    raise ValueError(f"{text}: lower it, or bring more rows than {config.data.train.source} has")


def without_questions(data: AnySet, held_out: AnySet) -> AnySet:
    """Items of `data` whose questions are not held out."""
    asked = set(held_out.questions())
    return data.subset([i for i, question in enumerate(data.questions()) if question not in asked])


def join_sets(sets: Sequence[AnySet]) -> AnySet:
    """Join sets of one kind, one after the other."""
    first = sets[0]
    if len(sets) == 1:
        return first
    if isinstance(first, PromptSet):
        return join_prompts([s for s in sets if isinstance(s, PromptSet)])
    return ItemSet(first.kind, [item for s in sets for item in s])


def load_data(key: str, section: PromptsSection, kind: DataKind, reading: Reading) -> AnySet:
    """Load the set that a section describes; `key` is the section's place in the configuration."""
    tokenizer, report = reading.tokenizer, reading.report
    source = data_source(section, reading.now, key)
    if kind == "prompts":
        return load_prompts(source, tokenizer, report)
    if kind == "conversations":
        return load_conversations(source, tokenizer, report)
    return load_preferences(source, tokenizer, report)


def data_source(section: PromptsSection, now: datetime, key: str = "data.train") -> DataSource:
    fields = set(PromptsSection.model_fields)  # a mixed source has a weight too
    return DataSource(**section.model_dump(include=fields), now=now, key=key)


def sampling_params(section: SamplingSection) -> SamplingParams:
    return SamplingParams(**section.model_dump())


def training_sampling(config: Config) -> SamplingParams:
    """Parameters from `sampling`, with what the algorithm needs recorded.

    Raises:
        ValueError: vLLM would have to report more tokens per position than it can.
    """
    sampling = sampling_params(config.sampling)
    # pairs compare likelihoods, whatever distribution the responses were drawn from
    of_samples = config.data_kind() == "prompts" and not config.flow_row.pairs_samples
    support = of_samples and sampling.is_truncated and not sampling.is_greedy
    is_listed = 1 <= sampling.top_k <= MAX_SUPPORT
    if support and not is_listed and _samples_with_vllm(config):
        raise ValueError(f"sampling.top_k={sampling.top_k}: {SUPPORT_NEEDS_TOP_K}")
    recorded = {"experts": config.algorithm.routing_replay, "support": support}
    return sampling.model_copy(update=recorded)


def _samples_with_vllm(config: Config) -> bool:
    has_rollout = any(config.role_kind(name) == "rollout" for name in config.roles)
    return has_rollout and config.rollout.engine == "vllm"


def check_models(config: Config, inputs: Inputs, specs: Mapping[str, RoleSpec]) -> None:
    """Check that every role can read the tokens that the others write.

    Raises:
        ValueError: a role's tokenizer differs, ids have no embedding, rows are longer than a
            model's positions, or a rollout's responses would never end.
    """
    for name, spec in specs.items():
        if spec.is_judge:  # it reads texts
            check_judge(spec, inputs.rubrics[name].texts)
            continue
        check_lengths(config, spec)
        if spec.is_rollout:
            check_stop_tokens(config, spec.model.vocab_size)
            check_ends(config, spec, inputs.texts)
        if spec.section.retokenize:
            continue
        check_tokenizer(inputs.tokenizer, spec.model)
        if spec.path == Path(config.model.path):
            continue
        differs = difference(inputs.tokenizer, load_tokenizer(spec.path))
        if differs is not None:
            texts = f", or set roles.{name}.retokenize=true, so that it reads texts"
            raise ValueError(
                f"roles.{name}.model={spec.path} and model.path={config.model.path} have different "
                f"tokenizers ({differs}): use models of one tokenizer"
                f"{texts if spec.kind == 'reward' else ''}"
            )


def check_judge(spec: RoleSpec, texts: TokenTexts) -> None:
    """Raise ValueError if a judge's tokenizer is not its model's, or no token ends an answer."""
    check_tokenizer(load_tokenizer(spec.path), spec.model)
    if not ends_of_text(spec.model, texts):
        raise ValueError(
            f"roles.{spec.name}.model={spec.path}: no token ends an answer: its config.json and "
            "generation_config.json name no eos_token_id, and its tokenizer has no eos_token: name "
            "one there"
        )


def check_stop_tokens(config: Config, vocab_size: int) -> None:
    """Raise ValueError for a stop id outside the model's vocabulary: it would end no response."""
    found = {"sampling": config.sampling}
    for name, described in held_out_sets(config).items():
        found[f"the sampling of evaluation set {name}"] = described.sampling
    for where, sampling in found.items():
        for number in sampling.stop_token_ids:
            if number >= vocab_size:
                raise ValueError(
                    f"stop_token_ids={list(sampling.stop_token_ids)} in {where}: the model's "
                    f"tokens are 0 to {vocab_size - 1}, so {number} would never end a response"
                )
