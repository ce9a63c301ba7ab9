"""The engine against TRL's SFTTrainer: same rows, model, order and hyper-parameters, and so the same losses."""

import json
import subprocess
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from springhead.llm import sft
from springhead.llm.adapters import with_lora
from springhead.llm.packing import Example, encode_rows
from springhead.llm.sft import SftConfig
from springhead.llm.tokenizer import CHATML_TRAINING_TEMPLATE
from tests.llm.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TRL = ROOT / ".venv-trl/bin/python"
STEPS = 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TRL.exists(), reason="no .venv-trl; `make trl` builds it"),
]


def some_rows(count: int) -> list[tuple[str, str]]:
    """Questions and answers of very different length."""
    rows = []
    for k in range(count):
        facts = [f"Ana has {k + i} figs." for i in range(1 + 3 * (k % 4))]
        chain = [f"Ben = {k + i} + {i} = {k + 2 * i}." for i in range(1 + k % 3)]
        rows.append((" ".join([*facts, "How many figs does Ben have?"]), " ".join([*chain, f"Answer: {k}"])))
    return rows


@dataclass(frozen=True)
class Case:
    """What TRL is told, and what our engine is told in its own words."""

    trl: dict[str, Any]
    ours: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    messages: bool = False


CASES = {
    "padded": Case({"per_device_train_batch_size": 4}),
    "padded, accumulated, cosine, decay": Case(
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "max_grad_norm": 0.5,
        },
        {"schedule": "cosine", "final_rate": 0.0, "weight_decay": 0.1, "beta2": 0.95, "clip": 0.5, "micro_tokens": 100},
    ),
    "packed": Case({"per_device_train_batch_size": 1, "packing": True, "max_length": 160}),
    "packed, accumulated": Case(
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "packing": True, "max_length": 120}
    ),
    "every assistant turn, by the template": Case(
        {"per_device_train_batch_size": 4, "assistant_only_loss": True}, messages=True
    ),
    "LoRA": Case({"per_device_train_batch_size": 4}, {"lora_rank": 4, "lora_alpha": 8.0}, lora=True),
    "LoRA, packed": Case(
        {"per_device_train_batch_size": 1, "packing": True, "max_length": 160},
        {"lora_rank": 4, "lora_alpha": 8.0},
        lora=True,
    ),
}


def rows_of_step(step: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The rows (ids, labels) that TRL's collator laid into the batches of a step, padding removed."""
    rows = []
    for micro in step["micro"]:
        for ids, labels, where in zip(micro["input_ids"], micro["labels"], micro["rows"], strict=True):
            padded = where[0] == 1  # an attention mask begins with 1, position ids with 0
            bounds = [0, sum(where)] if padded else [*(i for i, p in enumerate(where) if p == 0), len(where)]
            rows += [(tuple(ids[a:b]), tuple(labels[a:b])) for a, b in pairwise(bounds)]
    return rows


def labels_of(example: Example) -> tuple[int, ...]:
    """TRL's form of a mask; the first token of a row is never a target."""
    pairs = zip(example.ids, example.completion_mask, strict=True)
    return tuple(token if trained and i else -100 for i, (token, trained) in enumerate(pairs))


def student(case: Case) -> tuple[Any, Any]:
    """A model and its tokenizer, the same at every call."""
    tokenizer = tiny_tokenizer()
    if case.messages:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template, tokenizer.eos_token = CHATML_TRAINING_TEMPLATE, "<|im_end|>"
        tokenizer.add_tokens(["user", "assistant"])
    return tiny_model(vocab_size=len(tokenizer)), tokenizer


def rows_for(case: Case) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows in TRL's form and in ours."""
    spoken = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in some_rows(40)
    ]
    if case.messages:  # conversations of several turns
        rows = [{"messages": [*one, *other]} for one, other in zip(spoken, spoken[1:] + spoken[:1], strict=True)]
        return rows, rows
    ours = [{"prompt": turns[0]["content"], "completion": turns[1]["content"]} for turns in spoken]
    return [{"prompt": turns[:1], "completion": turns[1:]} for turns in spoken], ours


def config_of(case: Case) -> SftConfig:
    """Our settings; what is not named here is TRL's default too."""
    base = {"steps": STEPS, "batch_tokens": 10**6, "learning_rate": 3e-3, "schedule": "constant", "warmup": 0.0}
    return SftConfig(**{**base, "weight_decay": 0.0, "beta2": 0.999, **case.ours})


def wrapped_student(case: Case) -> tuple[torch.nn.Module, Any]:
    model, tokenizer = student(case)
    return (with_lora(model, 4, 8.0, (), seed=0) if case.lora else model), tokenizer


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TRL made of every case, in one process of its own."""
    home = tmp_path_factory.mktemp("trl")
    requests = {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = home / str(number)
        model, tokenizer = student(case)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_for(case)[0]))
        common = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "max_steps": STEPS, "max_length": 512}
        request = {"model": str(folder / "model"), "rows": str(folder / "rows.jsonl"), "scratch": str(folder / "out")}
        requests[name] = {**request, "config": {**common, **case.trl}}
        if case.lora:
            lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            requests[name] |= {"lora": lora, "adapter": str(folder / "adapter.safetensors")}
            named = wrapped_student(case)[0].named_parameters()
            trained = {name: p.detach().contiguous() for name, p in named if p.requires_grad}
            save_file(trained, folder / "adapter.safetensors")
    (home / "requests.json").write_text(json.dumps(requests))
    command = [TRL, Path(__file__).with_name("trl_side.py"), home / "requests.json", home / "answers.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((home / "answers.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_the_first_losses_are_those_of_trl(name: str, answers: dict[str, Any]) -> None:
    case, steps = CASES[name], answers[name]
    assert len(steps) == STEPS
    wrapped, tokenizer = wrapped_student(case)
    examples, _ = encode_rows(rows_for(case)[1], tokenizer, 512, "error", [str(tokenizer.eos_token)])
    known = {(example.ids, labels_of(example)): example for example in examples}
    trainer = sft.Trainer(wrapped, config_of(case), 0)
    losses, order = [], []
    with sft.packed_attention_on(wrapped):
        for step in steps:
            # Every row that TRL made is one of ours, token for token and label for label.
            rows = [(ids, (-100, *labels[1:])) for ids, labels in rows_of_step(step)]
            order += [examples.index(known[row]) for row in rows]
            losses.append(trainer.train_step([known[row] for row in rows]))
    np.testing.assert_allclose(losses, [step["loss"] for step in steps], rtol=1e-4)
    assert set(order) == set(range(40))
    if not case.trl.get("packing"):
        assert order == [i % 40 for i in range(len(order))]
