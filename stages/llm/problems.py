"""Draw the word problems of every split: train, and the evaluation splits beside it.

Writes `train.jsonl` (split train), `eval.jsonl` (all other splits) and `rows.parquet`. Arithmetic problems come from
random graphs of facts, logic problems from an invented ontology, and, where asked for, problems of public sets; each
carries its statements as a list, spare redundant statements, the gold chain and the answer. Train and evaluation share
no expression (see `springhead.llm.problems`), so no evaluation problem is a re-ordered or renamed training problem.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.llm import gsm8k, logic, problems, prontoqa
from springhead.llm.problems import TRAIN, Problem
from springhead.llm.textrows import write_rows
from springhead.progress import Progress
from springhead.stage import Stage, run_stage

Spec = TypeVar("Spec", problems.ProblemSpec, logic.LogicSpec)


@dataclass(frozen=True)
class Split:
    """Size and difficulty of one split."""

    dag: int
    """Number of arithmetic problems."""
    logic: int
    """Number of logic problems."""
    ops_min: int
    """Fewest operations between the stated numbers and the answer."""
    ops_max: int
    """Most operations."""
    depth_min: int
    """Shortest longest path of operations to the answer."""
    depth_max: int
    """Longest longest path."""
    logic_depth_min: int
    """Fewest rules that a logic proof applies."""
    logic_depth_max: int
    """Most rules."""


@dataclass(frozen=True)
class Public:
    """Problems of a public set, used where its file is at hand."""

    split: str
    """The split they join: train, or an evaluation split of any name."""
    problems: int = 0
    """The first so many; 0 for all."""


PUBLIC: Mapping[str, Callable[[str, Path], list[Problem]]] = MappingProxyType(
    {
        "prontoqa": prontoqa.problems,
        "gsm8k-train": lambda split, root: gsm8k.problems("train", split, root),
        "gsm8k-test": lambda split, root: gsm8k.problems("test", split, root),
    }
)
"""What reads a public set's problems for a split."""


@dataclass(frozen=True)
class Params:
    """Parameters `llm.problems`."""

    splits: dict[str, Split]
    """By name; "train" must be there, every other name is an evaluation split."""
    vocabularies: tuple[str, ...]
    """Worlds of names and items: market, harbour, valley, workshop."""
    operators: tuple[str, ...]
    """Operations between facts: more, fewer, sum, times."""
    holders: int
    """How many names of a world to use; 0 for all."""
    items: int
    """Kinds of item that one problem mixes."""
    max_value: int
    """Upper bound of every number in a problem; none is below 1."""
    max_constant: int
    """Upper bound of the numbers stated as facts."""
    max_step: int
    """Upper bound of k in "k more" and "k fewer"."""
    max_factor: int
    """Upper bound of k in "k times"."""
    redundant: int
    """Spare true statements per problem that the answer does not need."""
    redundant_linked: float
    """Share of them that refers to a fact of the problem instead of stating a number."""
    holdout: float
    """Share of all expressions that is reserved for evaluation splits."""
    public: dict[str, Public] = field(default_factory=dict)
    """Public sets by name (prontoqa, gsm8k-train, gsm8k-test) and where their problems go."""

    def __post_init__(self) -> None:
        for name, chosen in self.public.items():
            if name not in PUBLIC:
                raise BadInput(f"llm.problems.public: unknown set {name!r}; known: {', '.join(PUBLIC)}")
            if chosen.problems < 0:
                raise BadInput(f"llm.problems.public.{name}.problems is {chosen.problems}; use 0 for all")

    def spec(self, name: str) -> problems.ProblemSpec:
        """What the arithmetic generator draws for a split."""
        split = self.splits[name]
        return problems.ProblemSpec(
            vocabularies=self.vocabularies,
            operators=self.operators,
            ops_min=split.ops_min,
            ops_max=split.ops_max,
            depth_min=split.depth_min,
            depth_max=split.depth_max,
            max_value=self.max_value,
            max_constant=self.max_constant,
            max_step=self.max_step,
            max_factor=self.max_factor,
            holders=self.holders,
            items=self.items,
            redundant=self.redundant,
            redundant_linked=self.redundant_linked,
            holdout=self.holdout,
            split=name,
        )

    def logic_spec(self, name: str) -> logic.LogicSpec:
        """What the logic generator draws for a split."""
        split = self.splits[name]
        return logic.LogicSpec(split.logic_depth_min, split.logic_depth_max, self.redundant, self.holdout, name)


def draw(params: Params, seed: int, bar: Progress | None = None) -> dict[str, list[Problem]]:
    """The problems of every split, train first, then the others by name.

    A problem in two splits would be a duplicate evaluation, so a split leaves out what an earlier one has.

    Raises:
        BadInput: no split "train" or no other, or a split without problems.
    """
    if TRAIN not in params.splits or len(params.splits) < 2:
        raise BadInput("llm.problems.splits: needs 'train' and at least one evaluation split; add it")
    drawn: dict[str, list[Problem]] = {}
    seen: set[str] = set()
    for name in sorted(params.splits, key=lambda split: (split != TRAIN, split)):
        size = params.splits[name]
        if size.dag < 0 or size.logic < 0 or size.dag + size.logic == 0:
            raise BadInput(
                f"llm.problems.splits.{name}: no problems (dag {size.dag}, logic {size.logic}); ask for some"
            )
        # A seed per split and family: changing one count leaves the other problems as they are.
        found: list[Problem] = []
        if size.dag:
            found += _fresh(problems.generate, size.dag, _seed(seed, name, "dag"), params.spec(name), seen)
        if size.logic:
            found += _fresh(logic.generate, size.logic, _seed(seed, name, "logic"), params.logic_spec(name), seen)
        drawn[name] = found
        if bar is not None:
            bar.advance(len(found))
    return drawn


def add_public(drawn: dict[str, list[Problem]], params: Params, root: Path) -> None:
    """Adds the problems of the public sets to their splits; one whose facts an earlier split has is left out.

    Raises:
        BadInput: a set cannot be had or read.
    """
    seen = {problems.facts_key(problem) for found in drawn.values() for problem in found}
    for name, chosen in sorted(params.public.items(), key=lambda item: (item[1].split != TRAIN, item[0])):
        found = [p for p in PUBLIC[name](chosen.split, root) if problems.facts_key(p) not in seen]
        drawn.setdefault(chosen.split, []).extend(found[: chosen.problems or None])
        seen.update(problems.facts_key(p) for p in found)


def _seed(seed: int, split: str, family: str) -> int:
    return int(json_digest([seed, split, family])[:16], 16)


def _fresh(
    generate: Callable[[int, int, Spec], list[Problem]], count: int, seed: int, spec: Spec, seen: set[str]
) -> list[Problem]:
    """`count` problems whose facts no earlier split has, by drawing more until there are enough."""
    wanted = count
    while True:
        found = [p for p in generate(wanted, seed, spec) if problems.facts_key(p) not in seen][:count]
        if len(found) == count:
            seen.update(problems.facts_key(p) for p in found)
            return found
        wanted += max(count - len(found), wanted // 4)


def figures(drawn: dict[str, list[Problem]]) -> dict[str, Any]:
    """Sizes, mean operations and depth, and how often the most frequent answer is right, by split and family."""
    table: dict[str, Any] = {}
    for name, found in drawn.items():
        for family in sorted({p.family for p in found}):
            group = [p for p in found if p.family == family]
            table.setdefault(name, {})[family] = {
                "problems": len(group),
                "ops_mean": sum(p.ops for p in group) / len(group),
                "depth_mean": sum(p.depth for p in group) / len(group),
                "commonest_answer_share": Counter(p.answer for p in group).most_common(1)[0][1] / len(group),
            }
    return table


def run(stage: Stage[Params]) -> None:
    """Draw, write and count."""
    total = sum(split.dag + split.logic for split in stage.params.splits.values())
    with stage.progress(total, unit="problems") as bar:
        drawn = draw(stage.params, stage.seed, bar)
    add_public(drawn, stage.params, stage.root)
    train = [p.to_row() for p in drawn[TRAIN]]
    evaluation = [p.to_row() for name, found in drawn.items() if name != TRAIN for p in found]
    write_rows(stage.out, {"train.jsonl": train, "eval.jsonl": evaluation})
    stage.dataset(stage.out / "train.jsonl", "problems-train", len(train), "output")
    stage.dataset(stage.out / "eval.jsonl", "problems-eval", len(evaluation), "output")
    stage.metrics(figures(drawn))


def main() -> None:
    """Entry of the DVC stage."""
    run_stage(run, Params)


if __name__ == "__main__":
    main()
