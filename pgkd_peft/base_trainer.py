"""What a run needs around the optimizer step: exact checkpoints, evaluations that leave no trace, meters, log, save.

:class:`RunTrainer` is the base of the distillation trainer and of its control `sft`; callbacks know this class only.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from .config import PrivilegedGKDConfig
from .data.check import DataReport
from .errors import CheckpointError, ConfigError, RunFinished
from .model.adapters import STUDENT, adapter_state, load_adapter
from .model.frozen import FrozenCheck, ProbeCallback
from .run import console
from .run.card import run_card
from .run.checkpoint import (
    cannot_write,
    explain_full_disk,
    find_checkpoint,
    finished_at,
    publish,
    remove_leftovers,
    replacing,
    rotate,
    write_manifest,
)
from .run.console import logger
from .run.folder import ADAPTER_FILE, CARD_FILE, HUB_FILES, HUB_STATE_FILES, STATE_FILE, TEACHER_FILE
from .run.info import RunInfo
from .run.interrupt import interruptible
from .run.jsonl import write_whole
from .run.meters import Meters, means_of, over_ranks
from .run.metrics import MetricsFileCallback
from .run.place import is_about_writing, locked, make_readable
from .run.resume import Continue, check_belongs, progress_file, readable_state
from .trl_compat import log_progress, uploading_only

TIE_BREAKER = "eval_recovered_nats"
GAP_METRICS = (TIE_BREAKER, "eval_recovered", "eval_student", "eval_base", "eval_teacher", "eval_drift")


class GapCallback(TrainerCallback):
    """What takes part in the evaluations of a run; see :class:`pgkd_peft.RecoveredGapCallback`."""

    neutral_rows: list[Any]

    def prepare(self, trainer: RunTrainer) -> None:
        """Measure once, before training, what does not change."""
        raise NotImplementedError

    def measure(self, trainer: RunTrainer) -> dict[str, float]:
        """The metrics that this adds to an evaluation."""
        raise NotImplementedError


class RunTrainer(SFTTrainer):
    """A trainer whose run can be killed, resumed bit for bit, evaluated without a trace, and explained afterwards.

    A subclass calls :meth:`start_run` at the end of its constructor.

    Attributes:
        contexts: makes both contexts of a row (the collator).
        teacher: a :class:`pgkd_peft.teacher.Teacher`; None where nothing teaches (the control `sft`).
        frozen: the proof that the base stays as it was.
        run_info: what ``run.json`` says.
        meters: sums since the last log.
    """

    args: PrivilegedGKDConfig
    model: PeftModel
    data_collator: Any
    teacher: Any = None
    _evaluation = "eval"  # what the metrics of the evaluation under way begin with
    _staging: Path | None = None  # where the checkpoint that is being written stands until it is whole

    def start_run(self, contexts: Any, loaded: str, report: DataReport | None) -> None:
        """What every run has: the frozen proof, ``run.json``, the meters.

        Args:
            contexts: the collator.
            loaded: what was loaded, in a sentence.
            report: what the check of the rows found.
        """
        self.contexts = contexts
        self.frozen = FrozenCheck(self.model, self.teacher)
        self.run_info = RunInfo(self, loaded, report)
        self.meters = Meters(self.args.device)
        self.add_callback(ProbeCallback(self.frozen))
        self.add_callback(MetricsFileCallback())

    def say(self, line: str) -> None:
        """One line of the run's own log, on the main process alone."""
        if self.is_world_process_zero():
            logger.info(line)

    def student_weights(self) -> contextlib.AbstractContextManager[torch.nn.Module]:
        """The student as a model that answers: eval mode, restored afterwards."""
        return adapter_state(self.model, "shared")

    # ---- training ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; the run folder then holds ``run.json`` and ``metrics.jsonl``, and the base is proven unchanged at the
        end. Shown as it suits the place: a live view in a terminal, one in a notebook, else (and with
        ``disable_tqdm``) a line a log.

        Args:
            resume_from_checkpoint: True for the last whole checkpoint of the run folder, or a checkpoint's folder. The
                run then goes on as if it had not been interrupted: the same data, rollouts, dropout and losses.

        Raises:
            RunInterrupted: SIGTERM, SIGHUP or Ctrl-C; a checkpoint was saved first.
            RunFinished: the run that was to be resumed is at its end; nothing was changed.
            ConfigError: another process is at work in the run folder.
            CheckpointError: a checkpoint cannot be written, or the one to resume from is damaged or of another base.
            FrozenBaseError, NonFiniteLossError: see there.
        """
        self._prepare_gap_callbacks()
        run_dir = str(self.args.output_dir)
        checkpoint = find_checkpoint(run_dir, resume_from_checkpoint)
        watched = console.make_view(self) if console.make_view is not None else None
        try:
            with explain_full_disk(run_dir), locked(run_dir), interruptible(self), self.run_info.recording():
                result = super().train(checkpoint, *args, **kwargs)
                self.frozen.verify("at the end of training", probe=True)
        finally:
            if watched is not None:
                watched.stop()  # gives the terminal its cursor back, also after an error
        self.when_trained()
        return result

    def when_trained(self) -> None:
        """What a subclass does when a training has come to its end."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was measured since the last log: means over tokens, rows or optimizer steps, over all ranks."""
        evaluated = any(key.startswith(f"{self._evaluation}_") for key in logs)
        mode, prefix = ("eval", f"{self._evaluation}_") if evaluated else ("train", "")
        for name, value in means_of(over_ranks(self.meters.read(mode), self.accelerator)).items():
            logs.setdefault(prefix + name, value)
        self.meters.reset(mode)
        super().log(logs, start_time)

    # ---- evaluation --------------------------------------------------------------------------------------------

    def _gap_callbacks(self) -> list[GapCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, GapCallback)]

    def _prepare_gap_callbacks(self) -> None:
        metric = str(self.args.metric_for_best_model).removeprefix("eval_")
        callbacks = self._gap_callbacks()
        if f"eval_{metric}" in GAP_METRICS and not callbacks:
            raise ConfigError(
                f"metric_for_best_model is {self.args.metric_for_best_model!r}, which nothing measures: give a scorer "
                "(--scorer contains), in Python callbacks=[RecoveredGapCallback(rows, scorer=...)]."
            )
        if metric == "drift" and not any(callback.neutral_rows for callback in callbacks):
            raise ConfigError(
                "metric_for_best_model is eval_drift, which is measured on neutral prompts: give "
                "--neutral_dataset_name, in Python RecoveredGapCallback(..., neutral_rows=...)."
            )
        if self.args.eval_strategy != "no":
            for callback in callbacks:
                callback.prepare(self)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As Transformers' own, with random state and train mode left as they were."""
        around, self._evaluation = self._evaluation, metric_key_prefix
        try:
            with kept_random_state(), _kept_mode(self.model):
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluation = around

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        several = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
        if metric_key_prefix in ("eval", *(f"eval_{name}" for name in several[:1])):  # once an evaluation
            for callback in self._gap_callbacks():
                output.metrics.update(callback.measure(self))
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Transformers' own; of two evaluations with the same metric the one that has taken over more in nats wins.

        A coarse score is the same for many checkpoints (zero, in the beginning), and the first of them is the least
        trained one.
        """
        if super()._determine_best_metric(metrics=metrics, trial=trial):
            return True
        name = str(self.args.metric_for_best_model)
        name = name if name.startswith("eval_") else f"eval_{name}"
        step = self.state.best_global_step
        if not step or name not in metrics or metrics[name] != self.state.best_metric or TIE_BREAKER not in metrics:
            return False
        best = [log[TIE_BREAKER] for log in self.state.log_history if log.get("step") == step and TIE_BREAKER in log]
        if not best or not metrics[TIE_BREAKER] > best[-1]:
            return False
        self.say(
            f"{name} {metrics[name]:.4g} as at step {step}; step {self.state.global_step} is the better one by "
            f"{TIE_BREAKER} ({metrics[TIE_BREAKER]:.3f} against {best[-1]:.3f})"
        )
        self.state.best_global_step = self.state.global_step
        return True

    # ---- files -------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter, the tokenizer with its chat template, and the model card; the base is checked first."""
        run_dir = str(self.args.output_dir)
        output_dir = output_dir or run_dir
        self.frozen.verify(f"when saving {Path(output_dir).name}")
        if not self.args.should_save:
            return
        with replacing(output_dir) if self._staging is None else contextlib.nullcontext(output_dir) as folder:
            self.model.save_pretrained(folder, selected_adapters=[STUDENT])
            self.processing_class.save_pretrained(folder)
            self.run_info.write(folder)
            make_readable(Path(folder) / ADAPTER_FILE)
            self.create_model_card(model_name=(self.args.hub_model_id or Path(run_dir).name).split("/")[-1])
            card = Path(run_dir) / CARD_FILE
            if card.is_file():
                shutil.copyfile(card, Path(folder) / CARD_FILE)  # in place of PEFT's

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Our own card in place of TRL's, which knows neither adapter nor base."""
        if not self.is_world_process_zero():
            return
        more = [tags] if isinstance(tags, str) else list(tags or ())
        text = run_card(
            self.run_info.collect(),
            model_name or Path(str(self.args.output_dir)).name,
            dict.fromkeys([*self._tag_names, "lora", *more]),
            dataset_name,
        )
        write_whole(Path(str(self.args.output_dir)) / CARD_FILE, text)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it is pushed from its final place
            with self._uploads():
                super()._push_from_checkpoint(checkpoint_folder)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' own, of the adapter, its tokenizer and its card alone: the run folder's other files hold
        the data and the PI."""
        with self._uploads():
            return super().push_to_hub(*args, **kwargs)

    def _uploads(self) -> contextlib.AbstractContextManager[None]:
        files = {*HUB_FILES, *self.processing_class.vocab_files_names.values()}
        return uploading_only(sorted(files), sorted({*files, *HUB_STATE_FILES}))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write to a hidden folder, rename, then delete what is beyond ``save_total_limit``.

        Raises:
            CheckpointError: it cannot be written; the previous one is intact.
        """
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = run_dir / f".saving-{name}"
        if self.args.should_save:
            remove_leftovers(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            self._save_more(staging / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(staging / name)
                publish(staging / name, run_dir / name)
        except Exception as error:
            if not is_about_writing(error):
                raise
            raise CheckpointError(cannot_write(run_dir, error)) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save:
            best = Path(self.state.best_model_checkpoint or name).name
            rotate(run_dir, self.args.save_total_limit, {name, best})
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _save_more(self, folder: Path) -> None:
        """What Transformers does not know of: the teacher's adapter, and what was summed up since the last log."""
        progress = {**log_progress(self), "sums": self.meters.read("train")}
        (folder / progress_file(self)).write_text(json.dumps(progress) + "\n", encoding="utf-8")
        if not self.args.should_save:
            return
        if self.teacher is not None:
            self.teacher.save(str(folder / TEACHER_FILE))
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == self._staging:
            assert self._staging is not None
            self.state.best_model_checkpoint = str(self._staging.parent / Path(best).name)
            self.state.save_to_json(str(folder / STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        check_belongs(folder, self.run_info.collect())
        load_adapter(self.model, folder)
        done = finished_at(str(self.args.output_dir), folder, self.args)
        if done is not None:
            self.state = TrainerState.load_from_json(str(folder / STATE_FILE))
            raise RunFinished(done)
        self._load_rng_state(str(folder))  # seen to be readable before anything is written; loaded again in its place
        if self.teacher is not None and (folder / TEACHER_FILE).is_file():
            self.teacher.load(str(folder / TEACHER_FILE))
            self.frozen.restart()
        self.add_callback(Continue(self, folder))


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Put back every random state that training draws from: Transformers' evaluation alone takes a number from
    torch's, with which a data loader seeds its workers."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _kept_mode(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    try:
        yield
    finally:
        model.train(training)
