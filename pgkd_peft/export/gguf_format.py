"""What llama.cpp expects of a GGUF file: names, row order and settings per architecture, and the vocabulary.

Sources: the GGUF specification (ggml/docs/gguf.md) and the keys and names that the `gguf` package defines.
"""

from __future__ import annotations

import json
import math
import types
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import ModelError

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type -> gguf.MODEL_ARCH

# Pre-tokenizers of byte-level BPE that llama.cpp knows, by the regular expression that splits the text.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_ELSEWHERE = "Merge with `pgkd merge` and convert the result with llama.cpp's convert_hf_to_gguf.py."
_PRE_BY_SPLIT = {_LLAMA3_SPLIT: "llama-bpe", _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def import_gguf() -> types.ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ModelError("writing GGUF needs the package gguf. Run: pip install gguf") from error
    return gguf


class Architecture:
    """Translates a Transformers model to what llama.cpp calls it.

    Args:
        config: of the model.

    Raises:
        ModelError: an architecture, or a setting of one, that cannot be written; named.
    """

    def __init__(self, config: PreTrainedConfig):
        gguf = import_gguf()
        if config.model_type not in ARCHITECTURES:
            raise ModelError(
                f"model type {config.model_type!r} cannot be written as GGUF here; {', '.join(ARCHITECTURES)} can. "
                f"{_ELSEWHERE}"
            )
        if getattr(config, "use_sliding_window", False):
            raise ModelError("a model with use_sliding_window cannot be written as GGUF here")
        self.config = config
        self.arch = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
        self.name = gguf.MODEL_ARCH_NAMES[self.arch]
        self._names = gguf.get_tensor_name_map(self.arch, config.num_hidden_layers)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def tensor_name(self, key: str) -> str:
        """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
        name = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"{key} has no place in a GGUF file of architecture {self.name!r}")
        return str(name)

    def reorder_rows(self, key: str, array: np.ndarray) -> np.ndarray:
        """llama.cpp rotates neighbouring pairs of a head (in architecture llama), Transformers its two halves.

        Args:
            array: (out, ...) rows of a query or key projection, or its bias, or a LoRA B; others are left alone.
        """
        if self.name != "llama" or not any(f".{part}_proj." in key for part in "qk"):
            return array
        heads = self.config.num_attention_heads if ".q_proj." in key else self.config.num_key_value_heads
        split = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2).reshape(array.shape))

    def add_settings(self, writer: Any) -> None:
        """The hyperparameters that llama.cpp builds the graph from."""
        gguf, config = import_gguf(), self.config
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope = self._rope()
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    def rope_factors(self) -> np.ndarray | None:
        """Llama 3.1's frequency divisors (head_dim / 2,), which stand in a GGUF file as the tensor rope_freqs.weight.

        Long wavelengths are divided by `factor`, short ones not at all, those between are blended (the "llama3" rule
        of the Llama 3.1 release).
        """
        rope = self._rope()
        if rope["rope_type"] != "llama3":
            return None
        factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
        context = rope["original_max_position_embeddings"]
        divisors = []
        for i in range(0, self.head_dim, 2):
            wavelength = 2 * math.pi * rope["rope_theta"] ** (i / self.head_dim)
            blend = min(max((context / wavelength - low) / (high - low), 0.0), 1.0)
            divisors.append(1 / ((1 - blend) / factor + blend))
        return np.array(divisors, dtype=np.float32)

    def _rope(self) -> dict[str, Any]:
        rope = dict(self.config.rope_parameters)
        rope.setdefault("rope_type", "default")
        if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
            raise ModelError(f"rope_type {rope['rope_type']!r} cannot be written as GGUF here")
        return rope


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Tokens, merges, pre-tokenizer, special ids and chat template of a byte-level BPE tokenizer.

    Args:
        vocab_size: rows of the embedding; ids that the tokenizer does not use are filled up.

    Raises:
        ModelError: another kind of tokenizer (SentencePiece, WordPiece), or a pre-tokenizer that llama.cpp has no name
            for: writing a similar one would tokenize some texts differently, in silence.
    """
    gguf = import_gguf()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_name(backend)
    added = tokenizer.added_tokens_decoder
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for i in range(vocab_size):
        if i not in by_id:
            tokens.append(f"[PAD{i}]")
            kinds.append(gguf.TokenType.UNUSED)
        else:
            tokens.append(by_id[i])
            special = i in added and added[i].special
            normal = gguf.TokenType.USER_DEFINED if i in added else gguf.TokenType.NORMAL
            kinds.append(gguf.TokenType.CONTROL if special else normal)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = backend["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for kind in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)
    writer.add_add_bos_token(adds_bos(tokenizer))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer, and so the runtime that reads the file, puts the BOS token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def pre_tokenizer_name(backend: dict[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer, from the JSON of its backend."""
    model, normalizer = backend["model"], (backend["normalizer"] or {}).get("type", "NFC")
    if model["type"] != "BPE" or model.get("byte_fallback") or normalizer != "NFC":
        like = " like SentencePiece's" if model.get("byte_fallback") else f", normalizer {normalizer}"
        raise ModelError(
            f"only byte-level BPE can be written as GGUF here; the tokenizer is {model['type']}{like}. {_ELSEWHERE}"
        )
    steps = backend["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    kinds, last = [step["type"] for step in steps], steps[-1]
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if kinds == ["ByteLevel"] and last["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last["use_regex"]:
            name = _PRE_BY_SPLIT.get(steps[0]["pattern"].get("Regex", ""))
            if name is not None:
                return name
    raise ModelError(
        f"the tokenizer splits text ({' + '.join(kinds)}) in a way that has no name here, so a GGUF file would "
        f"tokenize some texts differently. {_ELSEWHERE}"
    )
