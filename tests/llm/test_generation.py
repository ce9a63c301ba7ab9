from typing import Any

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.llm import generation, sft
from springhead.llm.decoders import decoder_for
from springhead.llm.generation import Decoding, answer_ids, choose, generate
from springhead.llm.packing import encode_rows
from tests.llm.tiny import ENDS, ROWS, tiny_model, tiny_tokenizer

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
    assert [given.ids for given in answer_ids(model, ids, Decoding(12, rows), [eos], pad)] == expected
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


@pytest.mark.parametrize("rounded", [False, True], ids=["ties", "bfloat16"])
@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 7}], ids=["top_p", "top_k"])
def test_a_draw_is_the_same_beside_a_row_that_needs_the_whole_order(rounded: bool, cut: dict[str, Any]):
    words = 4000
    logits = torch.zeros(words)
    logits[torch.arange(0, 2000, 50)] = 10.0
    if rounded:
        logits = (3 * torch.randn(words, generator=torch.Generator().manual_seed(0))).bfloat16().float()
    flat, decoding = torch.zeros(words), Decoding(temperature=1.0, **cut)
    alone = [choose(logits[None], decoding, [np.random.default_rng(k)])[0] for k in range(60)]
    beside = [
        choose(torch.stack([logits, flat]), decoding, [np.random.default_rng(k), np.random.default_rng(99)])[0]
        for k in range(60)
    ]
    assert alone == beside
    assert len(set(alone)) > 3


def test_equal_probabilities_are_ranked_by_index():
    shares = torch.tensor([[0.1, 0.3, 0.1, 0.3, 0.0, 0.2]])
    values, indices = generation.ranked(shares, 4)
    assert indices.tolist() == [[1, 3, 5, 0]]
    assert values[0].tolist() == pytest.approx([0.3, 0.3, 0.2, 0.1])
    assert generation.ranked(shares, 6)[1].tolist() == [[1, 3, 5, 0, 2, 4]]


def test_top_p_draws_only_from_the_nucleus_with_the_right_frequencies():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generators = [np.random.default_rng(k) for k in range(4000)]
    draws = generation.choose(logits.repeat(4000, 1), Decoding(temperature=1.0, top_p=0.75), generators)
    assert set(draws) == {0, 1}
    assert draws.count(0) / 4000 == pytest.approx(0.5 / 0.8, abs=0.03)
    cold = generation.choose(logits.repeat(50, 1), Decoding(temperature=0.05), generators[:50])
    assert set(cold) == {0}


def test_rows_stop_at_the_end_sign_and_the_others_go_on():
    tokenizer = tiny_tokenizer()
    examples, _ = encode_rows(ROWS, tokenizer, 128, "error", ENDS)
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


def test_stop_texts_end_a_row_where_they_are_complete_and_are_cut_off(model):
    tokenizer = tiny_tokenizer()
    free = generation.answer(model, tokenizer, PROMPTS, Decoding(12))
    words = free[0].text.split(" ")
    stop = " ".join(words[3:5])  # of two words, so of two tokens
    stopped = generation.answer(model, tokenizer, PROMPTS, Decoding(12, stop=(stop, "never said")))
    assert (stopped[0].text, stopped[0].finish) == (free[0].text[: free[0].text.index(stop)].strip(), "stop")
    assert len(stopped[0].ids) < len(free[0].ids)
    for one, other in zip(stopped[1:], free[1:], strict=True):
        assert one == other or one.finish == "stop"


def test_every_end_sign_of_the_model_ends_a_row(model):
    tokenizer = tiny_tokenizer()
    free = generation.answer(model, tokenizer, PROMPTS, Decoding(12))
    assert {answer.finish for answer in free} <= {"length", "end"}
    other = free[0].ids[4]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    try:
        ended = generation.answer(model, tokenizer, PROMPTS, Decoding(12))
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert (ended[0].ids, ended[0].finish) == (free[0].ids[: free[0].ids.index(other)], "end")


def test_a_row_is_seeded_by_its_key_wherever_it_stands(model):
    tokenizer = tiny_tokenizer()
    decoding = Decoding(10, temperature=1.0, top_k=20)
    keys = ["a", "b", "c", "d"]
    there = generation.answer(model, tokenizer, PROMPTS, decoding, keys=keys)
    back = generation.answer(model, tokenizer, PROMPTS[::-1], decoding, keys=keys[::-1])
    assert [a.ids for a in there] == [a.ids for a in back][::-1]
    assert [a.ids for a in there] != [a.ids for a in generation.answer(model, tokenizer, PROMPTS, decoding)]


def test_cuts_of_the_distribution_keep_the_right_frequencies():
    shares = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    generators = [np.random.default_rng(k) for k in range(3000)]

    def drawn(decoding: Decoding) -> list[float]:
        draws = generation.choose(shares.log().repeat(3000, 1), decoding, generators)
        return [draws.count(token) / 3000 for token in range(4)]

    assert drawn(Decoding(temperature=1.0)) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.04)
    assert drawn(Decoding(temperature=1.0, top_k=2)) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert drawn(Decoding(temperature=1.0, top_p=0.8)) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.04)
    assert drawn(Decoding(temperature=1.0, top_k=1)) == [0, 1, 0, 0]
    assert drawn(Decoding(temperature=1.0, top_p=0.01)) == [0, 1, 0, 0]


def test_nucleus_wider_than_the_short_list_is_sorted_whole():
    logits = torch.linspace(0, 0.5, 3000)[None]
    narrow, wide = (
        [
            generation.choose(logits, Decoding(temperature=1.0, top_p=p), [np.random.default_rng(k)])[0]
            for k in range(200)
        ]
        for p in (0.2, 0.9)
    )
    assert min(narrow) > 3000 - 1024
    assert min(wide) < 1500


@pytest.mark.fault
def test_a_prompt_longer_than_the_context_is_named_and_an_answer_ends_with_it():
    tokenizer = tiny_tokenizer()
    short = tiny_model(max_position_embeddings=24, spread=0.6).eval()
    with pytest.raises(BadInput, match="prompt 1: 41 tokens leave no room in the model's context of 24 for an answer"):
        generate(short, tokenizer, ["Ana", "Ana " * 40], Decoding())
    with pytest.raises(BadInput, match=r"row b/0: 41 tokens leave no room .*; shorten or remove it, or use a model"):
        generation.answer(short, tokenizer, ["Ana", "Ana " * 40], Decoding(), keys=["a/0", "b/0"])
    answer = generation.answer(short, tokenizer, ["Ana " * 17], Decoding(100))[0]
    assert len(answer.ids) <= 24 - 18


def test_the_ragged_cache_keeps_rows_apart_while_others_leave(model):
    tokenizer = tiny_tokenizer()
    prompts = [generation.prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    with torch.no_grad(), decoder_for(model, prompts, 0) as decoder:
        decoder.prefill()
        order = decoder.keep([0, 1, 3])
        assert sorted(order) == [0, 1, 3]
        logits = decoder.step([7, 8, 9])
        order2 = decoder.keep([1, 2])
        logits = decoder.step([5, 6])
    for place, token in zip(order2, (5, 6), strict=True):
        row = [*prompts[order[place]], (7, 8, 9)[place], token]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row])).logits[0, -1]
        torch.testing.assert_close(logits[order2.index(place)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", [7, 512, 1024, 1500, 4096])
def test_the_likeliest_word_is_the_first_of_the_largest(words):
    torch.manual_seed(words)
    logits = torch.randn(40, words).round(decimals=1)  # many words share a value
    logits[0, -1] = 9.0
    logits[1] = -torch.inf
    logits[1, words // 2] = -9.0
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert generation.likeliest(logits).tolist() == expected
    logits[0, -2] = logits[1, 0] = torch.nan
    assert generation.likeliest(logits).tolist() == [words - 2, 0, *expected[2:]]
