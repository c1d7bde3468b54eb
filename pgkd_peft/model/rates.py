"""The learning rate of a LoRA that nobody gave one."""

from __future__ import annotations


def lora_learning_rate(hidden_size: int) -> float:
    """5e-5 * 10 * (2000 / hidden_size)^0.781: ten times a rate of full fine-tuning, falling with the model's width.

    Source: `hyperparam_utils` of tinker-cookbook, its exponent for Llama shapes. It gives 1.3e-3 at 576 and 2.9e-4 at
    4,096. Measured there with Adam; this project's recipe for a width of 576, found by hand, has 2e-3.

    Raises:
        ValueError: `hidden_size` is less than 1.
    """
    if hidden_size < 1:
        raise ValueError(f"hidden_size is {hidden_size}; it must be 1 or more")
    return 5e-5 * 10 * (2000 / hidden_size) ** 0.781
