"""Full training on a Hub or local data set, in Python. (The command line does the same: `pgkd train --config FILE`.)

    python examples/scripts/privileged_gkd.py \\
        --model_name_or_path Qwen/Qwen2-0.5B-Instruct \\
        --dataset_name path/to/rows.jsonl \\
        --output_dir privileged-gkd-model \\
        --lmbda 1.0 --beta 0.5 --max_new_tokens 128 --rollout_log_steps 20

Rows hold `messages` and, where there is privileged information, `privileged_messages`. Any field of
PrivilegedGKDConfig and of TRL's ModelConfig is a flag, and `--config recipe.yaml` works too; `--help` lists them.
"""

from __future__ import annotations

import sys

from pgkd_peft import PrivilegedSelfDistillTrainer
from pgkd_peft.cli.arguments import lora_config, parse_train
from pgkd_peft.cli.train import evaluation_callbacks, load_datasets
from pgkd_peft.errors import ConfigError, PGKDError


def main() -> None:
    data, model, config = parse_train(sys.argv[1:], prog="privileged_gkd.py", description=__doc__)
    if data.control is not None:
        raise ConfigError(f"--control {data.control} is for `pgkd train`, which keeps a control apart from the run")
    train_dataset, held_out = load_datasets(data, config)
    trainer = PrivilegedSelfDistillTrainer(
        model=model.model_name_or_path,
        teacher_model=model.model_name_or_path,
        args=config,
        train_dataset=train_dataset,
        eval_dataset=held_out if config.eval_strategy != "no" else None,
        callbacks=evaluation_callbacks(data, config, held_out),
        peft_config=lora_config(model),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    try:
        main()
    except PGKDError as error:  # a mistake that the message explains; a traceback would hide it
        sys.exit(f"error: {error}")
