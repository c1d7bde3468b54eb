"""A moving average of the student's LoRA products, held as a second adapter of the same model.

What is averaged is the product ``s * B @ A`` that a layer adds to its weight: EMA(B) @ EMA(A) is not EMA(B @ A). The
product is never formed: the average is held as factors of rank R = ``RANK_FACTOR`` * r, and one update is

    [d * B_ema, (1 - d) * s * B] @ [A_ema; A]        exact, of rank R + r
    = Q_left (R_left R_right^T) Q_right^T            QR of both factors
    = U S V^T                                        SVD of the small core

of which the R largest singular values are kept. While the true rank is at most R nothing is lost; afterwards the share
of squared singular values that was cut off is reported. The average starts at the starting adapter's product.

Shapes: O outputs, I inputs of a layer, r rank of the student's adapter, R rank of the average.
"""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..errors import ConfigError
from .adapters import STUDENT, add_frozen_adapter, switchable_layers

EMA = "ema"
RANK_FACTOR = 4


class ProductAverage:
    """Keeps the adapter ``ema`` of `model` at decay * average + (1 - decay) * student, in products.

    Args:
        model: a PeftModel whose adapter ``default`` trains.
        decay: weight of the old average in an update, in [0, 1).

    Raises:
        ConfigError: the adapter is more than a sum of products B @ A on linear layers.
    """

    def __init__(self, model: PeftModel, decay: float):
        reason = not_a_product(model)
        if reason:
            raise ConfigError(
                f"teacher_adapter='ema' averages products B @ A, but {reason}. Use a plain LoRA on linear layers, or "
                "teacher_adapter='initial' or 'shared'."
            )
        self.decay = decay
        config = copy.deepcopy(model.peft_config[STUDENT])
        layers: list[LoraLayer] = [m for m in model.modules() if isinstance(m, LoraLayer) and STUDENT in m.lora_A]
        config.r = config.lora_alpha = RANK_FACTOR * max(layer.r[STUDENT] for layer in layers)
        config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
        add_frozen_adapter(model, EMA, config)
        self.layers = layers
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Set the average to the student's current product, exactly."""
        for layer in self.layers:
            left, right = _factors(layer)
            b, a = layer.lora_B[EMA].weight, layer.lora_A[EMA].weight
            b.zero_()
            a.zero_()
            b[:, : left.shape[1]] = left
            a[: right.shape[0]] = right

    @torch.no_grad()
    def update(self) -> float:
        """One step of the average.

        Returns:
            The share of the average's squared Frobenius norm that was cut off, over all layers.
        """
        lost = total = torch.zeros((), dtype=torch.float64)
        for layer in self.layers:
            b, a = layer.lora_B[EMA].weight, layer.lora_A[EMA].weight
            left, right = _factors(layer)
            left = torch.cat([self.decay * b.float(), (1 - self.decay) * left], dim=1)  # (O, R + r)
            right = torch.cat([a.float(), right], dim=0)  # (R + r, I)
            new_b, new_a, values = truncate(left, right, a.shape[0])
            b.copy_(new_b)
            a.copy_(new_a)
            energy = values.double().square()
            total = total + energy.sum().cpu()
            lost = lost + energy[a.shape[0] :].sum().cpu()
        return float(lost / total) if total > 0 else 0.0


def truncate(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best rank-`rank` approximation of ``left @ right`` without forming it.

    Args:
        left: (O, k). right: (k, I).

    Returns:
        Factors (O, rank) and (rank, I), zero beyond the true rank, and all singular values.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    root = values[:rank].sqrt()
    new_left = left.new_zeros(left.shape[0], rank)
    new_right = right.new_zeros(rank, right.shape[1])
    new_left[:, : len(root)] = q_left @ (u[:, :rank] * root)
    new_right[: len(root)] = (root[:, None] * v[:rank]) @ q_right.T
    return new_left, new_right, values


def _factors(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's product as factors in float32: s*B (O, r) and A (r, I)."""
    return layer.scaling[STUDENT] * layer.lora_B[STUDENT].weight.float(), layer.lora_A[STUDENT].weight.float()


def not_a_product(model: PeftModel) -> str | None:
    """Why the student's adapter is more than products B @ A on linear layers, or None."""
    config = model.peft_config[STUDENT]
    if config.bias != "none":
        return f"bias={config.bias!r} trains biases as well"
    if getattr(config, "use_dora", False):
        return "DoRA (use_dora=True) rescales the weights as well"
    if getattr(config, "lora_bias", False):
        return "lora_bias=True adds a bias to B"
    for layer in switchable_layers(model):
        if not isinstance(layer, LoraLayer):
            return "whole modules or tokens are trained (modules_to_save, trainable_token_indices)"
        if STUDENT in getattr(layer, "lora_variant", {}):
            return f"the adapter is a {type(layer.lora_variant[STUDENT]).__name__}"
        if STUDENT not in layer.lora_A or layer.lora_A[STUDENT].weight.dim() != 2:
            return f"LoRA sits on a {type(layer.get_base_layer()).__name__}, which is no linear layer"
    return None
