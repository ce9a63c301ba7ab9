"""TRL's SFTTrainer on given rows; runs in TRL's environment (``make trl``).

    .venv-trl/bin/python tests/llm/trl_side.py requests.json answers.json

Each request names a model folder, a JSON-lines file, and fields of ``SFTConfig`` and ``LoraConfig``. Its answer has,
for every optimizer step, the loss that was differentiated and the micro-batches that the collator made: token ids,
labels and where each row begins.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Recorder(SFTTrainer):
    """TRL's trainer, unchanged but for a note of every micro-batch and its loss."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.micro: list[dict[str, Any]] = []
        super().__init__(*arguments, **options)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        kept = {name: inputs[name].tolist() for name in ("input_ids", "labels")}
        kept["rows"] = inputs["position_ids" if "position_ids" in inputs else "attention_mask"].tolist()
        loss = super().compute_loss(model, inputs, *arguments, **options)
        self.micro.append({**kept, "loss": float(loss.detach())})
        return loss


class Steps(TrainerCallback):
    """Cuts the record of micro-batches into optimizer steps."""

    def __init__(self) -> None:
        self.trainer: Recorder | None = None
        self.steps: list[dict[str, Any]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        micro, self.trainer.micro = self.trainer.micro, []
        # Each micro-batch was divided by the tokens of the whole step, so the sum is the step's mean.
        self.steps.append({"loss": sum(part.pop("loss") for part in micro), "micro": micro})


def main(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains as asked and returns the steps."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    rows = [json.loads(line) for line in Path(request["rows"]).read_text().splitlines()]
    settings = {
        "output_dir": request["scratch"], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "train_sampling_strategy": "sequential", "logging_steps": 1,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    steps = Steps()
    trainer = Recorder(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        args=SFTConfig(**(settings | request["config"])), callbacks=[steps],
        peft_config=LoraConfig(**request["lora"]) if request.get("lora") else None,
    )  # fmt: skip
    if "adapter" in request:  # the same initial LoRA weights on both sides
        from safetensors.torch import load_file

        given = load_file(request["adapter"])
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(given.pop(name))
        assert not given, f"not TRL's: {sorted(given)}"
    steps.trainer = trainer
    trainer.train()
    return steps.steps


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({name: main(request) for name, request in requests.items()}))
