"""Settings of TRL's other distillation trainers (SDFT, SDPO, Distillation, GOLD), by the names that they have there.

Each is read as ours where it means the same, accepted where it asks for what is done anyway, and else refused with what
to set instead. Read in TRL 1.16; older names of SDFT and of Transformers stand beside the present ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import ConfigError

logger = logging.getLogger(__name__)

# The same under another name.
SAME = {
    "distillation_alpha": "beta",
    "alpha": "beta",
    "max_completion_length": "max_new_tokens",
    "distillation_topk": "loss_top_k",
    "num_loss_tokens_to_skip": "skip_first_tokens",
    "log_completions_steps": "rollout_log_steps",
    "num_completions_to_print": "rollout_log_samples",
    "max_seq_length": "max_length",
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "overwrite_output_dir": "overwrite",
}
TEACHER_KINDS = {"base": "disabled", "live": "shared", "ema": "ema"}
CONVERTED = ("teacher_model_kind", "teacher_update_rate", "ref_model_mixup_alpha", "teacher_prompt_template")


class Elsewhere(NamedTuple):
    """A setting that has no counterpart.

    Attributes:
        anyway: values that ask for what is done anyway, as lower-case text.
        hint: what to set instead, or why there is nothing to set.
    """

    anyway: tuple[str, ...]
    hint: str


_OFF, _NONE = ("false", "no", "0", "none", "null", ""), ("none", "null", "")
_SAMPLED = "rollouts are sampled from the student as it is; `temperature` alone can be set"
_VLLM = "rollouts are written by the trainer itself, see `rollout_engine`"
_AT_ONCE = "all rollouts of an optimizer step are written at once, `num_generations` a prompt; leave it out"
_AVERAGE = "set teacher_adapter to ema, and ema_decay to 1 minus the share of the student"
_UNCUT = (
    "no prompt is ever cut: max_length bounds prompt and answer together (longer rows are refused, or left out with "
    "skip_long_prompts), max_privileged_length the PI"
)
ELSEWHERE = {
    "max_prompt_length": Elsewhere(_NONE, _UNCUT),
    "max_reprompt_len": Elsewhere(_NONE, _UNCUT),
    "distillation_mode": Elsewhere(
        ("full_logits",),
        "the divergence is over the whole vocabulary; set loss_top_k (SDFT's own number is 100) for the teacher's top "
        "tokens and a bucket for the rest",
    ),
    "distillation_add_tail": Elsewhere(("true", "yes", "1"), "loss_top_k always has a bucket for the rest"),
    "distillation_is_clip": Elsewhere(_NONE, "a rollout is trained on at once, so its weight is 1; leave it out"),
    "distillation_weight": Elsewhere(("1", "1.0"), "the divergence is the whole loss; scale learning_rate"),
    "full_logit_distillation": Elsewhere(("true", "yes", "1"), "set loss_top_k for fewer tokens of the vocabulary"),
    "teacher_sync_steps": Elsewhere(("1",), "the average moves at every step; set ema_decay nearer to 1"),
    "ref_model_sync_steps": Elsewhere(("1",), "the average moves at every step; set ema_decay nearer to 1"),
    "sync_ref_model": Elsewhere(_OFF, _AVERAGE),
    "teacher_regularization": Elsewhere(_NONE, _AVERAGE),
    "generate_from_teacher": Elsewhere(_OFF, "set seq_kd to true and lmbda to 0: the teacher writes, with the PI"),
    "teacher_model_revision": Elsewhere(_NONE, 'set teacher_model_init_kwargs to {"revision": ...}'),
    "teacher_tokenizer_name_or_path": Elsewhere(_NONE, "teacher and student read the same token ids; leave it out"),
    "use_uld_loss": Elsewhere(_OFF, "teacher and student must have the same vocabulary; there is nothing to align"),
    "use_teacher_server": Elsewhere(_OFF, "the teacher's whole distribution is read in the process"),
    "chat_template_kwargs": Elsewhere(_NONE, "set it by row, in a column of that name (`columns` can make one)"),
    "log_completions": Elsewhere(_OFF, "set rollout_log_steps and rollout_log_samples"),
    "top_k": Elsewhere(("0", "-1", *_NONE), _SAMPLED),
    "top_p": Elsewhere(("1", "1.0", *_NONE), _SAMPLED),
    "min_p": Elsewhere(("0", "0.0", *_NONE), _SAMPLED),
    "repetition_penalty": Elsewhere(("1", "1.0", *_NONE), _SAMPLED),
    "generation_kwargs": Elsewhere((*_NONE, "{}"), _SAMPLED),
    "cache_implementation": Elsewhere(_NONE, _SAMPLED),
    "num_iterations": Elsewhere(("1",), "each rollout is trained on once; write new ones with more steps"),
    "num_generations_eval": Elsewhere(_NONE, "an evaluation writes one answer a row; leave it out"),
    "generation_batch_size": Elsewhere(_NONE, _AT_ONCE),
    "steps_per_generation": Elsewhere(_NONE, _AT_ONCE),
    "use_vllm": Elsewhere(_OFF, _VLLM),
    "ds3_gather_for_generation": Elsewhere(("true", "false"), "DeepSpeed is not supported"),
    "dataset_streaming": Elsewhere(_OFF, "all rows are checked before training, so they must be at hand"),
    "datasets": Elsewhere(_NONE, "name one set with dataset_name (a folder may hold several files)"),
    "test_split_size": Elsewhere(_NONE, "set holdout_rows, a number of rows"),
    "ignore_bias_buffers": Elsewhere(_OFF, "it does nothing for LoRA"),
    "teacher_model": Elsewhere((), "set teacher_model_name_or_path (with share_student_as_teacher false)"),
    "ref_model": Elsewhere((), "the base with its adapter off is the teacher; leave it out"),
    "student_model_name_or_path": Elsewhere((), "set model_name_or_path"),
    "privileged_context": Elsewhere((), "it is a column of the data; privileged_key names another one"),
    "epsilon": Elsewhere((), "the loss is a divergence, not a policy gradient; divergence_clip bounds a token's"),
    "epsilon_high": Elsewhere((), "the loss is a divergence, not a policy gradient; divergence_clip bounds a token's"),
    "reward_funcs": Elsewhere((), "nothing is rewarded; `feedback` makes PI of a rollout (SDPO)"),
}  # fmt: skip


def in_our_names(name: str, value: Any, known: frozenset[str]) -> dict[str, Any] | None:
    """What a setting of TRL's is here ({}: what is done anyway); None for one of ours, and for a name of nobody's.

    Args:
        known: our names.

    Raises:
        ConfigError: it has no counterpart; says what to set instead.
    """
    if name in known:
        return None
    if name in SAME:
        return {SAME[name]: value}
    if name in CONVERTED:
        return _converted(name, value)
    elsewhere = Elsewhere((), _VLLM) if name.startswith("vllm_") else ELSEWHERE.get(name)
    if elsewhere is None:
        return None
    if str(value).strip().lower() in elsewhere.anyway:
        return {}
    raise ConfigError(f"{name} is a setting of another of TRL's trainers, and none here: {elsewhere.hint}")


def _converted(name: str, value: Any) -> dict[str, Any]:
    if name == "teacher_model_kind":
        if value not in TEACHER_KINDS:
            raise ConfigError(f"{name} is {value!r}; known are {', '.join(TEACHER_KINDS)}, here teacher_adapter")
        return {"teacher_adapter": TEACHER_KINDS[value]}
    if name == "teacher_prompt_template":
        text = str(value).replace("{prompt}", "{question}").replace("{privileged_context}", "{privileged}")
        return {"privileged_template": text, "privileged_placement": "user"}
    try:
        share = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {value!r}; a number is wanted (here it is ema_decay, 1 minus it)") from None
    return {"ema_decay": round(1 - share, 12)}


def translate_recipe(recipe: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """A recipe with all of TRL's names in ours.

    Raises:
        ConfigError: settings without a counterpart, all of them; or one that is given under both names.
    """
    ours: dict[str, Any] = {}
    faults = []
    for key, value in recipe.items():
        try:
            found = in_our_names(str(key), value, known)
        except ConfigError as error:
            faults.append(f"  {error}")
            continue
        if found is None:
            ours[key] = value
            continue
        twice = [name for name in found if name in recipe or name in ours]
        if twice:
            faults.append(f"  {key} is {twice[0]} here, which is given too; keep one")
        _say(key, found)
        ours.update(found)
    if faults:
        raise ConfigError("this recipe cannot be used:\n" + "\n".join(faults))
    return ours


def translate_flags(argv: Sequence[str], known: frozenset[str]) -> list[str]:
    """Command-line arguments with TRL's flags in our names.

    Raises:
        ConfigError: one has no counterpart, or is given under both names.
    """
    ours: list[str] = []
    rest = list(argv)
    given = {item.partition("=")[0].lstrip("-").replace("-", "_") for item in rest if item.startswith("--")}
    while rest:
        item = rest.pop(0)
        flag, equals, value = item.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not item.startswith("--") or name in known or not _is_theirs(name):
            ours.append(item)
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        found = in_our_names(name, value, known) or {}
        if twice := given & set(found):
            raise ConfigError(f"--{name} is --{min(twice)} here, which is given too; keep one")
        _say(name, found)
        for key, each in found.items():
            ours += [f"--{key}", str(each)]
    return ours


def _is_theirs(name: str) -> bool:
    return name in SAME or name in CONVERTED or name in ELSEWHERE or name.startswith("vllm_")


def _say(name: str, found: Mapping[str, Any]) -> None:
    if found:
        logger.warning("%s (TRL) is read as %s", name, ", ".join(f"{key}={value!r}" for key, value in found.items()))
    else:
        logger.warning("%s (TRL) asks for what is done anyway", name)
