"""EleutherAI's lm-eval, in an environment of its own, loads a fine-tuned folder and runs our local task on it."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from springhead.jsonio import write_jsonl
from springhead.llm import evaluation, generation, mend, problems, sft, students
from springhead.llm.packing import encode_rows
from tests.llm.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-trl/bin/python"
TASKS = ROOT / "springhead/llm/lm_eval_tasks"
SPEC = {"vocabularies": ("market",), "operators": ("more", "fewer"), "max_value": 12}


@pytest.mark.unit
def test_the_task_reads_what_the_filter_stage_writes_and_the_answer_as_we_do() -> None:
    task = yaml.safe_load((TASKS / "springhead_problems.yaml").read_text())
    assert task["dataset_kwargs"]["data_files"] == {"test": "data/llm/filter/eval.jsonl"}
    pattern = task["filter_list"][0]["filter"][0]["regex_pattern"]
    for text in ("A = 3. Answer: 5", "Answer: 5.", "Answer: 5, or so. Answer: 6", "Answer: yes;\nmore"):
        assert re.findall(pattern, text)[0] == mend.final_answer(text)
    assert re.findall(pattern, "no answer") == []


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-trl; `make trl` builds it")
def test_lm_eval_measures_what_our_evaluation_does(tmp_path: Path) -> None:
    held_out = problems.generate(4, 1, problems.ProblemSpec(split="id", **SPEC))
    rows = [row for problem in held_out for row in mend.eval_rows(problem, 1, 1, 0)]
    write_jsonl(tmp_path / "data/llm/filter/eval.jsonl", rows)
    tokenizer, decoding = tiny_tokenizer(), generation.Decoding(64, 8)
    # It learns some of the very rows, so that it has some right and some wrong.
    taught = [mend.sft_row(problem) for problem in held_out[:2]]
    examples, _ = encode_rows(taught, tokenizer, 200, "error", [str(tokenizer.eos_token)])
    config = sft.SftConfig(steps=120, batch_tokens=200, learning_rate=1e-2)
    model, _ = sft.train(tiny_model(), examples, [], config, 0)
    texts = generation.generate(model, tokenizer, [row["prompt"] for row in rows], decoding)
    right = [line["right"] for line in evaluation.grade(rows, texts)]
    assert 0 < sum(right) < len(right)
    students.save(model, tokenizer, tmp_path / "model", torch.float32)
    command = [PYTHON, "-m", "lm_eval", "--model", "hf"]
    command += ["--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"]
    command += ["--tasks", "springhead_problems", "--include_path", TASKS, "--apply_chat_template"]
    command += ["--device", "cpu", "--batch_size", "4", "--output_path", tmp_path / "out"]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]["springhead_problems"]
    assert results["exact_match,final"] == pytest.approx(sum(right) / len(right))
