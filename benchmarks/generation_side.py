"""Both sides of the generation benchmark, ours and transformers' own, in the main environment.

    .venv/bin/python benchmarks/generation_side.py ours|transformers MODEL ROWS <pipes>

A request answers so many rows greedily and returns the tokens made, end signs included, and the texts.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rl_sides import serve

from springhead.environment import keep_memory
from springhead.llm import generation, students


def main(kind: str, model_folder: str, rows_file: str) -> None:
    """Loads model and rows, and serves."""
    torch.set_num_threads(1)
    if kind == "ours":
        keep_memory()  # as every stage does
    model, tokenizer = students.load(Path(model_folder))
    prompts = [json.loads(line)["prompt"] for line in Path(rows_file).read_text().splitlines()]

    def ours(rows: list[str], new: int) -> tuple[int, list[str]]:
        decoding = generation.Decoding(max_new_tokens=new, batch_rows=len(rows))
        answers = generation.answer(model, tokenizer, rows, decoding)
        return sum(len(one.ids) + (one.finish == "end") for one in answers), [one.text for one in answers]

    @torch.no_grad()
    def library(rows: list[str], new: int) -> tuple[int, list[str]]:
        chats = [[{"role": "user", "content": row}] for row in rows]
        given = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=new, do_sample=False
        )[:, given["input_ids"].shape[1] :]
        ended = (made == tokenizer.eos_token_id).cumsum(1)
        tokens = int((ended == 0).sum() + (ended.max(dim=1).values > 0).sum())
        return tokens, [str(text).strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter(), time.process_time()
        tokens, texts = (ours if kind == "ours" else library)(prompts[: request["rows"]], request["new"])
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        return {"steps": tokens, "seconds": wall, "cpu": cpu, "texts": texts}

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:4])
