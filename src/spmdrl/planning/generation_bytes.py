"""Device memory of a rollout's call in addition to parts: prefill, logits and sampling."""

from __future__ import annotations

from spmdrl.config.data_sets import longest_prompt, response_tokens, takes_turns
from spmdrl.config.sections import Config
from spmdrl.models.kernels import gpu
from spmdrl.models.widths import engine_heads_width
from spmdrl.planning.activation_bytes import forward_values
from spmdrl.planning.delta_bytes import step_bytes
from spmdrl.planning.engines import samples_per_replica
from spmdrl.planning.questions import questions_of
from spmdrl.role_spec import RoleSpec
from spmdrl.rollout.native.sampler import rows_at_once

_DRAWS = 4
"""Float32 values per logit while tokens are drawn: probabilities, noise and its random bits."""


def generation_bytes(config: Config, spec: RoleSpec) -> int:
    """Bytes of an engine step's activations and graphs, of its logits and of drawing from them.

    A step computes up to `rollout.prefill_tokens` of prompts and a token of each running sample;
    its logits are float32, and tensor-parallel ranks gather them.
    """
    model, tp = spec.model, spec.placement.degrees["tp"]
    running = min(samples_per_replica(config, spec), config.rollout.max_running)
    heads = engine_heads_width(model, tp)
    values = forward_values(spec, heads)
    if spec.is_judge:
        longest = questions_of(config, spec.name, model.max_position).prompt_tokens
    else:
        longest = longest_prompt(config)
        # answers to turns are computed like prompts
        longest += response_tokens(config) if takes_turns(config) else 0
    prompts = running * longest
    decoded = running * (values * spec.dtype.itemsize + step_bytes(model, tp))
    filled = min(config.rollout.prefill_tokens, prompts) * values * spec.dtype.itemsize
    captured = decoded if spec.device_type == "cuda" and config.rollout.cuda_graphs else 0
    gathered = model.vocab_size // tp + 2 * model.vocab_size if tp > 1 else model.vocab_size
    drawn = min(running, rows_at_once(model.vocab_size, spec.device)) * model.vocab_size
    if captured and gpu.is_switched_on():
        captured += 4 * running * gathered  # graphs draw tokens, and their memory has the logits
    logits = 4 * (running * gathered + _DRAWS * drawn)
    # the activations are gone before logits exist, apart from the rows that are read
    return int(captured + max(filled + decoded, logits))
