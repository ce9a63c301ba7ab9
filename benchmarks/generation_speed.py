"""Generation speed beside transformers' ``model.generate``: the same 256 rows, greedy, tokens per second.

    python benchmarks/generation_speed.py                       both students, about 20 minutes on 2 idle cores
    python benchmarks/generation_speed.py --models small-llama

Each side is a process of its own on one core, warm, asked in turns, and answers all rows as one batch. Rows are of
mixed length, as in the fine-tuning benchmark. Tokens are those of the answers, end signs included.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from rl_sides import OURS, ROOT, Side, machine, paired_ratio
from sft_speed import make_model, make_rows, small_llama

from springhead.llm import students

HERE = Path(__file__).parent


def answering_model(name: str, scratch: Path, made: Path) -> Path:
    """The student's folder; a small Llama that is not there is trained for a minute, so that its answers end."""
    if name != "small-llama" or (made / name / "config.json").is_file():
        return make_model(name, scratch / name, made)
    config = small_llama()
    students.build_small(scratch / name, replace(config, problems=400, sft=replace(config.sft, steps=150)), seed=0)
    return scratch / name


def main() -> None:
    """Makes rows and models, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small-llama", "smollm2"])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--new", type=int, default=64, help="longest answer in tokens")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--students", type=Path, default=ROOT / "data/llm/students", help="where they are, if made")
    parser.add_argument("--core", type=int, default=os.cpu_count() - 1)
    arguments = parser.parse_args()
    print(machine([arguments.core], ["torch", "transformers"]))
    print(f"{arguments.rows} rows, at most {arguments.new} new tokens")
    print("| student | ours, tokens/s | generate, tokens/s | ratio (lowest-highest) | ratio of CPU time | same texts |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_rows(4 * ((arguments.rows + 3) // 4), scratch / "rows.jsonl")
        for name in arguments.models:
            model = answering_model(name, scratch, arguments.students)
            script = [HERE / "generation_side.py"]
            ours, library = (
                Side(kind, OURS, [*script, kind, model, scratch / "rows.jsonl"], [arguments.core])
                for kind in ("ours", "transformers")
            )
            for side in (ours, library):
                side.ask(keep=False, rows=8, new=4)
            for _ in range(arguments.turns):
                for side in (ours, library):
                    side.ask(rows=arguments.rows, new=arguments.new)
            wall, cpu = paired_ratio(ours, library), paired_ratio(ours, library, "cpu")
            rates = [sorted(side.rates())[len(side.runs) // 2] for side in (ours, library)]
            same = sum(a == b for a, b in zip(ours.runs[0]["texts"], library.runs[0]["texts"], strict=True))
            spread = f"{wall[0]:.2f} ({wall[1]:.2f}-{wall[2]:.2f})"
            speeds = f"{rates[0]:.0f} | {rates[1]:.0f} | {spread} | {cpu[0]:.2f}"
            print(f"| {name} | {speeds} | {same} of {arguments.rows} |", flush=True)
            for side in (ours, library):
                side.close()


if __name__ == "__main__":
    main()
