"""What the tests of fine-tuning and its sources of rows do alike."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from springhead.llm import sft
from springhead.llm.packing import Example
from tests.llm.tiny import tiny_model


class Killed(Exception):
    """Stands for the kill of a run."""


def check_resuming(
    examples: Sequence[Example],
    config: sft.SftConfig,
    scratch: Path,
    source: Callable[[], sft.Source] | None = None,
    held_out: Sequence[Example] = (),
) -> Any:
    """A run killed in step 5 goes on to the uninterrupted run's weights, history and state of its source.

    Returns:
        The source of the run that went on, None without one.
    """

    def train(folder: str, log: Callable[..., None]) -> tuple[torch.nn.Module, list[dict[str, float]], Any]:
        made = None if source is None else source()
        model, history = sft.train(tiny_model(), examples, held_out, config, 5, scratch / folder, log=log, source=made)
        return model, history, made

    def kill_in_step_5(step: int, **_: float) -> None:
        if step == 5:
            raise Killed

    whole, history, one = train("whole", lambda step, **_: None)
    with pytest.raises(Killed):
        train("cut", kill_in_step_5)
    steps: list[int] = []
    resumed, resumed_history, other = train("cut", lambda step, **_: steps.append(step))
    # Those after the last checkpoint, which was kept before the kill.
    kept = (5 - 1) // config.checkpoint_every * config.checkpoint_every
    assert steps == list(range(kept + 1, config.steps + 1))
    assert resumed_history == history
    if one is not None:
        assert other.state == one.state
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    return other
