"""Inherited settings that the trainers of TRL and Transformers use as a run of ours wants them to.

With ``REFUSED`` and ``HARMLESS`` in pgkd_peft/config_checks.py every one that there is (transformers 5.23, TRL 1.16); a
test demands that each stands in exactly one of the tables.
"""

USED = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
    activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node log_level
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
