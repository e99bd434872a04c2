"""Clauses on what an engine holds: weights as slices of the name space, and parts that leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor, nn

from spmdrl.distributed.parallel import Parallel
from spmdrl.models.decoder import Decoder
from spmdrl.models.sharding import global_shapes
from spmdrl.roles.canary import Canary
from spmdrl.testing.clause import ContractError, Findings, close, same
from spmdrl.testing.engine_models import (
    StateDict,
    logits_of,
    prompts_of,
    request,
    scores_of,
    trainer_decoder,
)
from spmdrl.testing.engine_subject import (
    BOUND,
    EngineSubject,
    expect,
    generate,
    refused,
    scores_by,
)
from spmdrl.weights.layout import model_layout
from spmdrl.weights.plan import plan_sync
from spmdrl.weights.sync import WeightSync

_SHOWS = 1e-3
"""Least change of some log-probability, in nats, that a changed tensor must make to be seen."""

_AWAY = ("rollout", "weights", "not on the device")
"""Words of the refusal to compute without weights."""


def _scores(decoder: Decoder, rows: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.cat([scores_of(decoder, row) for row in rows])


def _noisy(values: Tensor, size: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(values.shape, generator=generator)
    return values + size * values.std().clamp_min(0.1) * noise


def weights_are_slices_of_the_name_space(subject: EngineSubject) -> Findings:
    """`local_tensors` are what the sync's plan expects on this rank, in the storage that `allocate`
    gave: the same names, shapes, dtypes and slices.
    """
    engine, table = subject.engine("Qwen2"), subject.table("Qwen2")
    found = engine.local_tensors()
    yield from same("tensors", sorted(found), sorted(table))
    for name in found.keys() & table.keys():
        (tensor, slices), held = found[name], table[name]
        seen = (tuple(tensor.shape), tensor.dtype, slices)
        yield from same(f"{name}:", seen, (held.shape, held.dtype, held.slices))
        own = subject.held[name][0].untyped_storage().data_ptr()
        yield from expect(
            tensor.untyped_storage().data_ptr() == own,
            f"{name} in the storage that allocate gave to be filled",
            "another one",
        )


def every_loaded_tensor_counts(subject: EngineSubject) -> Findings:
    """Each tensor that a load changes by itself changes the scores as it changes the trainer's."""
    for name in ("Llama", "Qwen2"):
        engine, rows = subject.engine(name), prompts_of(24, 40)
        model, source = subject.model(name)
        before = _scores(subject.decoder(name), rows)
        generator = torch.Generator().manual_seed(4)
        for tensor in sorted(global_shapes(model)):
            changed = source.replaced(tensor, _noisy(source.tensor(tensor), 0.3, generator))
            subject.load(changed)
            wanted = _scores(trainer_decoder(model, changed), rows)
            assert (wanted - before).abs().max() > _SHOWS, f"{tensor} decides nothing"
            what = f"with another {tensor} ({name}), scores"
            yield from close(what, scores_by(engine, rows), wanted, atol=BOUND)


def loads_change_the_samples(subject: EngineSubject) -> Findings:
    """A call after a load draws with the loaded weights: nothing of the last call is left, such as
    keys and values of a prompt.
    """
    engine, (model, source) = subject.engine(), subject.model()
    prompt = prompts_of(40)[0]
    asked = [request(prompt, 0, 2, temperature=0, max_tokens=12, ignore_eos=True)]
    first = generate(engine, asked)
    generator = torch.Generator().manual_seed(9)
    shapes = sorted(global_shapes(model))
    other = StateDict({name: _noisy(source.tensor(name), 0.5, generator) for name in shapes})
    subject.load(other)
    [[found, _]] = generate(engine, asked)
    yield from expect(found != first[0][0], "other samples from other weights", "the same")
    logits = logits_of(trainer_decoder(model, other), (*prompt, *found.tokens))
    wanted = tuple(logits[len(prompt) - 1 : -1].argmax(-1).tolist())
    yield from same("greedy tokens of the loaded weights:", found.tokens, wanted)
    subject.load(source)
    again = generate(engine, asked)
    yield from expect(again == first, f"{first} from the first weights, loaded again", f"{again}")


def wrong_loads_show_in_the_canary(subject: EngineSubject) -> Findings:
    """A tensor of which half was loaded, or whose rows are shifted by one, makes the canary's gap
    a jump, and the right weights do not.
    """
    engine, (model, source) = subject.engine(), subject.model()
    # all of its rows on every rank: the ranks are one replica
    whole = replace(subject.world, rank=0, size=1)
    canary = Canary(whole, num_replicas=1, vocab_size=model.vocab_size, dtype=torch.float32)
    rows = [tuple(row["tokens"].tolist()) for row in canary.rows.split_rows()]
    expected = _scores(subject.decoder(), rows)

    def gap() -> float:
        return float((scores_by(engine, rows) - expected).abs().mean())

    first = gap()
    yield from expect(canary.accepts(first), f"a gap below {canary.limit:.2e}", f"{first:.2e}")
    generator = torch.Generator().manual_seed(6)
    for name in sorted(global_shapes(model)):
        values = source.tensor(name)
        half = values.clone()
        half[len(half) // 2 :] = _noisy(half[len(half) // 2 :], 0.3, generator)
        for how, wrong in (("half loaded", half), ("shifted by a row", values.roll(1, 0))):
            subject.load(source.replaced(name, wrong))
            found = gap()
            limit = f"a gap above {canary.limit:.2e} with {name} {how}"
            yield from expect(found > canary.limit, limit, f"{found:.2e}")
    subject.load(source)
    last = gap()
    yield from expect(canary.accepts(last), f"a gap below {canary.limit:.2e}", f"{last:.2e}")


def adopted_weights_are_the_trainers_storage(subject: EngineSubject) -> Findings:
    """`adopt` takes the trainer's storage, so an optimizer's step is seen without a copy; a tensor
    of another shape is refused by name.
    """
    engine, (model, source) = subject.engine(), subject.model()
    trainer = {name: nn.Parameter(tensor.clone()) for name, (tensor, _) in subject.held.items()}
    for name, parameter in trainer.items():
        engine.adopt(name, parameter)
    held = engine.local_tensors()
    copied = [name for name, p in trainer.items() if held[name][0].data_ptr() != p.data_ptr()]
    yield from same("adopted tensors that were copied", copied, [])
    frozen = [name for name, p in trainer.items() if not p.requires_grad]
    yield from same("adopted tensors that no longer train", frozen, [])
    rows, norm = prompts_of(24), "model.norm.weight"
    own = scores_by(engine, rows)
    yield from close("scores", own, _scores(subject.decoder(), rows), atol=BOUND)
    changed = source.replaced(norm, source.tensor(norm) * torch.linspace(0.5, 1.5, 128))
    with torch.no_grad():
        trainer["norm.weight"].copy_(changed.tensor(norm))
    wanted = _scores(trainer_decoder(model, changed), rows)
    yield from close("scores after the trainer's step", scores_by(engine, rows), wanted, atol=BOUND)
    yield from refused(
        lambda: engine.adopt("norm.weight", torch.zeros(3)), "norm.weight", "cannot use"
    )
    subject.close()


def weights_that_are_not_finite_are_named(subject: EngineSubject) -> Findings:
    """NaN in the weights ends the call with the prompt's name, and not with samples.

    On one rank: in a group only the leader raises, and the job ends with it.
    """
    if subject.world.size > 1:
        return
    engine, (_, source) = subject.engine(), subject.model()
    asked = [request((7, 8), 42, max_tokens=3)]
    before = generate(engine, asked)
    subject.held["norm.weight"][0].fill_(torch.nan)
    yield from refused(lambda: generate(engine, asked), "prompt 42", "not finite")
    subject.load(source)
    again = generate(engine, asked)
    yield from expect(again == before, f"{before} when weights are finite again", f"{again}")


def parts_leave_and_return(subject: EngineSubject) -> Findings:
    """Cache and graphs are freed and made again; weights whose storage is freed are refused by name
    before anything runs, and used again when they are back.
    """
    engine = subject.engine()
    asked = [request(prompts_of(20)[0], 0, 2, max_tokens=6, ignore_eos=True)]
    before, rows = generate(engine, asked), prompts_of(9)
    scores = engine.score(rows)
    yield from expect(engine.cache_bytes() > 0, "a cache after a call", "0 bytes")
    engine.release_graphs()
    yield from same("bytes of graphs after release_graphs", engine.graph_bytes(), 0)
    if subject.has("freed_caches"):
        engine.release_cache()
        yield from same("bytes of the cache after release_cache", engine.cache_bytes(), 0)
    again = generate(engine, asked)
    yield from expect(again == before, f"{before} after release_cache", f"{again}")
    away = []
    for tensor, _ in engine.local_tensors().values():
        storage = tensor.untyped_storage()
        away.append((storage, storage.nbytes(), tensor, tensor.clone()))
        storage.resize_(0)
    ran: list[int] = []
    yield from refused(lambda: generate(engine, asked, progress=lambda *_: ran.append(1)), *_AWAY)
    yield from refused(lambda: engine.score(rows), *_AWAY)
    yield from same("steps before missing weights are refused", len(ran), 0)
    for storage, num_bytes, tensor, values in away:
        storage.resize_(num_bytes)
        tensor.copy_(values)
    again = generate(engine, asked)
    yield from expect(again == before, f"{before} when the weights are back", f"{again}")
    yield from same("scores when the weights are back", engine.score(rows), scores)


def ranks_outside_take_no_part(subject: EngineSubject) -> Findings:
    """An engine on the last rank gets its weights from a trainer on the first, and generates while
    the others do something else.
    """
    world, last = subject.world, subject.world.size - 1
    subject.close()
    model, source = subject.model()
    engine = None
    if world.rank == last:
        engine = subject.candidate.make(model, tp=Parallel(), texts=subject.texts)
    trainer, rollout = (
        model_layout(model, [rank], {"dp_replicate": 1}, torch.float32) for rank in (0, last)
    )
    tensors = {}
    if world.rank == 0:
        decoder = trainer_decoder(model, source)
        slices = decoder.slices()
        tensors = {name: (p.detach(), slices[name]) for name, p in decoder.named_parameters()}
    WeightSync(
        plan_sync(trainer, rollout),
        trainer.get(world.rank, {}),
        rollout.get(world.rank, {}),
        tensors,
        engine,
        torch.device("cpu"),
    ).run()
    store, done = world.connect("ranks_outside"), "generated"
    if engine is not None:
        rows = prompts_of(24)
        wanted = _scores(subject.decoder(), rows)
        yield from close("synced scores", scores_by(engine, rows), wanted, atol=BOUND)
        generate(engine, [request(rows[0], 0, 2, max_tokens=5)])
        engine.close()
        store.set(done, "yes")
        return
    patience = subject.candidate.patience_s
    try:
        store.wait([done], timedelta(seconds=patience))
    except RuntimeError:  # torch.distributed.DistStoreError
        # and not a finding: the rank that hangs would not come to tell its own
        raise ContractError(
            "ranks outside take no part",
            subject.describe(),
            [f"a call on rank {last} has not ended in {patience:g} s: it waits for a rank outside"],
        ) from None


WEIGHTS = (
    weights_are_slices_of_the_name_space,
    every_loaded_tensor_counts,
    loads_change_the_samples,
    wrong_loads_show_in_the_canary,
    adopted_weights_are_the_trainers_storage,
    weights_that_are_not_finite_are_named,
    parts_leave_and_return,
)
