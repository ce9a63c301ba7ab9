"""Fine-tuning speed beside TRL's SFTTrainer: same rows, model and hyper-parameters, tokens per second.

    python benchmarks/sft_speed.py                      both students, about ten minutes on 2 idle cores
    python benchmarks/sft_speed.py --models small-llama --turns 2

Each side is a process of its own on one core, warm, asked in turns. Tokens are those of the rows, padding not counted.
Both compute in float32 with AdamW. TRL is measured three times: padded as it comes (it recomputes activations), padded
with that off, and packed with that off.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rl_sides import OURS, ROOT, Side, machine, paired_ratio

from springhead.llm import mend, problems, students
from springhead.params import load, lookup, read_params

TRL = ROOT / ".venv-trl/bin/python"
HERE = Path(__file__).parent


def small_llama() -> students.SmallLlama:
    """The small student as the pipeline has it."""
    return load(students.SmallLlama, lookup(read_params(ROOT / "params.yaml"), "llm.students.small_llama", ""), "")


def make_model(name: str, folder: Path, students_folder: Path) -> Path:
    """The student's folder: the pipeline's if it is there, else made afresh (weights of the small one untrained)."""
    made = students_folder / name
    if (made / "config.json").is_file():
        return made
    if name == "smollm2":
        students.build_smollm2(folder)
    else:
        tokenizer = students.small_tokenizer()
        students.save(students.new_small(small_llama(), tokenizer, 0), tokenizer, folder, students.torch.float32)
    return folder


def make_rows(count: int, path: Path) -> list[dict[str, str]]:
    """Problems of one to four operations with up to four redundant facts: rows of 30 to 300 tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for ops in (1, 2, 3, 4):
        spec = problems.ProblemSpec(vocabularies=("market",), ops_min=ops, ops_max=ops, depth_max=ops)
        for problem in problems.generate(count // 4, ops, spec):
            order = [int(i) for i in rng.permutation(len(problem.statements))]
            order = mend.add_redundancy(problem, order, int(rng.integers(5)), rng)
            prompt, completion = mend.render(problem, order)
            rows.append({"prompt": prompt, "completion": completion})
    rows = [rows[i] for i in rng.permutation(len(rows))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def compare(name: str, arguments: argparse.Namespace, scratch: Path) -> None:
    """Measures one student and prints its table lines."""
    model, rows = make_model(name, scratch / name, arguments.students), scratch / "rows.jsonl"
    rate = 1e-4
    peers: dict[str, tuple[dict[str, Any], str]] = {
        "padded, as it comes": ({"per_device_train_batch_size": 8}, "8"),
        "padded": ({"per_device_train_batch_size": 8, "gradient_checkpointing": False}, "8"),
        "packed": (
            {"per_device_train_batch_size": 1, "gradient_checkpointing": False, "packing": True, "max_length": 1024},
            "0",
        ),
    }
    for title in arguments.peers or peers:
        settings, per_step = peers[title]
        common = {"learning_rate": rate, "logging_steps": 1, "max_length": 1024}
        trl = Side(
            f"TRL, {title}",
            TRL,
            [HERE / "sft_trl_side.py", model, rows, json.dumps(common | settings)],
            [arguments.core],
        )
        ours = Side("ours", OURS, [HERE / "sft_ours_side.py", model, rows, per_step, rate], [arguments.core])
        for side in (ours, trl):
            side.ask(keep=False, steps=1)
        for _ in range(arguments.turns):
            for side in (ours, trl):
                side.ask(steps=arguments.steps)
        wall, cpu = paired_ratio(ours, trl), paired_ratio(ours, trl, "cpu")
        rates = [median(side.rates()) for side in (ours, trl)]
        spread = f"{wall[0]:.2f} ({wall[1]:.2f}-{wall[2]:.2f})"
        print(f"| {name} | {title} | {rates[0]:.0f} | {rates[1]:.0f} | {spread} | {cpu[0]:.2f} |", flush=True)
        for side in (ours, trl):
            side.close()


def main() -> None:
    """Makes rows and models, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small-llama", "smollm2"])
    parser.add_argument("--peers", nargs="+", help="of: 'padded, as it comes', padded, packed")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--students", type=Path, default=ROOT / "data/llm/students", help="where they are, if made")
    parser.add_argument("--core", type=int, default=os.cpu_count() - 1)
    arguments = parser.parse_args()
    print(machine([arguments.core], ["torch", "transformers", "peft"]))
    with tempfile.TemporaryDirectory() as folder:
        make_rows(400, Path(folder) / "rows.jsonl")
        print(
            "| student | TRL's batches | ours, tokens/s | TRL, tokens/s | ratio (lowest-highest) | ratio of CPU time |"
        )
        print("|---|---|---|---|---|---|")
        for name in arguments.models:
            compare(name, arguments, Path(folder))


if __name__ == "__main__":
    main()
