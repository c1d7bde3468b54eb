"""A moving average of the student's LoRA products, held as a second adapter of the same model.

What is averaged is the product ``s * B @ A`` that a layer adds to its weight: EMA(B) @ EMA(A) is not EMA(B @ A). The
product is never formed: the average is held as factors Q @ C of rank R = ``RANK_FACTOR`` * r, Q's columns orthonormal,
and one update is

    s * B = Q X + N Y                                         N: the r directions that Q lacks; QR of (O, r)
    [Q, N] @ [d * C + (1 - d) * X A; (1 - d) * Y A]           exact, of rank R + r
    Q, C <- [Q, N] U, U^T [...]                               U: the R largest eigenvectors of the lower factor's Gram

which is the best approximation of rank R (Eckart-Young). While the true rank is at most R nothing is lost; afterwards
the share of squared singular values that was cut off is reported. The average starts at the starting adapter's product.

Layers of one shape are handled together; the host waits for a GPU once a group, where the eigendecomposition looks
whether it has converged, and not for the reported share. The cost is that of matrix products and of one
eigendecomposition of (R + r, R + r) in float64 a layer; the adapter that holds the average takes `RANK_FACTOR` times
the student's memory, and as much more time in the teacher's LoRA products.

Shapes: L layers of one shape, O outputs, I inputs of a layer, r rank of the student's adapter, R rank of the average.
"""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..errors import ConfigError
from .adapters import STUDENT, add_frozen_adapter, switchable_layers

EMA = "ema"
RANK_FACTOR = 4
GROUP_BYTES = 2**28  # of the factors of layers that are handled together


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
        shapes = defaultdict(list)
        for layer in layers:
            shapes[layer.lora_A[STUDENT].weight.shape, layer.lora_B[STUDENT].weight.shape].append(layer)
        self.groups: list[list[LoraLayer]] = []
        for same in shapes.values():
            size = config.r * (same[0].in_features + same[0].out_features) * 4
            most = max(1, GROUP_BYTES // size)
            self.groups += [same[i : i + most] for i in range(0, len(same), most)]
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Set the average to the student's current product, exactly."""
        for layers in self.groups:
            left, right = _factors(layers)
            rank = layers[0].r[EMA]
            padded = torch.nn.functional.pad(left, (0, rank - left.shape[-1]))
            basis, size = torch.linalg.qr(padded)  # orthonormal also where the product's rank is lower
            _store(layers, basis, size[..., : left.shape[-1]] @ right)

    @torch.no_grad()
    def update(self) -> torch.Tensor:
        """One step of the average.

        Returns:
            The share of the average's squared Frobenius norm that was cut off, over all layers; on the device.
        """
        lost, total = [], []
        for layers in self.groups:
            left, right = _factors(layers)  # (L, O, r), (L, r, I)
            width = min(layers[0].r[EMA], layers[0].out_features)  # there are no more orthonormal columns than O
            basis = torch.stack([layer.lora_B[EMA].weight[:, :width] for layer in layers]).float()
            core = torch.stack([layer.lora_A[EMA].weight[:width] for layer in layers]).float()
            inside = basis.mT @ left
            rest = left - basis @ inside
            again = basis.mT @ rest  # a second time, or rounding leaves the new directions askew
            rest -= basis @ again
            core = self.decay * core + (1 - self.decay) * ((inside + again) @ right)
            if width < layers[0].out_features:
                new, size = torch.linalg.qr(rest)
                basis = torch.cat([basis, new], dim=-1)
                core = torch.cat([core, (1 - self.decay) * (size @ right)], dim=-2)
            basis, core, energy = cut(basis, core, width)
            _store(layers, basis, core)
            total.append(energy.sum())
            lost.append(energy[:, width:].sum())
        smallest = torch.finfo(torch.float64).tiny  # an average of nothing has lost nothing
        return torch.stack(lost).sum() / torch.stack(total).sum().clamp(min=smallest)


def cut(basis: torch.Tensor, core: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best approximation of ``basis @ core`` of rank `rank`, without forming it.

    Args:
        basis: (L, O, k), orthonormal columns. core: (L, k, I).

    Returns:
        Factors (L, O, rank), orthonormal again, and (L, rank, I); all squared singular values (L, k), falling, float64.
    """
    wide = core.double()  # squared, in float32 all below 3e-4 of the largest singular value would be noise
    energy, vectors = torch.linalg.eigh(wide @ wide.mT)
    kept = vectors[..., -rank:].flip(-1).to(core.dtype)
    return basis @ kept, kept.mT @ core, energy.clamp(min=0).flip(-1)


def _store(layers: list[LoraLayer], basis: torch.Tensor, core: torch.Tensor) -> None:
    """Write the factors (L, O, k), (L, k, I) into the adapter, whose rank may be larger."""
    for layer, q, c in zip(layers, basis, core):
        b, a = layer.lora_B[EMA].weight, layer.lora_A[EMA].weight
        b.zero_()[:, : q.shape[1]] = q
        a.zero_()[: c.shape[0]] = c


def _factors(layers: list[LoraLayer]) -> tuple[torch.Tensor, torch.Tensor]:
    """The student's products as factors in float32: s*B (L, O, r) and A (L, r, I)."""
    left = [layer.scaling[STUDENT] * layer.lora_B[STUDENT].weight.float() for layer in layers]
    return torch.stack(left), torch.stack([layer.lora_A[STUDENT].weight.float() for layer in layers])


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
