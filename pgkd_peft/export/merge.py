"""Merge a trained adapter into a plain checkpoint, and measure that it is the model that was trained."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from safetensors import safe_open

from ..errors import ConfigError
from ..model.load import load_base
from ..run.checkpoint import publish as publish_folder
from ..run.folder import ADAPTER_FILE, CARD_FILE
from ..run.place import check_writable, make_readable, writing
from . import card as publish
from .adapter import AdapterRun, read_run, wrong_base
from .merge_report import MergeReport, merged_card, recommend, survived
from .merged_weights import BASES, MergedWeights
from .next_steps import after_merge, next_lines
from .rounding import Surviving
from .verify import MAX_NEW_TOKENS, Prompts, Score, TrainedModel, read_prompts
from .write import DTYPES, read_tokenizer, write_checkpoint

# Mean KL(trained || merged), nats/token, above which a merge onto the dequantized base has failed. Rounding to b bits
# of mantissa moves a weight by up to 2^-b of itself, and KL grows with the square of that. Measured on SmolLM2-135M
# with a trained adapter: 3e-8 in fp32 (24 bits), 2e-6 in fp16 (11 bits), 2e-3 in bf16 (8 bits; as much as the model's
# own 16-bit arithmetic). The limits leave room for other models; a wrong base, scale or layer gives 0.1 and more.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 1e-2}

REPORT_FILE = "merge_report.json"


class VerificationError(RuntimeError):
    """The merged model is not the model that was trained; the message has the numbers. (Exit code 1.)

    Attributes:
        report: what was measured until then.
    """

    def __init__(self, message: str, report: MergeReport | None = None):
        super().__init__(message)
        self.report = report


def merge_adapter(
    adapter: str,
    out: str,
    *,
    base: str = "dequantized",
    dtype: str = "bf16",
    prompts: str | None = None,
    tolerance: float | None = None,
    compare: bool = False,
    force: bool = False,
    push_to_hub: str | None = None,
    quantization: str | None = None,
    base_model: str | None = None,
    requantize: str | None = None,
    verify: bool = True,
    score: Score | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    trust_remote_code: bool = False,
    log: Callable[[str], None] = print,
) -> MergeReport:
    """Add the adapter to its base in float32, cast last, write a plain checkpoint to `out`, and measure it.

    Args:
        adapter: the run folder of a training, a checkpoint inside one, or a Hub id.
        out: directory to make. Until everything has passed, the work stands in `out` + ".partial", where a second call
            goes on from the shards that are finished.
        base: "dequantized": the values that training computed with, hence the function that was trained. "original":
            the weights as the base's files hold them; often better in absolute terms, but not what was trained.
        dtype: bf16, fp16 or fp32, of the result.
        prompts: file with a prompt a line to verify on. Default: the run's held-out ones, else a small neutral set.
        tolerance: limit on the mean KL(trained || merged), nats/token. Default: TOLERANCE[dtype] on the dequantized
            base. The original base differs by design: there it is the adapter's own effect on the same prompts, past
            which the merge lost more than training taught; on the neutral set, where that effect is small, none.
        compare: measure both bases, and recommend one.
        force: replace an `out` that an earlier merge wrote; allow `requantize`.
        push_to_hub: repository id to upload the result to.
        quantization, base_model: override what run.json and adapter_config.json say.
        requantize: "nf4" or "int8": store the result quantized again. Refused without `force`, with the numbers.
        verify: measure fidelity (loads the trained and then the merged model).
        score: task score of (model, tokenizer), taken of the trained model and of each merged one.

    Raises:
        VerificationError: above tolerance, or no different from the base.
        PGKDError: a mistake in the arguments or the files.
    """
    started = time.time()
    check_flags(tolerance, base=(base, BASES), dtype=(dtype, DTYPES), requantize=(requantize, ("nf4", "int8", None)))
    target = _free_target(Path(out).resolve(), force)
    check_writable(target, "--out")
    run = read_run(adapter, quantization=quantization, base_model=base_model, log=log)
    rows = read_prompts(run, prompts) if verify else None
    tokenizer = read_tokenizer(run, trust_remote_code=trust_remote_code) if verify else None
    _refuse_zero_adapter(run)
    report = MergeReport(
        out=str(target),
        adapter=str(run.folder),
        base_model=publish.hub_id(run) or run.base.name,
        base=base,
        dtype=dtype,
        quantization=run.quantization,
        assumed=list(run.assumed),
        requantized=requantize,
        command=shlex.join(["pgkd", "merge", adapter, "--out", out, "--base", base, "--dtype", dtype]),
        versions={name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    )
    log(f"Merging {run.folder} into {run.base_name} ({run.quantization} in training): {base} base, {dtype}")
    weights = MergedWeights(run, base=base, trust_remote_code=trust_remote_code)
    report.untied = weights.untied
    folder = target.with_name(target.name + ".partial")
    with writing(target, "--out"):
        survived = write_checkpoint(weights, folder, dtype, log=log)
    try:
        _enter_survived(report, *survived, log)
        if requantize is not None:
            with writing(target, "--out"):
                folder = _requantize(report, folder, requantize, force, trust_remote_code)
    except (VerificationError, ConfigError):
        shutil.rmtree(folder)  # refused for good: nothing there is worth keeping
        raise
    if rows is not None and tokenizer is not None:
        with TrainedModel(
            run,
            tokenizer,
            rows,
            max_new_tokens=max_new_tokens,
            score=score,
            trust_remote_code=trust_remote_code,
        ) as trained:
            _measure(report, trained, folder, log)
            if compare and not run.prequantized:
                _measure_other(report, trained, folder, trust_remote_code, log)
        _judge(report, rows, tolerance, log)
    report.seconds = time.time() - started
    with writing(target, "--out"):
        (folder / CARD_FILE).write_text(merged_card(report, run), encoding="utf-8")
        (folder / REPORT_FILE).write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if report.passed is False:
        raise VerificationError(_failure(report, run, folder), report)
    with writing(target, "--out"):
        _publish(folder, target)
    log(f"Wrote {target}")
    if push_to_hub:
        log(f"Pushed to {publish.push(target, push_to_hub)}")
    log(next_lines(after_merge(target)))
    return report


def check_flags(tolerance: float | None, **choices: tuple[str | None, Iterable[str | None]]) -> None:
    """Raises ConfigError for a tolerance that nothing can pass, and for a flag (flag -> value, accepted values)."""
    for flag, (value, accepted) in choices.items():
        if value not in accepted:
            raise ConfigError(
                f"--{flag.replace('_', '-')} is {value!r}; accepted are {', '.join(filter(None, accepted))}"
            )
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise ConfigError(f"--tolerance is {tolerance}; give a KL in nats/token above 0")


def _free_target(target: Path, force: bool) -> Path:
    if target.is_file():
        raise ConfigError(f"--out {target} is a file; give a directory that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        ours = (target / REPORT_FILE).is_file()
        if not (ours and force):
            hint = "--force replaces it" if ours else "nothing here says that a merge wrote it"
            raise ConfigError(f"--out {target} exists already ({hint}); give another directory")
    return target


def _refuse_zero_adapter(run: AdapterRun) -> None:
    """A LoRA starts with B = 0 (of an embedding: A = 0); one that never trained adds nothing. (Other kinds are found
    out after the merge.)"""
    with safe_open(run.folder / ADAPTER_FILE, "pt") as file:
        names = [name for name in file.keys() if "lora_A" not in name and "lora_embedding_B" not in name]  # noqa: SIM118
        if names and not any(file.get_tensor(name).any() for name in names):
            raise VerificationError(
                f"the adapter in {run.folder} is all zeros, so the merged model would be its base. Did training run, "
                "and was this adapter saved after it?"
            )


def _enter_survived(report: MergeReport, cast: Surviving, four_bit: Surviving, log: Callable[[str], None]) -> None:
    report.surviving_share, report.rounding_noise = cast.share, cast.noise
    report.four_bit_share, report.four_bit_noise = four_bit.share, four_bit.noise
    if cast.changed == 0:
        why = (
            "what the adapter adds is smaller than the rounding. Use --dtype fp32."
            if report.dtype != "fp32"
            else "the adapter adds nothing to it. Did training run, and was this adapter saved after it?"
        )
        raise VerificationError(f"in {report.dtype} the merged weights are identical to the base's: {why}", report)
    log(f"Of what the adapter adds, {survived(cast.share, cast.noise)} survives the cast to {report.dtype}.")
    if four_bit.elements:
        log(f"Merged into 4-bit weights, {survived(four_bit.share, four_bit.noise)} would have survived.")


def _requantize(report: MergeReport, folder: Path, kind: str, force: bool, trust_remote_code: bool) -> Path:
    """Store the merged model quantized again, beside `folder`; refused unless forced."""
    if not force:
        raise ConfigError(
            f"--requantize {kind} is refused: it does not keep the model that was trained. In 4 bits, "
            f"{survived(report.four_bit_share, report.four_bit_noise)} of the adapter's change would survive. Keep the "
            "16-bit model, or base and adapter apart (in 4 bits that is what was trained). --force does it all the "
            "same, and measures the result."
        )
    quantized = folder.with_name(f"{folder.name}-{kind}")
    how = {"dtype": DTYPES[report.dtype], "trust_remote_code": trust_remote_code}
    load_base(str(folder), quantization=kind, **how).save_pretrained(quantized)
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and not (quantized / path.name).exists() and "index" not in path.name:
            shutil.copyfile(path, quantized / path.name)
    return quantized


def _measure(report: MergeReport, trained: TrainedModel, folder: Path, log: Callable[[str], None]) -> None:
    report.prompts = trained.prompts.source
    report.arithmetic_floor, report.adapter_effect = trained.arithmetic_floor, trained.adapter_effect
    report.base_matches_training = trained.base_matches
    report.trained = {"answer_nll": trained.answer_nll, "score": trained.score, "recovered": trained.recovered}
    _enter_fidelity(report, report.base, trained, folder, log)


def _enter_fidelity(
    report: MergeReport, base: str, trained: TrainedModel, folder: Path, log: Callable[[str], None]
) -> None:
    fidelity = trained.measure(folder)
    report.fidelity[base] = fidelity.as_dict()
    log(
        f"{base} base, {report.dtype}: KL(trained || merged) {fidelity.kl_mean:.2g} nats/token (99th percentile "
        f"{fidelity.kl_p99:.2g}, max {fidelity.kl_max:.2g}), top-1 agreement {fidelity.top1_agreement:.2%}, over "
        f"{fidelity.tokens} tokens of {fidelity.sequences} sequences from {trained.prompts.source}"
        f"{fidelity.against(trained)}"
    )


def _measure_other(
    report: MergeReport, trained: TrainedModel, folder: Path, trust_remote_code: bool, log: Callable[[str], None]
) -> None:
    """Merge onto the other base as well, only to measure it; and say which of the two to use."""
    other = next(base for base in BASES if base != report.base)
    scratch = folder.with_name(f"{folder.name}-{other}")
    try:
        write_checkpoint(
            MergedWeights(trained.run, base=other, trust_remote_code=trust_remote_code), scratch, report.dtype
        )
        _enter_fidelity(report, other, trained, scratch, log)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report.recommendation = recommend(report)
    log(f"Recommendation: {report.recommendation}")


def _judge(report: MergeReport, prompts: Prompts, tolerance: float | None, log: Callable[[str], None]) -> None:
    if tolerance is None and report.requantized is None:
        if report.base == "dequantized":
            tolerance = TOLERANCE[report.dtype]
        elif not prompts.neutral:
            tolerance = report.adapter_effect
    report.tolerance = tolerance
    if report.base_matches_training is False:
        report.passed = False
        return
    if tolerance is None:
        log("No tolerance is enforced here; give one with --tolerance.")
        return
    kl = report.fidelity[report.base]["kl_mean"]
    report.passed = math.isfinite(kl) and kl <= tolerance
    log(
        f"{'Passed' if report.passed else 'FAILED'}: tolerance {tolerance:.2g} nats/token. For scale: the adapter "
        f"moves its base by {report.adapter_effect:.2g}, 16-bit arithmetic moves the trained model by "
        f"{report.arithmetic_floor:.2g}."
    )


def _failure(report: MergeReport, run: AdapterRun, folder: Path) -> str:
    if report.base_matches_training is False:
        return f"{wrong_base(run)} The result stays in {folder}."
    kl = report.fidelity[report.base]["kl_mean"]
    if report.base == "original":
        reason = "The original weights are not those that the adapter was trained on; --base dequantized is."
    elif report.dtype != "fp32":
        reason = (
            "If --dtype fp16 (finer than bf16) or fp32 passes, it is the rounding; if not, the base or the way it was "
            "quantized is not what training used."
        )
    else:
        reason = "The base, or the way it was quantized, is not what training used: see run.json and --quantization."
    return (
        f"the merged model is not the model that was trained: KL {kl:.2g} nats/token on {report.prompts}, tolerance "
        f"{report.tolerance:.2g}. {reason} The result stays in {folder}; a larger --tolerance accepts it without "
        "merging again."
    )


def _publish(folder: Path, target: Path) -> None:
    """Give the finished folder its name, and remove what else this merge left; killed in between, the next call goes
    on with it."""
    make_readable(folder)
    publish_folder(folder, target)
    for path in target.glob("merge_state.*"):
        path.unlink()
    shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
