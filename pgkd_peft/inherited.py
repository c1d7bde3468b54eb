"""Every setting that comes from TRL and Transformers, once: used, refused, or harmless; and the ranges of the numbers.

A setting that is accepted and does nothing misleads as much as a wrong one. Read in transformers 5.23 and TRL 1.16; a
test demands that each inherited field stands in exactly one of the three tables, so a new one has to be decided upon.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# What the trainers of Transformers and TRL do with these is what a run of ours wants of them.
USED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start
    save_strategy save_steps save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id
    hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
    accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_backend ddp_timeout debug resume_from_checkpoint model_init_kwargs trust_remote_code chat_template_path
    max_length temperature lmbda beta max_new_tokens teacher_model_name_or_path
    teacher_model_init_kwargs disable_dropout seq_kd
    """.split()  # noqa: SIM905
)

_NO_LOGITS = "no logits are kept, so there are no metrics of them"
_RENDERED = "the rows are rendered by the chat template, one by one"
# Whatever they say, a run is the same; each with the reason.
HARMLESS = {
    "prediction_loss_only": _NO_LOGITS,
    "eval_do_concat_batches": _NO_LOGITS,
    "eval_use_gather_object": _NO_LOGITS,
    "eval_accumulation_steps": _NO_LOGITS,
    "include_for_metrics": _NO_LOGITS,
    "batch_eval_metrics": _NO_LOGITS,
    "label_names": "there are no labels",
    "remove_unused_columns": "GKDTrainer sets it: rows keep their columns until both contexts are made",
    "length_column_name": "it names a column of train_sampling_strategy='group_by_length', which is refused",
    "skip_memory_metrics": "it adds Transformers' own memory figures to the log, or not",
    "do_train": "read by Transformers' example scripts alone",
    "do_eval": "read by Transformers' example scripts alone",
    "do_predict": "read by Transformers' example scripts alone",
    "local_rank": "the launcher's environment says which process this is",
}


class Refused(NamedTuple):
    """An inherited setting with one value that it may have.

    Attributes:
        wanted: that value, the default of TRL or Transformers.
        why: why no other one can be had, or what to use instead.
    """

    wanted: Any
    why: str

    def is_left_alone(self, value: Any) -> bool:
        """Whether a value says no more than the default does; empty is as good as none, and False as "no"."""
        empty = value in (None, "", [], {}) and self.wanted in (None, False)
        return bool(value == self.wanted) or empty or (value is False and self.wanted == "no")


_LOSS = "the loss is a divergence between two models, not one of labels"
_SHARDED = (
    "the adapter is switched off inside the shared base, which sharded weights do not allow; one GPU, or several with "
    "plain DDP (accelerate launch --multi_gpu), work"
)
_UNTRIED = "it has not been tried with a base that is teacher and student at once"
REFUSED = {
    "packing": Refused(False, "rows stay separate, each with two contexts"),
    "packing_strategy": Refused("bfd", "rows stay separate, each with two contexts"),
    "eval_packing": Refused(None, "rows stay separate, each with two contexts"),
    "padding_free": Refused(False, "batches are padded"),
    "pad_to_multiple_of": Refused("auto", "batches are padded to their longest row"),
    "pad_token": Refused(None, "masks come from lengths; the tokenizer's own pad token, or its EOS, fills up"),
    "eos_token": Refused(None, "answers end as tokenizer, generation config and chat template say"),
    "assistant_only_loss": Refused(False, "the loss is taken on the completion alone"),
    "completion_only_loss": Refused(None, "the loss is always taken on the completion alone"),
    "loss_type": Refused("nll", _LOSS + "; beta chooses it"),
    "label_smoothing_factor": Refused(0.0, "there are no labels, the teacher's distribution is the target"),
    "router_aux_loss_coef": Refused(None, _LOSS + "; routers are frozen"),
    "dataset_text_field": Refused("text", "rows are conversations, in `messages`; `columns` maps others to it"),
    "dataset_kwargs": Refused(None, _RENDERED),
    "dataset_num_proc": Refused(None, _RENDERED),
    "shuffle_dataset": Refused(False, "training shuffles in every epoch (train_sampling_strategy)"),
    "truncation_mode": Refused(
        "keep_start", "a conversation is never cut: a row over max_length is refused, or left out (skip_long_prompts)"
    ),
    "average_tokens_across_devices": Refused(True, "every completion token of a step counts the same, on all ranks"),
    "use_liger_kernel": Refused(False, "it would replace the loss"),
    "liger_kernel_config": Refused(None, "it would replace the loss"),
    "neftune_noise_alpha": Refused(None, "noise on the student's embeddings is noise in the divergence"),
    "activation_offloading": Refused(False, _UNTRIED),
    "torch_compile": Refused(False, _UNTRIED),
    "torch_compile_backend": Refused(None, _UNTRIED),
    "torch_compile_mode": Refused(None, _UNTRIED),
    "use_cache": Refused(False, "rollouts have their cache anyway, training passes need none"),
    "auto_find_batch_size": Refused(False, "the rollout batch halves itself when memory runs out"),
    "bf16_full_eval": Refused(False, "it rounds adapter and base, which must stay as they are"),
    "fp16_full_eval": Refused(False, "it rounds adapter and base, which must stay as they are"),
    "include_num_input_tokens_seen": Refused("no", "completion_tokens is logged, which is what a step trains on"),
    "save_only_model": Refused(False, "a checkpoint without its optimizer cannot be resumed; save_strategy 'no' saves "
                               "the adapter at the end alone"),
    "enable_jit_checkpoint": Refused(False, "SIGTERM, SIGHUP and Ctrl-C save a checkpoint without it"),
    "fsdp": Refused(None, _SHARDED),
    "fsdp_config": Refused(None, _SHARDED),
    "deepspeed": Refused(None, _SHARDED),
    "parallelism_config": Refused(None, _SHARDED),
}  # fmt: skip


class Range(NamedTuple):
    """What a number may be: of a kind, from `least` (itself included, or not) up to below `limit`."""

    kind: type
    least: float
    included: bool = True
    limit: float | None = None

    def allows(self, value: float) -> bool:
        above = value >= self.least if self.included else value > self.least
        return above and (self.limit is None or value < self.limit)

    def __str__(self) -> str:
        low = f"{self.least:g} or more" if self.included else f"more than {self.least:g}"
        return low if self.limit is None else f"{low} and less than {self.limit:,.10g}"


COUNT, FROM_ZERO = Range(int, 1), Range(int, 0)
SEED = Range(int, 0, limit=2**32)  # numpy's
ABOVE_ZERO, NOT_NEGATIVE = Range(float, 0, included=False), Range(float, 0)
SHARE = Range(float, 0, limit=1)

RANGES = {
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "num_train_epochs": ABOVE_ZERO,
    "learning_rate": ABOVE_ZERO,
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": ABOVE_ZERO,
    "max_grad_norm": NOT_NEGATIVE,  # 0: gradients are not clipped
    "logging_steps": ABOVE_ZERO,  # below 1: a share of all steps
    "eval_steps": ABOVE_ZERO,
    "save_steps": ABOVE_ZERO,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": FROM_ZERO,
    "dataloader_prefetch_factor": COUNT,
    "torch_empty_cache_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
}

# Settings that are mappings, which the command line gives as JSON.
MAPPINGS = (
    "model_init_kwargs",
    "teacher_model_init_kwargs",
    "lr_scheduler_kwargs",
    "gradient_checkpointing_kwargs",
    "activation_checkpointing_kwargs",
)
