"""Tiny configurations of many decoder families, and what is to be found in a block of each.

Hidden 32, two blocks, a vocabulary of 64, 48 positions. Between them: biases, grouped-query and multi-query attention,
tied embeddings, heads whose widths do not add up to the hidden size, sliding windows, fused projections, weights
stored transposed, parallel attention and FFN, norms behind the sub-layers, experts as one 3-D parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:  # slow to import, and conftest.py imports this file for every run
    from transformers import PreTrainedModel

HIDDEN, LAYERS, VOCABULARY, POSITIONS = 32, 2, 64, 48

# Keys that most configurations share; token 0 is <s>, and no token ends a text.
_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 48}
# heads of 16: four of them are 64 wide, twice the hidden size
_WIDE_HEADS = {**_LLAMA, "head_dim": 16}

_GATED = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
_FUSED = {"qkv": "qkv", "o": "o", "up": "up", "down": "down"}


@dataclass(frozen=True)
class Family:
    """A configuration by class name and keys, and the roles in a block, each with the role whose input it shares.

    additive: whether the outputs of `o` and `down` add up to the block's. dense: linears of a block that stay so.
    tied: whether the output head is the embedding.
    """

    config: str
    keys: Mapping[str, Any]
    roles: Mapping[str, str]
    additive: bool = True
    tied: bool = False
    dense: tuple[str, ...] = ()
    out_in: Mapping[str, tuple[int, int]] | None = None

    def make(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        """A model with random weights, in eval mode; its predictions are far from uniform."""
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**{**self.keys, **changes})
        return randomised(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), seed)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", {**_LLAMA, "attention_bias": True, "mlp_bias": True}, _GATED),
    "llama_tied": Family("LlamaConfig", {**_WIDE_HEADS, "tie_word_embeddings": True}, _GATED, tied=True),
    "mistral": Family("MistralConfig", {**_LLAMA, "num_key_value_heads": 1, "sliding_window": 8}, _GATED),
    "qwen2": Family("Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}, _GATED, tied=True),
    "qwen3": Family("Qwen3Config", _WIDE_HEADS, _GATED, out_in={"q": (64, 32), "k": (32, 32), "o": (32, 64)}),
    "gemma2": Family(
        "Gemma2Config",
        # the second block sees everything, the first only a window: they are called with different masks
        {**_WIDE_HEADS, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        _GATED,
        additive=False,
        tied=True,
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {**_WIDE_HEADS, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        _GATED,
        additive=False,
        tied=True,
    ),
    "phi3": Family("Phi3Config", _LLAMA, {"qkv": "qkv", "o": "o", "gate_up": "gate_up", "down": "down"}),
    "gpt2": Family(
        "GPT2Config",
        {
            "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS, "vocab_size": VOCABULARY,
            "bos_token_id": 0, "eos_token_id": None,
        },
        _FUSED,
        tied=True,
        out_in={"qkv": (96, 32), "o": (32, 32), "up": (128, 32), "down": (32, 128)},
    ),
    "opt": Family(
        "OPTConfig",
        {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
        {"q": "q", "k": "q", "v": "q", "o": "o", "up": "up", "down": "down"},
        tied=True,
    ),
    "gpt_neox": Family("GPTNeoXConfig", {**_COMMON, "intermediate_size": 48}, _FUSED),
    "bloom": Family(
        "BloomConfig",
        {
            "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 0,
            "eos_token_id": None, "pad_token_id": 0,
        },
        _FUSED,
        tied=True,
    ),
    "falcon": Family(
        "FalconConfig",
        {**_COMMON, "multi_query": True, "parallel_attn": True, "bias": True, "alibi": False},
        {"qkv": "qkv", "o": "o", "up": "qkv", "down": "down"},
        tied=True,
        out_in={"qkv": (48, 32)},
    ),
    "falcon_new": Family(
        "FalconConfig",
        {**_COMMON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, "alibi": False},
        {"qkv": "qkv", "o": "o", "up": "up", "down": "down"},
        tied=True,
        out_in={"qkv": (64, 32)},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {**_WIDE_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        {"q": "q", "k": "q", "v": "q", "o": "o"},
        dense=("mlp.experts",),
    ),
    "mixtral": Family(
        "MixtralConfig",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"q": "q", "k": "q", "v": "q", "o": "o"},
        dense=("mlp.experts",),
    ),
}  # fmt: skip
EXPERTS = ("qwen3_moe", "mixtral")


def randomised(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights, biases and norms at random: zeros and ones, as made at first, would hide what is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * (0.3 if "embed" in name or "wte" in name else 0.15))
            else:
                parameter.add_(0.1 * noise)
    return model


def linears(model: nn.Module, blocks: str) -> dict[str, nn.Module]:
    """The linear layers inside the list of blocks, by name: found with no help of the package."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name.startswith(f"{blocks}.") and isinstance(module, (nn.Linear, Conv1D)):
            found[name] = module
    return found


def lower_rank(model: PreTrainedModel, blocks: str, rank: int) -> PreTrainedModel:
    """Every linear of the blocks replaced by its best approximation of `rank`, in place."""
    with torch.no_grad():
        for module in linears(model, blocks).values():
            weight = module.get_parameter("weight")
            u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
            weight.copy_((u[:, :rank] * s[:rank]) @ vh[:rank])
    return model
