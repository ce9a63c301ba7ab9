"""TRL's side of the fine-tuning benchmark; runs in TRL's environment (``make trl``).

    .venv-trl/bin/python benchmarks/sft_trl_side.py MODEL ROWS '{"per_device_train_batch_size": 8, ...}' <pipes>

Everything is TRL's own: tokenisation, packing, collator, trainer, optimizer. A request trains so many steps from the
given model; the clock runs from the first step's begin to the last step's end, so that preparation is not in it.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from datasets import Dataset
from rl_sides import serve
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Wall and processor time of the steps of one call of ``train``, without its first."""

    trainer: SFTTrainer

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Starts the clock at the second step."""
        if state.global_step == 1:  # the first step has allocated what later ones use again
            self.start = time.perf_counter(), time.process_time(), self.trainer._total_train_tokens

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Takes the time; the last call counts."""
        self.end = time.perf_counter(), time.process_time(), self.trainer._total_train_tokens


def main(model_folder: str, rows_file: str, settings: str) -> None:
    """Makes the trainer and serves."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    spoken = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    ]
    base = {
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "train_sampling_strategy": "sequential", "disable_tqdm": True, "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(spoken),
                         args=SFTConfig(**(base | json.loads(settings))), callbacks=[clock])  # fmt: skip
    clock.trainer = trainer

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        trainer.args.max_steps = request["steps"] + 1
        trainer._total_train_tokens = 0
        trainer.train()
        (wall, cpu, tokens), (last_wall, last_cpu, last_tokens) = clock.start, clock.end
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return {"steps": last_tokens - tokens, "seconds": last_wall - wall, "cpu": last_cpu - cpu, "loss": losses[-1:]}

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:4])
