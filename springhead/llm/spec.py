"""What kind of arithmetic problems to draw: the generator's settings and their checks."""

from __future__ import annotations

from dataclasses import dataclass

from springhead.errors import BadInput
from springhead.llm.worlds import check_names, vocabularies

OPERATORS = ("more", "fewer", "sum", "times")
TRAIN = "train"


@dataclass(frozen=True)
class ProblemSpec:
    """What kind of problems to draw.

    `ops` counts the operations between the stated numbers and the answer; `depth` is the longest path of
    operations to the answer. Numbers: every value of the graph lies in 1..max_value.
    """

    vocabularies: tuple[str, ...] = ("market", "harbour", "valley", "workshop")
    operators: tuple[str, ...] = ("more", "fewer", "sum")
    ops_min: int = 2
    ops_max: int = 3
    depth_min: int = 1
    depth_max: int = 3
    max_value: int = 20
    max_constant: int = 9
    max_step: int = 5
    max_factor: int = 3
    holders: int = 0
    """How many holders of a vocabulary to use; 0 means all."""
    items: int = 1
    """How many kinds of item one problem mixes; with more than one, chain labels name the item too."""
    redundant: int = 4
    redundant_linked: float = 0.5
    """Share of redundant statements that refer to a node of the problem instead of stating a number."""
    holdout: float = 0.2
    """Share of all expressions that belongs to the evaluation side."""
    split: str = TRAIN
    """Name of the split; "train" draws from the training side, any other name from the evaluation side."""

    def __post_init__(self) -> None:
        check_names("llm.problems vocabularies", self.vocabularies, tuple(vocabularies()))
        check_names("llm.problems operators", self.operators, OPERATORS)
        self._check_ranges()
        self._check_room()

    def _check_ranges(self) -> None:
        rules = {
            "ops_min must be in 1..ops_max": 1 <= self.ops_min <= self.ops_max,
            "depth_min must be in 1..depth_max": 1 <= self.depth_min <= self.depth_max,
            "depth_min must not exceed ops_min": self.depth_min <= self.ops_min,
            "depth_max must be at least 2 where ops_max is": self.depth_max >= min(2, self.ops_max),
            "max_constant must be in 2..max_value": 2 <= self.max_constant <= self.max_value,
            "max_step must be at least 2": self.max_step >= 2,
            "max_factor must be at least 2": self.max_factor >= 2,
            "redundant must not be negative": self.redundant >= 0,
            "redundant_linked must be in 0..1": 0.0 <= self.redundant_linked <= 1.0,
            "holdout must be strictly between 0 and 1": 0.0 < self.holdout < 1.0,
            "items must be at least 1": self.items >= 1,
            "holders must not be negative": self.holders >= 0,
        }
        for rule, holds in rules.items():
            if not holds:
                raise BadInput(f"llm.problems: {rule} (split {self.split!r})")
        if "sum" not in self.operators and self.depth_max < self.ops_max:
            raise BadInput(
                f"llm.problems: without the operator 'sum' a problem is one path, so depth equals ops; "
                f"raise depth_max to {self.ops_max} or add 'sum' (split {self.split!r})"
            )

    def _check_room(self) -> None:
        for name in self.vocabularies:
            world = vocabularies()[name]
            if self.items > len(world.items):
                has = f"vocabulary {name!r} has {len(world.items)} items"
                raise BadInput(f"llm.problems: {has}, asked for {self.items}")
            holders = min(self.holders, len(world.holders)) if self.holders else len(world.holders)
            # Worst case: every operation is a sum of fresh leaves, which makes ops + 1 leaves.
            needed = 2 * self.ops_max + 1 + self.redundant
            if holders * self.items < needed:
                raise BadInput(
                    f"llm.problems: up to {needed} nodes ({self.ops_max} operations, {self.redundant} redundant) "
                    f"do not fit {holders} holders x {self.items} items of vocabulary {name!r}; "
                    "lower ops_max or redundant, or raise holders or items"
                )
