"""`Judge`: the handle of a generative model that answers questions, with fixed weights.

Its engine reads the weights from files, or computes with the base of another role and an adapter
of its own (`roles.NAME.base`); no weight sync reaches it. What is asked, and what an answer means,
is the work of `rewards.rubric`; here an answer is a sampled row.
"""

from __future__ import annotations

from spmdrl.batch import Batch
from spmdrl.distributed.mesh import Mesh
from spmdrl.memory.call_memory import CallMemory
from spmdrl.models.config import ModelConfig
from spmdrl.roles.calls import Call, role_method
from spmdrl.roles.generation import KV_CACHE, Rollout
from spmdrl.roles.generation_rows import Generation
from spmdrl.roles.model_calls import WEIGHTS
from spmdrl.rollout.protocol import RolloutEngine


class Judge:
    """A generative model on an engine: `answer(questions, generation)` samples answers.

    Args:
        engine: the engine on the role's ranks, with its weights; None on other ranks.
        memory: memory moves of this rank.
        parts: the parts that a call needs on the device.
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        model: ModelConfig,
        engine: RolloutEngine | None,
        memory: CallMemory | None = None,
        parts: tuple[str, ...] = (WEIGHTS, KV_CACHE),
    ) -> None:
        self.name, self.mesh, self.model = name, mesh, model
        self.engine, self.memory = engine, memory
        self._sampler = Rollout(name, mesh, model, engine, memory, parts)

    @role_method
    def answer(self, questions: Batch, generation: Generation) -> Call[Batch]:
        """Sample `group_size` answers to each question: rows of question and answer.

        `questions` are home rows with the token column `tokens`, the judge's own ids, and the row
        column `prompt_ids`, unique in the call. Results are those of `Rollout.generate`.
        """
        return self._sampler.generate.on(questions, generation)
