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

from pgkd_peft.cli.arguments import parse_train
from pgkd_peft.cli.train import train
from pgkd_peft.errors import PGKDError, RunFinished


def main() -> None:
    data, model, config = parse_train(sys.argv[1:], prog="privileged_gkd.py", description=__doc__)
    # The rows, a PrivilegedSelfDistillTrainer over them, its train(), save_model() and push_to_hub().
    trainer = train(data, model, config)
    print(f"step {trainer.state.global_step}; the adapter is in {config.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except RunFinished as finished:
        print(finished)
    except PGKDError as error:  # a mistake that the message explains; a traceback would hide it
        sys.exit(f"error: {error}")
