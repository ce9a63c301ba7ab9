"""The models of an evaluation: a base, and everything that was fine-tuned from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from springhead.errors import BadInput

BASE, BASE_SEED = "base", -1


@dataclass(frozen=True)
class Candidate:
    """A model to examine; the base's method is `BASE` and its seed `BASE_SEED`."""

    method: str
    seed: int
    folder: Path

    @property
    def who(self) -> dict[str, str | int]:
        """Method and seed, as tables of results name it."""
        return {"method": self.method, "seed": self.seed}


def candidates(base: Path, tuned: Sequence[Path], control: str, stage: str) -> list[Candidate]:
    """The base, then every `<method>/<seed>/model` folder at or below the given ones, by method and seed.

    Args:
        base: the base's folder.
        tuned: where fine-tuned models are looked for; hidden folders are left out.
        control: the method that comes first.
        stage: what makes the models, for the message.

    Raises:
        BadInput: there is no fine-tuned model.
    """
    found = set()
    for root in tuned:
        for config in root.rglob("model/config.json"):
            folder = config.parent
            if not any(part.startswith(".") for part in folder.relative_to(root).parts):
                found.add(folder)
    if not found:
        raise BadInput(f"no fine-tuned model among the dependencies; run {stage}")
    models = [Candidate(folder.parents[1].name, int(folder.parent.name), folder) for folder in found]
    models.sort(key=lambda c: (c.method != control, c.method, c.seed))
    return [Candidate(BASE, BASE_SEED, base), *models]
