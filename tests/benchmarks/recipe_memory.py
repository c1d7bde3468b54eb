"""GPU memory that a recipe needs, computed from its model's shape: python tests/benchmarks/recipe_memory.py [RECIPE]

For models that are too large to run here. Every row is taken at its longest: prompts of max_length, PI of
max_privileged_length, completions of max_new_tokens. What PyTorch's allocator and CUDA itself take beyond the tensors
(about 1 GiB) is not in it, and no run has confirmed it; `pgkd inspect --preflight` measures on the device.

The peak is what stays (base, adapter, merged copy) and the largest of three phases:

    rollout   key-value cache of all rows of an optimizer step, and their last logits
    teacher   one sub-batch of hidden states through one layer, and the kept hidden states of all rows
    student   per layer the checkpointed hidden states of one micro-batch, one layer's activations, the loss's chunks
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parents[2] / "recipes"
GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, a byte a block of 64, a float a 256 blocks (QLoRA, section 3)
ADAPTER_BYTES = 16  # float32 weight, gradient and Adam's two moments
TEACHER_TOKENS = 16_384  # pgkd_peft.rows.TOKEN_BUDGET


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of one layer's linear maps."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.width, queries), (self.width, keys), (self.width, keys), (queries, self.width)]
        return [*attention, (self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(i * o for i, o in self.linears())

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.width * (1 if self.tied else 2)

    def lora_parameters(self, r: int) -> int:
        return self.layers * r * sum(i + o for i, o in self.linears())


QWEN3 = {  # config.json of the models
    "Qwen/Qwen3-1.7B": Shape(28, 2048, 6144, 16, 8, 128, 151_936, True),
    "Qwen/Qwen3-4B": Shape(36, 2560, 9728, 32, 8, 128, 151_936, True),
    "Qwen/Qwen3-8B": Shape(36, 4096, 12_288, 32, 8, 128, 151_936, False),
    "Qwen/Qwen3-14B": Shape(40, 5120, 17_408, 40, 8, 128, 151_936, False),
    "Qwen/Qwen3-32B": Shape(64, 5120, 25_600, 64, 8, 128, 151_936, False),
}


def estimate(shape: Shape, recipe: dict[str, Any], device_gib: float) -> dict[str, float]:
    """GiB by part for a GPU of `device_gib`; the merged copy is there where it takes less than half of what is free."""
    micro = recipe["per_device_train_batch_size"]
    rows = micro * recipe["gradient_accumulation_steps"]
    prompt, answer = recipe["max_length"], recipe["max_new_tokens"]
    teacher_prompt = prompt + recipe["max_privileged_length"]
    parts = {
        "base": shape.linear_parameters * NF4_BYTES + 2 * shape.embedding_parameters,
        "adapter": shape.lora_parameters(recipe["lora_r"]) * ADAPTER_BYTES,
    }
    copy = 2 * shape.linear_parameters
    engine = recipe.get("rollout_engine", "auto")
    if engine == "merged" or (engine == "auto" and copy < (device_gib * GIB - sum(parts.values())) / 2):
        parts["merged copy"] = copy
    one_layer = 10 * shape.width + 5 * shape.inner  # numbers that a layer keeps a token until it has its gradient
    largest_weight = 2 * max(i * o for i, o in shape.linears())  # dequantized for a product
    kept = rows * answer * shape.width * 2
    parts["rollout"] = (
        rows * (prompt + answer) * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2 + rows * shape.vocab * 4 * 3
    )
    tokens = max(TEACHER_TOKENS, teacher_prompt + answer)
    tokens = min(tokens, rows * (teacher_prompt + answer))
    parts["teacher"] = kept + tokens * (4 * shape.width + 3 * shape.inner) * 2 + largest_weight
    parts["student"] = (
        kept
        + micro * (prompt + answer) * (shape.layers * shape.width + one_layer) * 2
        + 2 * largest_weight
        + 6 * recipe.get("loss_chunk_mib", 64) * 2**20
    )
    parts = {name: value / GIB for name, value in parts.items()}
    phases = {name: parts.pop(name) for name in ("rollout", "teacher", "student")}
    largest = max(phases, key=phases.__getitem__)
    return {**parts, f"{largest} phase": phases[largest], "total": sum(parts.values()) + phases[largest]}


def in_words(parts: dict[str, float]) -> str:
    """As a recipe's header says it."""
    items = ", ".join(f"{name} {value:.1f}" for name, value in parts.items() if name != "total")
    return f"{parts['total']:.1f} GiB ({items})"


def of_recipe(path: Path) -> str | None:
    """What the recipe at `path` needs on the device that its name ends with; None for those of other models."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    shape = QWEN3.get(recipe["model_name_or_path"])
    if shape is None:
        return None
    device = {"t4": 14.6, "24gb": 23.5, "80gb": 79.0}[path.stem.rpartition("_")[2]]  # GiB that such a card can give
    return in_words(estimate(shape, recipe, device))


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(RECIPES.glob("*.yaml")):
        words = of_recipe(path)
        if words is not None:
            print(f"{path.stem}: at most {words}")
