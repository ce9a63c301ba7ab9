"""Make a student: the model that fine-tuning starts from.

Writes a Hugging Face model folder (`config.json`, `model.safetensors`, tokenizer with chat template). The small
Llama is pre-trained here on easy problems of the training side; SmolLM2 is converted from the installed package;
others come from the Hugging Face hub, pinned in `hub`.
"""

from dataclasses import dataclass
from typing import Any

from springhead.llm import students
from springhead.llm.students import HubModel, SmallLlama
from springhead.stage import Stage, run_stage


@dataclass(frozen=True)
class Params:
    """Parameters `llm.students`."""

    small_llama: SmallLlama
    """Shape and pre-training of `small-llama`."""
    hub: dict[str, HubModel]
    """Further students by name, each a pinned model of the Hugging Face hub."""


def figures(parameters: int, history: students.sft.History) -> dict[str, Any]:
    """Size, and for a model pre-trained here its length of training and held-out loss."""
    values: dict[str, Any] = {"parameters": parameters}
    if history:
        last = history[-1]
        values |= {"steps": int(last["step"]), "tokens": int(last["tokens"]), "eval_loss": last["eval_loss"]}
    return values


def run(stage: Stage[Params]) -> None:
    """Build the student named by the item."""
    student, small = stage.item["student"], stage.params.small_llama
    pretrained = student == "small-llama"
    with stage.progress(small.sft.steps if pretrained else 1, f"{student}", "step") as bar:
        history = students.build(student, stage.out, small, stage.params.hub, stage.seed, stage.scratch, bar, stage.log)
    model, _ = students.load(stage.out)
    stage.metrics(figures(model.num_parameters(), history))
    stage.model(stage.out, "language-model", student=student, method="base")


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
