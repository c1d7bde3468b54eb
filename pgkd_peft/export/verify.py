"""Is the merged model the model that was trained? KL per token between the two, on the same sequences.

The trained model is the adapter on the base as training held it, the merged model is what a user will load. Both run in
float32 arithmetic on the weights that they hold, so what is measured is the difference of the two functions and not the
noise of 16-bit activations; that noise is measured too, as the yardstick (`arithmetic_floor`).
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..compare import Reading, compare, read_as, token_nll
from ..data.collator import stop_ids
from ..data.contexts import ContextBuilder
from ..data.row import parse_row
from ..errors import DataError, ModelError, explained
from ..model.architecture import LINEAR, auto_class
from ..model.cpu import guard_cpu_linear4bit
from ..model.load import base_of, dequantized_weight
from ..rollout import generate
from .adapter import AdapterRun, base_matches, load_trained
from .gap import TeacherAnswers

# Used when a run kept no held-out prompts and none were given: everyday questions that no adapter was made for.
NEUTRAL_PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Give me three tips for learning a new language.",
    "What is the difference between a list and a tuple in Python?",
    "Translate 'good morning' into Spanish.",
    "Summarize the plot of Romeo and Juliet in one sentence.",
    "What is 17 plus 25?",
    "Name four planets of the solar system.",
    "Write an email that thanks a colleague for help with a report.",
    "Why do leaves change their colour in autumn?",
)
MAX_PROMPTS, MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 32, 1024, 48

Score = Callable[[Any, PreTrainedTokenizerBase], float]


@dataclass(frozen=True)
class Prompts:
    """Conversations to measure on, and a sentence that says where they come from."""

    rows: tuple[dict[str, Any], ...]
    source: str
    neutral: bool = False


@dataclass(frozen=True)
class Sequence:
    """Token ids whose positions from `start` on are measured: a greedy answer of the trained model, or a row's own."""

    ids: tuple[int, ...]
    start: int
    from_row: bool


@dataclass(frozen=True)
class Fidelity:
    """How far a model is from the trained one, over `tokens` completion tokens of `sequences` sequences.

    KL(trained || this) in nats per token, mean, 99th percentile and maximum; the share of positions where the likeliest
    token is the same; the mean negative log-likelihood of the rows' own answers (None where no row has one); the task
    score (None where there is no task); the recovered gap in nats (None where no row has PI).
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    tokens: int
    sequences: int
    answer_nll: float | None = None
    score: float | None = None
    recovered: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def against(self, trained: TrainedModel) -> str:
        """Task score and recovered gap beside those of the trained model, as clauses of a sentence; "" without."""
        told = ""
        for name, own, theirs in (
            ("score", self.score, trained.score),
            ("recovered gap in nats", self.recovered, trained.recovered),
        ):
            if own is not None and theirs is not None:
                told += f"; {name} {own:.3f} (trained model {theirs:.3f})"
        return told


def read_prompts(run: AdapterRun, file: str | None) -> Prompts:
    """The prompts of `file`, else those that the run held out, else a small neutral set.

    A file has one prompt a line: plain text, or JSON with `messages` (or `prompt`), whose last assistant turn, if there
    is one, is measured as well.

    Raises:
        DataError: no such file, nothing in it, or a line that is no prompt; all bad lines in one report.
    """
    path = Path(file) if file else None
    source = f"the prompts of {path.name}" if path else ""
    if path is None and run.run_folder is not None and run.info.get("holdout_prompts"):
        path = run.run_folder / str(run.info["holdout_prompts"])
        source = "the run's own held-out prompts"
        if not path.is_file():
            path = None
    if path is None:
        rows = tuple({"messages": [{"role": "user", "content": text}]} for text in NEUTRAL_PROMPTS)
        return Prompts(
            rows, f"{len(rows)} built-in neutral prompts (the run kept none; give --prompts FILE)", neutral=True
        )
    if not path.is_file():
        raise DataError(f"--prompts {str(path)!r} is no file; give one with a prompt a line, as text or JSON")
    rows_, faults = [], []
    key = (run.info.get("config") or {}).get("privileged_key", "privileged_messages")
    with explained(f"--prompts {str(path)!r} cannot be read as UTF-8 text", DataError):
        text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other ends of lines (U+2028)
        if line.strip():
            try:
                rows_.append(_prompt_row(line, key))
            except ValueError as error:
                faults.append(f"{path}, line {number}: {error}")
    if faults or not rows_:
        raise DataError("\n".join(faults) or f"{path} holds no prompts; give one a line, as text or JSON")
    kept = rows_[:MAX_PROMPTS]
    return Prompts(tuple(kept), f"{source} ({len(kept)} of {len(rows_)})")


def _prompt_row(line: str, privileged_key: str) -> dict[str, Any]:
    """The row of a line, which training could read as well.

    Raises:
        ValueError: it is no prompt.
    """
    if not line.lstrip().startswith("{"):
        return {"messages": [{"role": "user", "content": line.strip()}]}
    row = json.loads(line)
    prompt = row.get("prompt")
    messages = row.get("messages") or ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    if not messages:
        raise ValueError(f"needs 'messages' (a list of turns) or 'prompt', has {', '.join(row) or 'nothing'}")
    row["messages"] = messages
    parse_row(row, privileged_key)
    return row


class TrainedModel:
    """The trained model's answers and hidden states, computed once and kept for any number of comparisons.

    Use it as a context manager. What is kept are hidden states and the head, not log-probabilities, which are larger by
    vocabulary / width (40 times and more); they exist in chunks, in float64, while two models are compared.

    Attributes:
        arithmetic_floor: mean KL between the trained model in float32 arithmetic and the same model as it ran in
            training. A merged model cannot be told from the trained one below it.
        adapter_effect: mean KL between the trained model and its base without the adapter: what there is to lose.
        base_matches: see :func:`~pgkd_peft.export.adapter.base_matches`.
        answer_nll, score, recovered: as in Fidelity.
    """

    def __init__(
        self,
        run: AdapterRun,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        score: Score | None = None,
        trust_remote_code: bool = False,
    ):
        self.run, self.tokenizer, self.prompts = run, tokenizer, prompts
        self.max_new_tokens, self._score, self._trust = max_new_tokens, score, trust_remote_code
        self.sequences: list[Sequence] = []
        self.trained: Reading
        self.arithmetic_floor = self.adapter_effect = float("nan")
        self.answer_nll: float | None = None
        self.score: float | None = None
        self.recovered: float | None = None
        self.teacher = TeacherAnswers(run, tokenizer, prompts.rows)
        self.base_matches: bool | None = None

    def __enter__(self) -> TrainedModel:
        self._measure_trained()
        return self

    def __exit__(self, *_: object) -> None:
        del self.trained

    @torch.no_grad()
    def _measure_trained(self) -> None:
        run = self.run
        model = load_trained(run, trust_remote_code=self._trust)
        self.base_matches = base_matches(model, run)
        self.sequences = build_sequences(model, self.tokenizer, self.prompts, self.max_new_tokens)
        self.teacher.write(model, self.max_new_tokens)
        if self._score is not None:
            self.score = self._score(model, self.tokenizer)
        as_run = self.read(model)
        use_float32_arithmetic(model)
        self.teacher.read(model)
        self.recovered = self.teacher.nats.recovered if self.teacher.nats else None
        self.trained = self.read(model)
        check_reading(model, self.sequences[0], self.trained)
        self.arithmetic_floor = self.compare(as_run).kl_mean
        self.adapter_effect = self.compare(self.read(model, "disabled")).kl_mean
        self.answer_nll = self.compare(self.trained).answer_nll

    def read(self, model: nn.Module, which: str = "shared") -> Reading:
        """How a model reads the sequences, in float64 from its last hidden states on."""
        pairs = [(list(s.ids[: s.start]), list(s.ids[s.start :])) for s in self.sequences]
        return read_as(model, which, pairs, pad_id=0, at_once=1).exact()

    @torch.no_grad()
    def measure(self, folder: str | Path, **load: Any) -> Fidelity:
        """Compare the model in `folder`, loaded as any user would, with the trained one."""
        device_map = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
        options = {"dtype": "auto", "device_map": device_map, "trust_remote_code": self._trust, **load}
        where = {name: load[name] for name in ("gguf_file",) if name in load}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=self._trust, **where)
        model = auto_class(config).from_pretrained(folder, **options).eval()
        guard_cpu_linear4bit(model)
        score = self._score(model, self.tokenizer) if self._score is not None else None
        use_float32_arithmetic(model)
        reading = self.read(model)
        check_reading(model, self.sequences[0], reading)
        return self.compare(reading, score, self.teacher.recovered(model))

    def compare(self, other: Reading, score: float | None = None, recovered: float | None = None) -> Fidelity:
        """How far another model, by its reading of the same sequences, is from the trained one."""
        found = compare(self.trained, other)
        from_rows = [i for i, sequence in enumerate(self.sequences) if sequence.from_row]
        nll = None
        if from_rows:
            answers = [self.sequences[i].ids[self.sequences[i].start :] for i in from_rows]
            nll = torch.cat(token_nll(other.some(from_rows), answers)).mean().item()
        return Fidelity(
            kl_mean=found.divergence.mean().item(),
            kl_p99=found.divergence.quantile(0.99).item(),
            kl_max=found.divergence.max().item(),
            top1_agreement=found.agreement.mean().item(),
            tokens=len(found.divergence),
            sequences=len(self.sequences),
            answer_nll=nll,
            score=score,
            recovered=recovered,
        )


def check_reading(model: nn.Module, sequence: Sequence, reading: Reading) -> None:
    """Refuse a model whose forward does more after its head than :class:`~pgkd_peft.model.head.Head` knows of.

    Args:
        sequence: the first that was read.
        reading: in float32 or finer.

    Raises:
        ModelError: its logits are not those of its head on its hidden states, so that nothing can be said.
    """
    completion = sequence.ids[sequence.start :]
    with torch.no_grad():
        ids = torch.tensor([sequence.ids], device=next(model.parameters()).device)
        logits_NV = model(input_ids=ids, use_cache=False).logits[0, sequence.start - 1 : -1].double()
    targets = torch.tensor(completion, device=logits_NV.device)
    own = F.cross_entropy(logits_NV, targets, reduction="none").cpu()
    ours = token_nll(reading.some([0]), [completion])[0]
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-2):
        raise ModelError(
            f"{type(base_of(model)).__name__} does something to its logits that is not known here, so a merged model "
            "could not be compared with the trained one (largest difference "
            f"{(own - ours).abs().max().item():.2g} nats a token)."
        )


def build_sequences(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, max_new_tokens: int
) -> list[Sequence]:
    """Each prompt with the model's greedy continuation, and with the row's own answer where it has one."""
    sequences = []
    prompt_ids = []
    builder = ContextBuilder(tokenizer) if tokenizer.chat_template else None
    for row in prompts.rows:
        ids, answer = _without_pi(tokenizer, builder, row)
        if len(ids) > MAX_PROMPT_TOKENS:
            continue
        prompt_ids.append(ids)
        if answer:
            own = tokenizer(answer + (tokenizer.eos_token or ""), add_special_tokens=False)["input_ids"]
            sequences.append(Sequence((*ids, *own[: 4 * max_new_tokens]), len(ids), True))
    if not prompt_ids:
        raise DataError(
            f"every prompt is longer than {MAX_PROMPT_TOKENS} tokens; give shorter ones with --prompts FILE"
        )
    continuations = generate(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(tokenizer, base_of(model).generation_config),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    for ids, continuation in zip(prompt_ids, continuations, strict=True):
        sequences.append(Sequence((*ids, *continuation), len(ids), False))
    return sequences


def _without_pi(
    tokenizer: PreTrainedTokenizerBase, builder: ContextBuilder | None, row: dict[str, Any]
) -> tuple[list[int], str]:
    """The ids of a row's prompt as training makes it for the student, and the text of the row's own answer ("": none).

    Args:
        builder: None where there is no chat template; then the turns' texts stand one below the other.
    """
    shown = {name: row.get(name) for name in ("messages", "tools", "chat_template_kwargs")}
    if builder is None:
        parsed = parse_row(shown, "")
        text, answer = "\n".join(message["content"] for message in parsed.messages), parsed.answer
    else:
        contexts = builder.build(shown)
        text = builder.render(contexts.student, contexts.tools, contexts.chat_template_kwargs)
        answer = contexts.answer
    return tokenizer(text, add_special_tokens=builder is None)["input_ids"], answer["content"] if answer else ""


def use_float32_arithmetic(model: nn.Module) -> None:
    """From now on the model computes in float32 with exactly the weights that it holds; done in place.

    The large matrices stay as they are (4-bit, 8-bit or 16-bit) and are widened layer by layer in the forward.
    """
    for module in model.modules():
        # a subclass, such as the routers of Llama 4 and Phi-MoE, has a forward of its own
        if type(module) in LINEAR and module.weight.dtype != torch.float32:
            module.forward = functools.partial(_wide_forward, module)  # type: ignore[method-assign]
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()


def _wide_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    bias = module.bias.float() if module.bias is not None else None
    weight = held_weight(module)
    return F.linear(x.float(), weight, bias)


def held_weight(module: nn.Module) -> torch.Tensor:
    """The float32 weight that a layer's forward uses: a 4-bit one is dequantized to the layer's compute dtype."""
    if isinstance(module, bnb.nn.Linear4bit) and module.compute_dtype is not None:
        state = copy.copy(module.weight.quant_state)
        state.dtype = module.compute_dtype
        return bnb.functional.dequantize_4bit(module.weight.data, state).float()
    return dequantized_weight(module)
