"""Tiny models of every family that engines serve, with random weights, and what the tests ask of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from shared.engines.base import Engine, Finished, Request
from shared.messages import Sampling
from shared.models.images import ImageReader

VOCABULARY = 48
CONTEXT = 160
SLOTS = 48
STOP = 3
"""The token that ends a sample in the contract's engines."""
FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "llama", "qwen2_5_vl")
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens behind the vocabulary of the other families, for images."""
VISION_START, VISION_END, IMAGE, VIDEO = range(VOCABULARY, VOCABULARY + len(MARKS))

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


def tiny(family: str, seed: int = 0, *, tied: bool = True, wide: bool = False) -> PreTrainedModel:
    """A model whose logits are far enough apart that greedy choices are not a matter of rounding.

    Heads are 32 wide: vLLM's kernels for CPUs know no smaller ones. A `wide` one has layers for blocks of 128.
    """
    sizes = {**_SIZES, **(_WIDE if wide else {})}
    torch.manual_seed(seed)
    match family:
        case "qwen2":
            model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=tied))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=True))
        case "qwen3_moe":
            moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **moe, head_dim=32, tie_word_embeddings=False))
        case "qwen2_5_vl":
            torch.manual_seed(seed + 7)  # whose first tokens are rarely the stop token
            model = Qwen2_5_VLForConditionalGeneration(_vision_language(sizes, tied))
        case _:
            model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    return model.eval()


def _vision_language(sizes: dict[str, object], tied: bool) -> Qwen2_5_VLConfig:
    """Two layers of vision, one of which looks at windows of two by two tokens; patches of 14 pixels, tokens of 28."""
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": sizes["hidden_size"],
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.15,
    }
    text = {
        **sizes,
        "vocab_size": VOCABULARY + len(MARKS),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": tied,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def reader(model: PreTrainedModel) -> ImageReader | None:
    """What reads images for a model of `tiny`, if it takes any: of 4 to 32 tokens."""
    if model.config.model_type != "qwen2_5_vl":
        return None
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return ImageReader(Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28**2, "longest_edge": 32 * 28**2}), IMAGE)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token; vLLM and SGLang want one beside a model that takes images."""
    words = [f"w{token}" for token in range(VOCABULARY)] + list(MARKS)
    backend = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=f"w{STOP}",
        additional_special_tokens=list(MARKS),
        chat_template=f"{{% for message in messages %}}{{{{ message['content'] }}}} w{STOP} {{% endfor %}}",
    )


def image_prompt(model: PreTrainedModel, images: Sequence[np.ndarray], seed: int = 0) -> list[int]:
    """Random words around each of the images, in the marks of the chat template."""
    taken = reader(model)
    assert taken is not None
    marked = [
        part for index in range(len(images)) for part in (*prompt(3, seed + index), VISION_START, IMAGE, VISION_END)
    ]
    return taken.expand([*marked, *prompt(6, seed + 100)], images)


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(
    key: object,
    tokens: list[int],
    *,
    samples: int = 1,
    new: int = 12,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    images: Sequence[np.ndarray] = (),
) -> Request:
    return Request(key, tokens, samples, Sampling(temperature, top_p, top_k, new), seed, images=images)


def run(engine: Engine, *requests: Request) -> dict[tuple[object, int], Finished]:
    """Submit all, advance until nothing is left; the samples by (key, sample)."""
    for request in requests:
        engine.submit(request)
    return drain(engine)


def drain(engine: Engine) -> dict[tuple[object, int], Finished]:
    finished: dict[tuple[object, int], Finished] = {}
    while engine.stats().running or engine.stats().queued:
        finished.update({(sample.key, sample.sample): sample for sample in engine.advance()})
    return finished


def hugging_face_greedy(
    model: PreTrainedModel,
    tokens: Sequence[int],
    new: int,
    stop: int | None = STOP,
    images: Sequence[np.ndarray] = (),
) -> list[int]:
    """What transformers' own greedy search makes of the prompt."""
    inputs = torch.tensor([list(tokens)])
    generated = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        **hugging_face_images(model, inputs, images),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )
    return generated[0, len(tokens) :].tolist()


def hugging_face_images(
    model: PreTrainedModel, inputs: torch.Tensor, images: Sequence[np.ndarray]
) -> dict[str, torch.Tensor]:
    """What transformers' own processor adds to the ids of a prompt with images."""
    taken = reader(model)
    if taken is None or not images:
        return {}
    pixels = taken.processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
    return {**pixels, "mm_token_type_ids": (inputs == IMAGE).int()}


def with_images(
    model: PreTrainedModel, tokens: list[int], response: list[int], images: Sequence[np.ndarray]
) -> dict[str, torch.Tensor]:
    """What a forward pass takes whose response may have image tokens, which transformers would count as images."""
    ids = torch.tensor([tokens + response])
    types = torch.tensor([[int(token == IMAGE) for token in tokens] + [0] * len(response)])
    pixels = hugging_face_images(model, ids, images)
    positions, _ = model.model.get_rope_index(ids, types, image_grid_thw=pixels["image_grid_thw"])
    embeddings = model.get_input_embeddings()(ids)
    seen = model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"], return_dict=True)
    embeddings[types.bool()] = torch.cat(list(seen.pooler_output))
    return {"inputs_embeds": embeddings, "position_ids": positions}


@torch.no_grad()
def forward_logprobs(
    model: PreTrainedModel,
    tokens: list[int],
    response: list[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    images: Sequence[np.ndarray] = (),
) -> torch.Tensor:
    """Log-probabilities of `response` after the prompt `tokens`, from one pass over everything, float32[response].

    Of the distribution that is left by temperature, the `top_k` likeliest tokens, and the fewest of those that have
    `top_p` of the probability together.
    """
    inputs = {"input_ids": torch.tensor([tokens + response])}
    if images:
        inputs = with_images(model, tokens, response, images)
    logits = model(**inputs).logits[0, len(tokens) - 1 : -1] / temperature
    logits, order = logits.sort(-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(-1)
    logits[probabilities.cumsum(-1) - probabilities >= top_p] = -torch.inf
    ranks = (order == torch.tensor(response)[:, None]).int().argmax(-1)
    return logits.log_softmax(-1).gather(1, ranks[:, None]).squeeze(1)
