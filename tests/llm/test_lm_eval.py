"""EleutherAI's lm-eval, in an environment of its own, loads a fine-tuned folder and runs a local task on it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from springhead.llm import sft, students
from springhead.llm.packing import encode_rows
from tests.llm.tiny import ROWS, tiny_model, tiny_tokenizer

PYTHON = Path(__file__).parents[2] / ".venv-trl/bin/python"


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-trl; `make trl` builds it")
def test_lm_eval_measures_what_the_model_learned(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    examples, _ = encode_rows(ROWS, tokenizer, 128, "error")
    config = sft.SftConfig(steps=120, batch_tokens=200, learning_rate=1e-2)
    model, _ = sft.train(tiny_model(), examples, [], config, 0)
    students.save(model, tokenizer, tmp_path / "model", torch.float32)
    answers = ["5", "4", "8", "7"]  # the last is wrong: Gus has 9
    docs = [{"prompt": row["prompt"], "answer": answer} for row, answer in zip(ROWS, answers, strict=True)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "premises",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40, "do_sample": False},
        "filter_list": [
            {
                "name": "final",
                "filter": [{"function": "regex", "regex_pattern": r"Answer: (\d+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/premises.yaml").write_text(yaml.safe_dump(task))
    command = [
        PYTHON,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={tmp_path / 'model'},dtype=float32",
    ]
    command += ["--tasks", "premises", "--include_path", tmp_path / "tasks", "--apply_chat_template"]
    command += ["--device", "cpu", "--batch_size", "4", "--output_path", tmp_path / "out"]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]["premises"]
    assert results["exact_match,final"] == 0.75
