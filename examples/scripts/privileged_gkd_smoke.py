"""One training step on in-memory data: does the installation work?

python examples/scripts/privileged_gkd_smoke.py                                # the built-in demo model
python examples/scripts/privileged_gkd_smoke.py --model Qwen/Qwen2-0.5B-Instruct
"""

from __future__ import annotations

import argparse
import tempfile

from datasets import Dataset

from pgkd_peft import PrivilegedGKDConfig, PrivilegedSelfDistillTrainer
from pgkd_peft.model.demo import demo_model_path

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Explain Newton's method."},
            {"role": "assistant", "content": "Newton's method iteratively uses local slope information."},
        ],
        "privileged_messages": [
            {"role": "user", "content": "补充收敛条件"},
            {"role": "assistant", "content": "在根附近且导数不为 0 时可实现二阶收敛。"},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": "What is quicksort?"},
            {"role": "assistant", "content": "Quicksort partitions the array around a pivot."},
        ],
        "privileged_messages": [
            {"role": "user", "content": "补充复杂度"},
            {"role": "assistant", "content": "平均 O(nlogn)，最坏 O(n^2)。"},
        ],
    },
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--model_name_or_path", help="path or Hub id; default: the built-in demo model")
    parser.add_argument("--output_dir", default=None, help="default: a temporary folder")
    args = parser.parse_args()

    model = args.model or demo_model_path()
    with tempfile.TemporaryDirectory() as scratch:
        config = PrivilegedGKDConfig(
            output_dir=args.output_dir or scratch,
            lmbda=1.0,
            share_student_as_teacher=True,
            privileged_key="privileged_messages",
            max_privileged_length=512,
            max_new_tokens=32,
            per_device_train_batch_size=2,
            max_steps=1,
            logging_steps=1,
            rollout_log_steps=1,
            rollout_log_samples=2,
            save_strategy="no",
            report_to="none",
        )
        trainer = PrivilegedSelfDistillTrainer(
            model=model, teacher_model=model, args=config, train_dataset=Dataset.from_list(ROWS)
        )
        result = trainer.train()
        trainer.save_model()
        print(f"one step done, loss {result.training_loss:.4f} nats/token; the adapter is saved, the base unchanged")


if __name__ == "__main__":
    main()
