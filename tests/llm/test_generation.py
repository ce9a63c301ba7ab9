import pytest
import torch

from springhead.errors import BadInput
from springhead.llm import generation, sft
from springhead.llm.generation import Decoding, generate, generate_ids
from springhead.llm.packing import encode_rows
from tests.llm.tiny import ROWS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit
PROMPTS = [row["prompt"] for row in ROWS]


@pytest.fixture(scope="module")
def model():
    # Wide initial weights make arg-max margins large against float noise and answers differ between prompts.
    return tiny_model(spread=0.6).eval()


@torch.no_grad()
def slow_greedy(model, ids: list[int], count: int, eos: int) -> list[int]:
    """One row, no cache, no padding: what greedy decoding means."""
    given = list(ids)
    while len(given) - len(ids) < count:
        token = int(model(input_ids=torch.tensor([given])).logits[0, -1].argmax())
        if token == eos:
            break
        given.append(token)
    return given[len(ids) :]


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_greedy_equals_the_uncached_model_whatever_the_batch(model, rows):
    tokenizer = tiny_tokenizer()
    ids = [generation.prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    assert len({len(x) for x in ids}) > 1
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    expected = [slow_greedy(model, x, 12, eos) for x in ids]
    assert generate_ids(model, ids, Decoding(12, rows), eos, pad) == expected
    assert len({tuple(x) for x in expected}) > 1


def test_sampling_depends_on_seed_and_row_but_not_on_the_batch(model):
    tokenizer = tiny_tokenizer()
    prompts = [PROMPTS[1]] * 3 + PROMPTS
    runs = [
        generate(model, tokenizer, prompts, Decoding(10, rows, 1.0, 0.95, seed))
        for rows, seed in ((7, 0), (2, 0), (7, 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(set(runs[0][:3])) == 3


def test_top_p_draws_only_from_the_nucleus_with_the_right_frequencies():
    import numpy as np

    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generators = [np.random.default_rng(0)]
    draws = [generation.choose(logits, Decoding(temperature=1.0, top_p=0.75), generators)[0] for _ in range(4000)]
    assert set(draws) == {0, 1}
    assert draws.count(0) / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)
    cold = [generation.choose(logits, Decoding(temperature=0.05), generators)[0] for _ in range(50)]
    assert set(cold) == {0}


def test_rows_stop_at_the_end_sign_and_the_others_go_on():
    tokenizer = tiny_tokenizer()
    examples, _ = encode_rows(ROWS, tokenizer, 128, "error")
    config = sft.SftConfig(steps=120, batch_tokens=200, learning_rate=1e-2)
    model, _ = sft.train(tiny_model(), examples, [], config, 0)
    texts = generate(model, tokenizer, PROMPTS, Decoding(40, 4))
    assert texts == [row["completion"] for row in ROWS]
    assert generate(model, tokenizer, PROMPTS[:1], Decoding(3)) == ["Ana = 3"]


def test_bad_requests_are_refused(model):
    with pytest.raises(BadInput, match="no prompts"):
        generate(model, tiny_tokenizer(), [], Decoding())
    with pytest.raises(ValueError, match="top_p"):
        Decoding(top_p=0.0)
