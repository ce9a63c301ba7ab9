"""Our side of the fine-tuning benchmark.

    .venv/bin/python benchmarks/sft_ours_side.py MODEL ROWS ROWS_PER_STEP LEARNING_RATE <pipes>

A request trains so many steps; the clock runs as on TRL's side. Steps take the rows of the file in order, as many as
TRL's do, or with ROWS_PER_STEP 0 as many as fit 1,024 tokens.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from rl_sides import serve

from springhead.environment import keep_memory
from springhead.llm import packing, sft, students


def main(model_folder: str, rows_file: str, rows_per_step: str, learning_rate: str) -> None:
    """Loads model and rows, and serves."""
    torch.set_num_threads(1)
    keep_memory()  # as every stage does
    model, tokenizer = students.load(Path(model_folder))
    rows = packing.read_conversations(Path(rows_file))
    examples, _ = packing.encode_rows(rows, tokenizer, 1024, "error", [str(tokenizer.eos_token)])
    config = sft.SftConfig(steps=10**6, batch_tokens=10**6, learning_rate=float(learning_rate), schedule="constant",
                           warmup=0.0, weight_decay=0.0, beta2=0.999)  # fmt: skip
    trainer = sft.Trainer(model, config, 0)
    if int(rows_per_step):
        size = int(rows_per_step)
        steps = [examples[i : i + size] for i in range(0, len(examples), size)]
    else:
        steps = packing.split_by_tokens(examples, 1024)
    model.train()

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        with sft.packed_attention_on(model):
            trainer.train_step(steps[0])
            start = time.perf_counter(), time.process_time()
            tokens = 0
            for number in range(1, request["steps"] + 1):
                rows = steps[number % len(steps)]
                loss = trainer.train_step(rows)
                tokens += sum(len(row.ids) for row in rows)
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        return {"steps": tokens, "seconds": wall, "cpu": cpu, "loss": [loss]}

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:5])
