"""The proof that rollouts come from the student: the server's log-probabilities against the student's own pass.

A server can answer from the base, or from an earlier adapter, without a word (a LoRA slot that is zeroed and not filled
again; an adapter that is switched off; prefixes that were read with other weights). Training on such rollouts looks
healthy. The log-probability that it gives a token it has sampled says which weights sampled it, and the student's own
forward gives that token's log-probability anyway.

Shapes: N completion tokens that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import PrivilegedGKDConfig
from ..errors import PGKDError
from ..rows import Row
from .server import RolloutServerError, Sampling
from .servers import RolloutServers

START_TOKENS = 32  # of each completion that measures, before training, how alike the two bases are
START_PROMPTS = 8
MOST_AT_START = 0.5  # nats a token; two roundings of one model are nearer, two models are not
# A step is refused beyond TIMES what the bases differ by (rounding; a base that is quantized here and not there), and
# not below LEAST: LoRA's own products round as well.
TIMES, LEAST = 3.0, 0.05
ROWS_ASKED = 16  # rows that are read once more to find the cause

Reader = Callable[[str, Sequence[Row], float], Tensor]
"""Log-probabilities (N,) of the rows' completion tokens by the student ("shared") or its base ("disabled"), at a
temperature; in eval mode, without gradient."""


class RolloutMismatchError(PGKDError):
    """The rollouts of a step were not written by the student's weights; the message names the likely cause."""


@dataclass
class Proof:
    """Of one run.

    Attributes:
        tolerance: mean difference in nats a token that a step may have.
        floor: what the two bases differed by before training.
        in_passing: the student's training pass gives what is compared: it has no dropout, and its loss is at
            temperature 1. Otherwise the rows are read once more.
        sums: (servers, 2) the sum of the differences and their number since the last look, on the device. One server
            of many must not hide in the mean.
        urls: of the servers.
    """

    tolerance: float
    floor: float
    in_passing: bool
    sums: Tensor
    urls: Sequence[str]

    def add(self, rows: Sequence[Row], own_N: Tensor, *, kept: bool) -> dict[str, Tensor | float]:
        """Compare what the student gives `rows` (their kept tokens, or all) with what the servers gave.

        Returns:
            What is logged: the sum of the differences, and their number.
        """
        values = [value for row in rows for value in _given(row, kept)]
        given_N = torch.tensor(values, dtype=torch.float64, device=own_N.device)
        difference_N = (given_N - own_N.detach().double()).abs()
        there = difference_N == difference_N  # NaN: a token that no server has written
        sums_N2 = torch.stack([difference_N.nan_to_num(0.0), there.double()], dim=1)
        places = [row.server for row in rows for _ in _given(row, kept)]
        self.sums.index_add_(0, torch.tensor(places, dtype=torch.long, device=own_N.device), sums_N2)
        return {"rollout_mismatch": sums_N2[:, 0].sum(), "proven_tokens": there.sum()}

    def take(self) -> Tensor:
        """The sums since the last look, which begin anew."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums

    def refuses(self, sums: Sequence[Sequence[float]]) -> int | None:
        """The server that is furthest beyond the tolerance, by the sums of all ranks; None when none is."""
        means = {place: total / count for place, (total, count) in enumerate(sums) if count}
        beyond = {place: mean for place, mean in means.items() if not mean <= self.tolerance}
        return max(beyond, key=lambda place: beyond[place]) if beyond else None

    def failed(self, place: int, mean: float, rows: Sequence[Row], read: Reader, temperature: float) -> Exception:
        """The error that says how far off the rollouts of a server are, and why."""
        rows = [row for row in rows if row.logprobs is not None and row.server == place][:ROWS_ASKED]
        cause = likely_cause(rows, read, temperature, self.tolerance) if rows else "They were written on another rank."
        return RolloutMismatchError(
            f"the rollouts that {self.urls[place]} wrote for this step are not the student's: their log-probabilities "
            f"there are {mean:.3f} nats a token off those of the student (accepted are {self.tolerance:.3f}; the bases "
            f"alone differ by {self.floor:.3f}). {cause} This step has not changed the weights; when the cause is "
            "mended, go on from the last checkpoint (--resume)."
        )


def _given(row: Row, kept: bool) -> Sequence[float]:
    tokens = len(row.kept) if kept else len(row.completion)
    if row.logprobs is None:
        return [math.nan] * tokens
    return row.logprobs[row.keep] if kept else row.logprobs


def likely_cause(rows: Sequence[Row], read: Reader, temperature: float, tolerance: float) -> str:
    """Whose log-probabilities the server's are, in a sentence."""
    given_N = torch.tensor([value for row in rows for value in row.logprobs or ()], dtype=torch.float64)

    def distance(which: str, at: float = 1.0) -> float:
        return float((given_N - read(which, rows, at)).abs().mean())

    student, base = distance("shared"), distance("disabled")
    if base < min(student, tolerance):
        return (
            f"They are the base's own (to {base:.3f}): the server holds the adapter and does not apply it. Is its LoRA "
            "switched off, or its slot empty (unsloth#8701)? Start the server anew."
        )
    if temperature not in (0.0, 1.0) and distance("shared", temperature) < min(student, tolerance):
        return (
            f"They are the student's at temperature {temperature:g}: the server gives log-probabilities after "
            "sampling's changes. Start it with --logprobs-mode raw_logprobs."
        )
    if student <= tolerance:
        return (
            "A second reading of the same rows agrees with the server, so it is the student's training pass that is "
            "off: dropout, or a precision of its own (autocast)?"
        )
    return (
        f"They are neither the student's ({student:.3f} off) nor the base's ({base:.3f} off): an earlier adapter or "
        "prefixes read with one (start the server anew), or weights that are held otherwise than here (quantized)."
    )


def begin(
    servers: RolloutServers,
    rows: Sequence[Row],
    read: Reader,
    args: PrivilegedGKDConfig,
    student: nn.Module,
    stop_ids: Sequence[int],
) -> Proof:
    """Measure, before training, how far apart the servers' base and ours are, and set the tolerance by it.

    Args:
        rows: of the data; a few of their prompts are completed by the servers' base.

    Raises:
        RolloutServerError: the servers hold another base.
    """
    sampling = Sampling(1.0, START_TOKENS, frozenset(stop_ids))
    most = max(START_PROMPTS, len(servers.servers))
    asked = [rows[i % len(rows)] for i in range(most)]
    written = servers.write([row.prompt for row in asked], list(range(most)), sampling, base=True)
    made = [row.answered(each.ids, stop_ids, logprobs=each.logprobs) for row, each in zip(asked, written)]
    own_N = read("disabled", made, 1.0)
    floor, worst = 0.0, 0
    given_N = torch.tensor([value for each in written for value in each.logprobs], dtype=torch.float64)
    places_N = torch.tensor([each.server for each in written for _ in each.ids])
    for place in range(len(servers.servers)):
        difference = float((given_N - own_N)[places_N == place].abs().mean())
        if not difference <= floor:
            floor, worst = difference, place
    floor = float(servers.accelerator.gather(torch.tensor([floor], device=args.device)).max())
    if not floor <= MOST_AT_START:
        server = servers.servers[worst]
        raise RolloutServerError(
            f"{server.url} serves {server.base!r}, which is not the base that trains: without any adapter its log-"
            f"probabilities are {floor:.2f} nats a token off (rounding and quantization make less than "
            f"{MOST_AT_START}). Serve the same model."
        )
    servers.under_way = True
    given = args.rollout_mismatch_tolerance
    return Proof(
        tolerance=given if given is not None else max(LEAST, TIMES * floor),
        floor=floor,
        in_passing=args.loss_temperature == 1.0 and not drops_out(student),
        sums=torch.zeros(len(servers.servers), 2, dtype=torch.float64, device=args.device),
        urls=[server.url for server in servers.servers],
    )


def drops_out(model: nn.Module) -> bool:
    """Whether the model has dropout in training, so that its training pass is not what a server computes."""
    config = getattr(model, "config", None)
    return getattr(config, "attention_dropout", 0) > 0 or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )
