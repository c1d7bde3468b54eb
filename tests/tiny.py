"""Tiny models and a byte-level tokenizer, built in-process: no hub, no files, seconds to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIALS = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<unk>"]

# Permissive: any order of roles.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Strict: no system turn, roles must alternate (as Gemma's and Mistral's do).
STRICT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)

# Dropping: silently renders only the last user turn (some templates lose turns instead of refusing them).
DROPPING = (
    "{% set last = namespace(text='') %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set last.text = m['content'] %}{% endif %}{% endfor %}"
    "{{ '<|im_start|>user\n' + last.text + '<|im_end|>\n' }}"
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template: str = CHATML, *, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, plus the special tokens; ``decode(encode(text)) == text``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIALS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad_is_eos else "<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<eos>"],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = template
    return tokenizer


VOCAB = 272  # 6 special tokens + 256 bytes, rounded up


def tiny_model(kind: str = "llama", seed: int = 0, **overrides) -> PreTrainedModel:
    """A random 2-layer model: llama, qwen (attention bias), gemma (soft-capped logits, tied head) or gpt2 (learned
    absolute positions)."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 4, "bos_token_id": 2}
    wide = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**common, **wide, **overrides}))
    elif kind == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(**{**common, **wide, **overrides}))
    elif kind == "gemma":
        model = Gemma2ForCausalLM(
            Gemma2Config(
                **{**common, **wide, "head_dim": 16, "final_logit_softcapping": 5.0, "sliding_window": 16, **overrides}
            )
        )
    elif kind == "gpt2":
        gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
        model = GPT2LMHeadModel(GPT2Config(**{**common, **gpt2, **overrides}))
    else:
        raise ValueError(kind)
    with torch.no_grad():  # sharper than the default initialisation, so that outputs depend on the context
        for param in model.parameters():
            if param.dim() == 2:
                param.mul_(4.0)
    return model.eval()


def save_tiny(
    path: Path, kind: str = "llama", template: str = CHATML, *, pad_is_eos: bool = False, seed: int = 0, **kw
):
    """Write a tiny model with its tokenizer where ``from_pretrained`` finds it; returns the path as a string."""
    tiny_model(kind, seed, **kw).save_pretrained(path)
    byte_tokenizer(template, pad_is_eos=pad_is_eos).save_pretrained(path)
    return str(path)


# What a recipe for a tiny model says beside its model, data and folder.
TINY_RUN: dict[str, Any] = {
    "learning_rate": 0.05,
    "max_steps": 2,
    "max_new_tokens": 4,
    "per_device_train_batch_size": 2,
    "base_quantization": "none",
    "bf16": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "What is quicksort?"},
            {"role": "assistant", "content": "Quicksort partitions around a pivot."},
        ],
        "privileged_messages": [
            {"role": "user", "content": "Say its complexity."},
            {"role": "assistant", "content": "O(n log n) on average."},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "Who wrote it? Answer in one word, please."},
            {"role": "assistant", "content": "Hoare."},
        ],
        "privileged_messages": "It was Tony Hoare.",
    },
    {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how can I help?"}],
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Two plus two?"},
            {"role": "assistant", "content": "4"},
        ],
        "privileged_messages": [{"role": "user", "content": "The answer is four."}],
    },
]
