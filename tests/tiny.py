"""Tiny random models: real architectures of transformers, built in milliseconds."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 256
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EAGER_ONLY = ("gemma2",)

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHARED, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**_SHARED, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_SHARED),
    "qwen3": Qwen3Config(**_SHARED, head_dim=16),
    "gemma3": Gemma3TextConfig(
        **_SHARED, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, n_embd=64, n_layer=2, n_head=4, n_positions=128
    ),
    "llama-kv1": LlamaConfig(**{**_SHARED, "num_key_value_heads": 1}),
    "mistral": MistralConfig(**_SHARED, sliding_window=8),
    "gemma2": Gemma2Config(**_SHARED, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    "phi3": Phi3Config(**_SHARED, bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "gpt-neox": GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "falcon": FalconConfig(**_FALCON, multi_query=True, parallel_attn=True),
    "falcon-40b": FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2, bias=True),
    "mixtral": MixtralConfig(**_SHARED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(
        **_SHARED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}
FAMILIES = [
    name
    if name in ("llama", "opt", "gpt2", "gemma3", "falcon", "mixtral")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in CONFIGS
]
"""All, for tests whose like runs for every one of them: the normal run takes one of each kind of block."""
DENSE = [name for name in CONFIGS if name not in ("mixtral", "qwen3-moe")]
"""Those whose linear layers are all there without splitting experts."""


def tiny_model(name: str = "llama", *, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode with random weights and biases."""
    torch.manual_seed(seed)
    attention = "eager" if name in _EAGER_ONLY else attention
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[name]), attn_implementation=attention, dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases start at zero and norms at one: a lost one would go unseen
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_tokens(windows: int = 3, context: int = 32, *, seed: int = 0) -> torch.Tensor:
    """Random token windows (windows, context)."""
    return torch.randint(0, VOCABULARY, (windows, context), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, 256 in all; bytes 0 and 1 serve as BOS and EOS, and the BOS is added if asked for."""
    vocabulary = {
        character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    bos, eos = chr(256), chr(257)  # how a byte-level tokenizer writes bytes 0 and 1
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)
