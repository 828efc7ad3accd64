"""Bytes that the policy's forward and backward take of one micro-batch, on one rank.

Counted tensor by tensor: what autograd keeps of the layers of transformers' Qwen2, Qwen3, Qwen3-MoE, Llama and
Qwen2.5-VL with packed attention. The tests hold `kept_by_layer` to what a real forward keeps. Letters: T tokens, H
hidden, I intermediate, A query heads and K key-value heads of width D, e bytes of a number in the model's type.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.plan.memory.model import ModelShape
from shared.config.schema import PolicyParallelTable

FLOAT32 = 4
LOGITS = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Most logits that exist at one time: BLOCK_ELEMENTS of services/policy/logprobs.py."""


@dataclass(frozen=True, slots=True)
class Line:
    """A micro-batch of `tokens` in the model's type of `itemsize` bytes, on a rank of that layout."""

    shape: ModelShape
    parallel: PolicyParallelTable
    tokens: int
    itemsize: int
    ragged: bool = True

    @property
    def here(self) -> int:
        """Tokens of this rank's part of the line."""
        return self.tokens // self.parallel.cp

    @property
    def between(self) -> int:
        """Tokens of it between attention and MLP: with sequence parallelism each rank has its part."""
        return self.here // (self.parallel.tp if self.parallel.sequence else 1)

    def entering_layer(self) -> int:
        """Hidden states that enter a layer, which is all that gradient checkpointing keeps of it: e T H."""
        return self.itemsize * self.between * self.shape.hidden

    def norm(self) -> int:
        """A norm over hidden states keeps a float32 copy, the normalised values and a root a token; 4 T H + e T H."""
        return self.between * (self.shape.hidden * (FLOAT32 + self.itemsize) + FLOAT32)

    def kept_by_layer(self) -> int:
        """All that a layer keeps for its backward."""
        linear_inputs = 2 * self.itemsize * self.here * self.shape.hidden  # of attention and MLP, whole under tp
        return 2 * self.norm() + linear_inputs + self._attention() + self._mlp()

    def backward_of_layer(self) -> int:
        """Gradients of what a layer computed, beside what it kept: at the MLP, where most of them are alive at once."""
        hidden = 3 * self.itemsize * self.here * self.shape.hidden
        if self.shape.experts:
            return hidden + self.itemsize * self._routed() * (3 * self.shape.intermediate + self.shape.hidden)
        return hidden + 2 * self.itemsize * self.here * self.shape.intermediate // self.parallel.tp

    def after_layers(self) -> int:
        """The last norm, and hidden states at the places of response tokens: of all, at most."""
        return self.norm() + 2 * self.itemsize * self.here * self.shape.hidden

    def logprobs(self, device: str) -> tuple[int, int]:
        """A block of logits in the model's type and in float32 with its exponentials: forward, backward.

        Backward has the float32 gradient of hidden states beside it; that of the head is no activation.
        """
        block = min(LOGITS[device], self.here * self.shape.vocabulary // self.parallel.tp)
        forward = block * (self.itemsize + 3 * FLOAT32)
        return forward, block * (2 * self.itemsize + 2 * FLOAT32) + FLOAT32 * self.here * self.shape.hidden

    def _attention(self) -> int:
        """Queries, keys, values and answers for the kernel, its log-sum-exp; the heads' norms where there are some.

        Rows of unequal lengths are computed in several blocks: parts of the line are padded copies, and the blocks'
        answers are joined.
        """
        shape, tp = self.shape, self.parallel.tp
        queries = self.here * shape.heads * shape.head_dim // tp
        keys = self.here * shape.kv_heads * shape.head_dim // tp
        lines = self.itemsize * (2 * queries + 2 * keys * self.parallel.cp)  # keys and values of the whole line
        kernel = (2 if self.ragged else 1) * lines + FLOAT32 * self.here * shape.heads // tp
        if not shape.normed_heads:
            return kernel
        roots = FLOAT32 * self.here * (shape.heads + shape.kv_heads) // tp
        return kernel + (queries + keys) * (FLOAT32 + self.itemsize) + roots

    def _mlp(self) -> int:
        """Gate, up, activated gate and their product: 4 e T I; for experts the same of each token's choices.

        Experts also keep the tokens gathered for them and their answers, and the router its logits.
        """
        shape = self.shape
        if not shape.experts:
            return 4 * self.itemsize * self.here * shape.intermediate // self.parallel.tp
        router = self.here * (FLOAT32 * shape.experts + 4 * FLOAT32 * shape.experts_per_token)
        order = 3 * 8 * self._routed()
        return router + order + self.itemsize * self._routed() * (2 * shape.hidden + 4 * shape.intermediate + 1)

    def _routed(self) -> int:
        """Rows that this rank's experts get: all choices of all tokens of the axis ep, those of others' experts too."""
        return self.here * self.parallel.ep * self.shape.experts_per_token
