from pathlib import Path

import pytest
import torch

from springhead.errors import BadInput
from springhead.llm import asking, freerunning, generation, students
from springhead.llm.packing import encode_rows
from tests.llm.tiny import ROWS, save_tiny

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_a_gpu_answers_in_bfloat16(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype) -> None:
    asked = []
    monkeypatch.setattr(students, "pick_device", torch.device)
    monkeypatch.setattr(students, "load", lambda *how: asked.append(how))
    students.load_to_ask(Path("folder"), device)  # type: ignore[arg-type]
    assert asked == [(Path("folder"), device, dtype)]
    assert students.numerics(device)["dtype"] in str(dtype)  # type: ignore[arg-type]


def test_a_model_in_bfloat16_is_asked_and_its_gap_measured(tmp_path: Path) -> None:
    model, tokenizer = students.load(save_tiny(tmp_path / "tiny", spread=0.6), dtype=torch.bfloat16)
    decoding = generation.Decoding(8, 2)
    texts = asking.ask(ROWS, model, tokenizer, decoding, "d1", tmp_path / "scratch")
    assert texts == generation.generate(model, tokenizer, [row["prompt"] for row in ROWS], decoding)
    how = asking.described(model, decoding)
    assert (how["device"], how["dtype"], how["max_new_tokens"]) == ("cpu", "bfloat16", 8)
    examples, _ = encode_rows(ROWS, tokenizer, 200, "error", [str(tokenizer.eos_token)])
    ends = generation.end_ids(model, tokenizer)
    assert freerunning.summary(freerunning.runs(model, examples, decoding, ends, ends[0]), 0)["rows"] == len(ROWS)


def test_what_was_made_once_is_read(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> list[int]:
        calls.append(1)
        return [3, 4]

    assert [asking.kept(tmp_path / "a/b.json", make) for _ in range(2)] == [[3, 4], [3, 4]]
    assert len(calls) == 1


@pytest.mark.fault
def test_a_prompt_that_is_too_long_is_named_before_anything_is_answered(tmp_path: Path) -> None:
    model, tokenizer = students.load(save_tiny(tmp_path / "tiny"))
    rows = [*ROWS, {"id": "x", "prompt": "Ana " * 600}]
    with pytest.raises(BadInput, match=r"row x: 601 tokens leave no room in the model's context of 512"):
        asking.ask(rows, model, tokenizer, generation.Decoding(8), "d1", tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
