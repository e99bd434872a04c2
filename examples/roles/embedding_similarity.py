"""A reward without a reward model: how close a response is to the reference answer in meaning.

    roles:
      similarity: {kind: "examples/roles/embedding_similarity.py:EmbeddingSimilarity"}
    rewards:
      - {role: similarity}

The score is the cosine of two embeddings in [-1, 1]. An embedding is the mean of a language model's
last hidden states over the text, less the mean embedding of a few fixed texts: plain means of such
states all point the same way. Nothing of it depends on the other rows of a batch, so that a score
is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spmdrl.api import Batch, Column, RoleContext

BACKGROUND = (
    "The answer is 42.",
    "I do not know.",
    "First, let us look at what is given.",
    "Yes, that is right.",
    "It was a cold day in the north.",
)


class EmbeddingSimilarity:
    """Args:
    batch_size: texts embedded at once.
    max_tokens: of a text; what is beyond is not read.
    background: texts whose mean embedding all others are seen from.
    """

    needs = ("response", "answer")
    returns = (Column(name="scores", kind="row"),)

    def __init__(
        self,
        batch_size: int = 16,
        max_tokens: int = 256,
        background: Sequence[str] = BACKGROUND,
    ) -> None:
        if not background:
            raise ValueError("background=[]: give at least one text")
        self.batch_size, self.max_tokens, self.background = batch_size, max_tokens, background

    def setup(self, context: RoleContext) -> None:
        # here, not at the top: only the role's own ranks load the model
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(context.model, local_files_only=True)
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = AutoModel.from_pretrained(context.model, local_files_only=True)
        self.model.to(context.device).eval()
        self.centre = self.embed(self.background).mean(0)

    def forward_step(self, batch: Batch) -> dict[str, Tensor]:
        answers = self.embed(batch.objects["answer"]) - self.centre
        responses = self.embed(batch.objects["response"]) - self.centre
        return {"scores": torch.cosine_similarity(responses, answers)}

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:  # [B, D]
        """Mean hidden states; of an empty text those of the end of text."""
        parts = [torch.zeros(0, self.model.config.hidden_size)]
        for first in range(0, len(texts), self.batch_size):
            chunk = [t or self.tokenizer.eos_token for t in texts[first : first + self.batch_size]]
            given = self.tokenizer(
                chunk,
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                add_special_tokens=False,
            )
            device = self.model.device
            ids, mask = given["input_ids"].to(device), given["attention_mask"].to(device)
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            weights = mask.unsqueeze(-1).float()
            parts.append(((hidden * weights).sum(1) / weights.sum(1)).cpu())
        return torch.cat(parts)
