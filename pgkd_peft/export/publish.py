"""Hand a trained adapter to others: cleaned for publication, or as GGUF for llama.cpp and Ollama."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GgufConfig

from ..errors import ConfigError, ModelError
from ..run.card import is_hub_id
from ..run.folder import ADAPTER_CONFIG, ADAPTER_FILE, CARD_FILE, TOKENIZER_FILE
from ..run.jsonl import write_whole
from ..run.place import check_writable, make_readable, writing
from . import card as publish
from .adapter import AdapterRun, check_base, load_trained, read_run, wrong_base
from .gguf import TYPES, GGUFSummary, write_gguf_lora, write_gguf_model
from .kquants import K_QUANTS, compare_files, quantize, quantizer
from .merge import TOLERANCE, VerificationError, check_flags
from .merged_weights import BASES, MergedWeights
from .modelfile import MODELFILE, modelfile
from .next_steps import after_gguf, after_gguf_lora, after_peft, next_lines
from .verify import Fidelity, Prompts, Score, TrainedModel, read_prompts
from .write import copy_tokenizer, read_tokenizer

FORMATS = ("peft", "gguf-lora", "gguf")
GGUF_TYPES = (*TYPES, *K_QUANTS)

# As merge.TOLERANCE, for GGUF types. q8_0 keeps about 8 bits a weight, one scale for 32 of them.
GGUF_TOLERANCE = {"f32": TOLERANCE["fp32"], "f16": TOLERANCE["fp16"], "q8_0": 2e-2, "q5_k_m": 5e-2, "q4_k_m": 1e-1}


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        bytes: of the GGUF file.
        rounding: of GGUF: |stored - exact| / |exact| over all tensors.
        types: of a K-quant: how many matrices stand in which type.
        fidelity: of a merged GGUF: how far what Transformers reads from the file is from the trained model.
        trained: answer_nll, score and recovered of the trained model itself.
        tolerance: limit on fidelity["kl_mean"], nats/token.
    """

    out: str
    format: str
    base_model: str
    files: list[str]
    bytes: int | None = None
    rounding: float | None = None
    types: dict[str, int] | None = None
    trained: dict[str, float | None] = field(default_factory=dict)
    fidelity: dict[str, Any] | None = None
    tolerance: float | None = None
    assumed: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_adapter(
    adapter: str,
    out: str,
    *,
    format: str = "peft",
    gguf_type: str = "f16",
    base: str = "dequantized",
    base_id: str | None = None,
    prompts: str | None = None,
    tolerance: float | None = None,
    verify: bool = True,
    quantization: str | None = None,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    score: Score | None = None,
    trust_remote_code: bool = False,
    log: Callable[[str], None] = print,
) -> ExportReport:
    """Write the adapter in a form that others can use.

    Args:
        adapter: the run folder of a training, a checkpoint inside one, or a Hub id.
        out: for "peft" a directory to make; for the GGUF formats a file to make, ending in .gguf.
        format: "peft": adapter, tokenizer and model card, without local paths. "gguf-lora": the adapter for
            llama.cpp's --lora. "gguf": the merged model, and an Ollama Modelfile beside it.
        gguf_type: f16, q8_0, f32, or q4_k_m, q5_k_m (by llama.cpp's own quantizer), of "gguf".
        base: dequantized or original, of "gguf" (see merge_adapter).
        base_id: the base's Hub id, for a base that is only a local directory.
        prompts, tolerance: of "gguf": as in merge_adapter; the file is read by Transformers and compared.
        verify: that, and that the base is, by run.json's digest, the one that was trained on.
        quantization, base_model: override what run.json and adapter_config.json say.
        push_to_hub: repository id to upload the result to.
        score: of "gguf": task score of (model, tokenizer), taken of the trained model and of what the file holds.

    Raises:
        VerificationError: the merged GGUF is not the model that was trained.
        PGKDError: a mistake in the arguments or the files, or a model that the format cannot hold.
    """
    target = Path(out)
    _check_asked(target, out, format, gguf_type, base, base_id, tolerance)
    run = read_run(adapter, quantization=quantization, base_model=base_model, log=log)
    identity = base_id or publish.hub_id(run)
    if format == "peft" and identity is None:
        raise ConfigError(
            f"the base of this adapter is the local directory {run.base_name}, which nobody else has. Give the id "
            "under which others find it with --base-id ORG/NAME."
        )
    if verify and format != "gguf":  # which loads the trained model anyway
        check_base(load_trained(run, trust_remote_code=trust_remote_code), run)
    report = ExportReport(out, format, identity or run.base.name, [], assumed=list(run.assumed))
    if format == "peft":
        assert identity is not None
        with writing(target, "--out"):
            _export_peft(run, target, identity)
        commands = after_peft(target, identity, run)
    else:
        weights = MergedWeights(run, base=base, trust_remote_code=trust_remote_code)
        if format == "gguf-lora":
            with writing(target, "--out"):
                summary = write_gguf_lora(weights, target, name=_own_name(report.base_model, run))
            log(
                f"Fits a GGUF of {report.base_model}. It was trained on that base in {run.quantization}; on another "
                "quantization of it the answers differ a little."
            )
            commands = after_gguf_lora(target)
        else:
            rows = read_prompts(run, prompts) if verify else None
            summary = _export_gguf(report, weights, target, gguf_type, rows, tolerance, score, trust_remote_code, log)
            commands = after_gguf(target, _write_modelfile(weights, target, trust_remote_code, log), run)
        report.rounding, report.bytes, report.types = summary.rounding, summary.bytes, summary.types
    make_readable(target)
    report.files = sorted(p.name for p in target.iterdir()) if target.is_dir() else [target.name]
    log(f"Wrote {target}: {', '.join(report.files)}")
    if push_to_hub:
        log(f"Pushed to {publish.push(target, push_to_hub)}")
    log(next_lines(commands))
    return report


def _check_asked(
    target: Path, out: str, format: str, gguf_type: str, base: str, base_id: str | None, tolerance: float | None
) -> None:
    """What can be known to be wrong before anything is read."""
    check_flags(tolerance, format=(format, FORMATS), gguf_type=(gguf_type, GGUF_TYPES), base=(base, BASES))
    if base_id is not None and not is_hub_id(base_id):
        raise ConfigError(f"--base-id is {base_id!r}, which is no Hub id; give ORG/NAME.")
    if format != "peft" and target.suffix != ".gguf":
        raise ConfigError(f"--out {out} must end in .gguf for --format {format}: it is a file")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ConfigError(f"--out {out} exists already; give another")
    check_writable(target, "--out")
    if format == "gguf" and gguf_type in K_QUANTS:
        quantizer()


def _own_name(base: str, run: AdapterRun) -> str:
    """general.name: the base's and the run's, which llama.cpp and its front ends show."""
    folder = run.run_folder or run.folder
    own = folder.name if folder == run.folder else f"{folder.name}-{run.folder.name}"
    return f"{base.rsplit('/', 1)[-1]} {own}"


def _write_modelfile(weights: MergedWeights, target: Path, trust_remote_code: bool, log: Callable[[str], None]) -> Path:
    """The Ollama Modelfile beside the GGUF file; never in place of another file's."""
    path = target.with_name(MODELFILE)
    if path.exists() and f"FROM ./{target.name}\n" not in path.read_text(encoding="utf-8", errors="replace"):
        path = target.with_suffix(f".{MODELFILE}")
    text, missing = modelfile(
        target.name, read_tokenizer(weights.run, trust_remote_code=trust_remote_code), weights.run.base
    )
    with writing(path, "--out"):
        write_whole(path, text)
        make_readable(path)
    log(f"Wrote {path}, for Ollama" + "".join(f"; {sentence}" for sentence in missing))
    return path


def _export_peft(run: AdapterRun, target: Path, identity: str) -> None:
    """Adapter, config, tokenizer and card in a new directory; nothing in it knows this machine."""
    staging = target.with_name(f".saving-{target.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        tensors = load_file(run.folder / ADAPTER_FILE)
        save_file(tensors, staging / ADAPTER_FILE, metadata={"format": "pt"})
        config = {**run.adapter_config, "base_model_name_or_path": identity, "inference_mode": True}
        if identity != run.base_name:
            config["revision"] = None  # it was that of another source
        (staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_tokenizer(run, staging)
        (staging / CARD_FILE).write_text(publish.adapter_card(run, identity), encoding="utf-8")
        saved = load_file(staging / ADAPTER_FILE)
        assert saved.keys() == tensors.keys()
        assert all(torch.equal(saved[key], tensor) for key, tensor in tensors.items())
        for path in staging.glob("*.json"):
            _refuse_local_paths(json.loads(path.read_text(encoding="utf-8")), path)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_local_paths(content: Any, path: Path, key: str = "") -> None:
    """Raises ModelError when a setting in a file to be published is an absolute path."""
    if isinstance(content, dict) and path.name != TOKENIZER_FILE:
        for name, value in content.items():
            _refuse_local_paths(value, path, name)
    elif isinstance(content, str) and len(content) > 1 and Path(content).is_absolute():
        raise ModelError(
            f"{path.name} has the local path {content!r} as {key!r}; remove it from the adapter's own files"
        )


def _export_gguf(
    report: ExportReport,
    weights: MergedWeights,
    target: Path,
    gguf_type: str,
    prompts: Prompts | None,
    tolerance: float | None,
    score: Score | None,
    trust_remote_code: bool,
    log: Callable[[str], None],
) -> GGUFSummary:
    """Write the merged model, let Transformers read the file, and compare what it read with the trained model."""
    run = weights.run
    tokenizer = read_tokenizer(run, trust_remote_code=trust_remote_code)
    unverified = target.with_suffix(".unverified.gguf")
    unverified.unlink(missing_ok=True)
    name = _own_name(report.base_model, run)
    with writing(target, "--out"):
        if gguf_type in K_QUANTS:
            summary = _quantized(weights, tokenizer, unverified, gguf_type, name, log)
        else:
            summary = write_gguf_model(weights, tokenizer, unverified, gguf_type, name=name, log=log)
    if prompts is not None:
        with TrainedModel(run, tokenizer, prompts, score=score, trust_remote_code=trust_remote_code) as trained:
            # With our own config: Transformers reads no head size and no scaled rotary frequencies from GGUF.
            weights.config.tie_word_embeddings = weights.config.tie_word_embeddings and not weights.untied
            fidelity = trained.measure(
                unverified.parent,
                config=weights.config,
                gguf_file=unverified.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
        if trained.base_matches is False:
            raise VerificationError(f"{wrong_base(run)} The file stays in {unverified}.")
        report.trained = {"answer_nll": trained.answer_nll, "score": trained.score, "recovered": trained.recovered}
        log(
            f"{gguf_type}, {weights.base} base: KL(trained || file) {fidelity.kl_mean:.2g} nats/token (max "
            f"{fidelity.kl_max:.2g}), top-1 agreement {fidelity.top1_agreement:.2%}, over {fidelity.tokens} tokens "
            f"from {prompts.source}{fidelity.against(trained)}"
        )
        _judge(report, fidelity, weights, unverified, gguf_type, tolerance)
    unverified.replace(target)
    return replace(summary, path=target)


def _quantized(
    weights: MergedWeights,
    tokenizer: Any,
    path: Path,
    gguf_type: str,
    name: str,
    log: Callable[[str], None],
) -> GGUFSummary:
    """The merged model in f16, as llama.cpp's own converter hands it on, and from that the K-quant."""
    source = path.with_suffix(".f16.gguf")
    source.unlink(missing_ok=True)
    try:
        written = write_gguf_model(weights, tokenizer, source, "f16", name=name)
        quantize(source, path, gguf_type)
        rounding, types = compare_files(source, path)
    finally:
        source.unlink(missing_ok=True)
    told = ", ".join(f"{number} in {kind}" for kind, number in types.items())
    size = path.stat().st_size
    log(f"{K_QUANTS[gguf_type]}: {size / 1e6:.1f} MB, after {written.bytes / 1e6:.1f} in f16; matrices: {told}")
    return GGUFSummary(path, written.tensors, size, rounding, types)


def _judge(
    report: ExportReport, fidelity: Fidelity, weights: MergedWeights, path: Path, gguf_type: str, given: float | None
) -> None:
    limit = GGUF_TOLERANCE[gguf_type] if weights.base == "dequantized" else None
    report.tolerance = limit if given is None else given
    report.fidelity = fidelity.as_dict()
    if report.tolerance is not None and not fidelity.kl_mean <= report.tolerance:
        raise VerificationError(
            f"{path} is not the model that was trained: KL {fidelity.kl_mean:.2g} nats/token, tolerance "
            f"{report.tolerance:.2g}. --tolerance accepts it; --gguf-type f16 is finer than {gguf_type}."
        )
