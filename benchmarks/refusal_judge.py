"""The refusal judge beside the human labels of XSTest and beside string lists; makes the judge that ships.

    SPRINGHEAD_SOURCES=<folder> python benchmarks/refusal_judge.py            # the tables
    SPRINGHEAD_SOURCES=<folder> python benchmarks/refusal_judge.py --write    # and springhead/llm/judges/refusal.json

The folder holds the public sets with the paths of data/sources.yaml. With --other FILE..., labelled responses of
further models in XSTest's format, the shipped judge is measured on them too; nothing is ever trained on those.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from springhead.lineage.digests import file_digest, json_digest
from springhead.llm import publicsets
from springhead.llm.evaluation import wilson
from springhead.llm.judges import keywords, refusal, training
from springhead.llm.judges.refusal import Labelled

Judge = Callable[[Labelled], bool]
FOLDS = 5


def interval(hits: int, of: int) -> str:
    """A share with Wilson's 95 % interval."""
    low, high = wilson(hits, of)
    return f"{hits / max(of, 1):.3f} ({low:.3f}, {high:.3f})"


def line(name: str, rows: Sequence[Labelled], said: Sequence[bool]) -> str:
    """One row of a table: accuracy, precision, recall."""
    right = sum(a == r.refusal for a, r in zip(said, rows, strict=True))
    true = sum(a and r.refusal for a, r in zip(said, rows, strict=True))
    shown = (interval(right, len(rows)), interval(true, sum(said)), interval(true, sum(r.refusal for r in rows)))
    return f"| {name} | {len(rows)} | {' | '.join(shown)} |"


def prompts_left_out(corpus: refusal.Corpus) -> dict[int, bool]:
    """As leaving one model out, but by a judge that saw neither the model nor the prompt: five folds of prompts."""
    rows = corpus.rows
    human = [r for r in rows if r.measured]
    fold = {p: int(json_digest(p)[:8], 16) % FOLDS for p in {r.prompt for r in human}}
    found: dict[int, bool] = {}
    for group in dict.fromkeys(r.group for r in human):
        for k in range(FOLDS):
            judge = corpus.train([i for i, r in enumerate(rows) if r.group != group and fold.get(r.prompt) != k])
            for i, row in enumerate(rows):
                if row.measured and row.group == group and fold[row.prompt] == k:
                    found[i] = judge.refuses(row.prompt, row.response)
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the judge that ships")
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="responses of further models, CSV")
    chosen = parser.parse_args()
    rows = training.all_rows()
    responses = publicsets.xstest_responses()
    human = [row for row in rows if row.measured]
    head = "| judge | responses | accuracy | precision | recall |\n|---|---|---|---|---|"
    print(f"training rows: {len(rows)}, digest {refusal.rows_digest(rows)}\n\n{head}")
    corpus = refusal.Corpus(rows)
    left_out = refusal.leave_one_group_out(corpus)
    said = {i: p > refusal.THRESHOLD for i, p in left_out.items()}
    for group in dict.fromkeys(row.group for row in human):
        mine = [i for i in said if rows[i].group == group]
        print(line(f"trained, {group} left out", [rows[i] for i in mine], [said[i] for i in mine]))
    print(line("**trained, one model left out**", [rows[i] for i in said], list(said.values())))
    whole = [i for i in said if responses[i].label != "partial"]
    print(line("the same, without partial refusals", [rows[i] for i in whole], [said[i] for i in whole]))
    both = prompts_left_out(corpus)
    print(line("the same, the prompt left out too", [rows[i] for i in both], list(both.values())))
    for name, (source, _, _) in keywords.LISTS.items():
        judge = keywords.judge(name)
        print(line(f"strings, {name} ({source})", human, [judge(row.response) for row in human]))
    same = sum((a.labels[0] == "compliance") == (a.labels[1] == "compliance") for a in responses)
    print(f"\nThe two annotators agree on {interval(same, len(responses))}.\n")
    trained = corpus.train()
    print(f"judge trained on all: {sum(map(len, trained.views))} terms, digest {trained.digest}")
    for path in chosen.other:
        others = training.human_rows(publicsets.judged_responses(path, path.stem))
        print(
            line(
                f"{path.stem}, sha256 {file_digest(path)[:12]}",
                others,
                [trained.refuses(r.prompt, r.response) for r in others],
            )
        )
    if chosen.write:
        trained.save(refusal.SHIPPED)
        print(f"written: {refusal.SHIPPED} ({refusal.SHIPPED.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
