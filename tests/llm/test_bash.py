from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from springhead.errors import BadInput
from springhead.llm import bash, sft
from springhead.llm.bash import Bash, BashConfig, Draft, Vocabulary, of_method, one_pass, replaceable, sequential
from springhead.llm.packing import Example, encode_rows, pack
from springhead.llm.sft import SftConfig
from tests.llm.runs import check_resuming
from tests.llm.tiny import ENDS, ROWS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit
TRAINING = SftConfig(steps=8, batch_tokens=60, learning_rate=1e-2)
ALL = BashConfig(beta_from=1.0, beta_to=1.0, share=1.0, refresh=3)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return encode_rows(ROWS, tiny_tokenizer(), 128, "error", ENDS)[0]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(tiny_model(), tiny_tokenizer(), protect_digits=False)


def texts(ids) -> list[str]:
    return list(tiny_tokenizer().convert_ids_to_tokens([int(i) for i in ids]))


def source(examples, vocabulary, config: BashConfig = ALL, seed: int = 0) -> Bash:
    return Bash(examples, vocabulary, config, TRAINING.steps, TRAINING.batch_tokens, seed)


def drafts_of(examples, vocabulary, seed: int, rate: float = 1.0) -> list[Draft]:
    drafts = []
    for number, example in enumerate(examples):
        generator = np.random.default_rng([seed, number])
        drawn = (generator.random(len(example.ids)) < rate) & replaceable(example, vocabulary)
        drafts.append(Draft(example, drawn, generator, list(example.ids)))
    return [draft for draft in drafts if draft.drawn.any()]


def test_prompt_first_token_end_sign_and_by_option_digits_are_never_replaced(examples, vocabulary):
    # Row b: "... <answer> Cal = 4 . Answer: 4 <eos>"; Cal is the first token of the answer.
    places = np.flatnonzero(replaceable(examples[1], vocabulary))
    assert texts(np.array(examples[1].ids)[places]) == ["=", "4", ".", "Answer:", "4"]
    words = Vocabulary.of(tiny_model(), tiny_tokenizer(), protect_digits=True)
    places = np.flatnonzero(replaceable(examples[1], words))
    assert texts(np.array(examples[1].ids)[places]) == ["=", ".", "Answer:"]
    # In a conversation the first token of every answer is kept.
    turns = [("user", "Ana"), ("assistant", "3 + 2"), ("user", "Ben"), ("assistant", "5 .")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    example = encode_rows([row], tiny_tokenizer(), 128, "error", ENDS)[0][0]
    assert texts(np.array(example.ids)[replaceable(example, vocabulary)]) == ["+", "2", "."]


def test_no_special_token_and_by_option_no_digit_is_put_in(examples):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for protect in (False, True):
        words = Vocabulary.of(model, tokenizer, protect)
        drawn = set()
        for seed in range(40):
            drafts = drafts_of(examples, words, seed)
            one_pass(model, drafts, words, 5.0)
            drawn |= {t for d in drafts for t, place in zip(d.read, d.drawn, strict=True) if place}
        assert not drawn & set(tokenizer.all_special_ids)
        assert any(text.isdigit() for text in texts(drawn)) is not protect


def test_the_model_reads_the_mix_and_is_trained_on_the_gold_tokens():
    # Prompt 5 6, answer 7 8 9: after reading 7, the model read 4 in the place of 8, and 9 is still the target.
    row = Example((5, 6, 7, 8, 9), (False, False, True, True, True), context=(5, 6, 7, 4, 9))
    batch = pack([row])
    assert batch.input_ids.tolist() == [[5, 6, 7, 4, 9]]
    assert batch.labels.tolist() == [7, 8, 9]
    assert batch.predictors.tolist() == [1, 2, 3]
    model = tiny_model(vocab_size=12)
    with torch.no_grad(), sft.packed_attention_on(model):
        got = float(sft.loss_sum(model, batch))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 4]])).logits[0, 1:]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8, 9]), reduction="sum")
    assert got == pytest.approx(float(expected), rel=1e-5)


def test_greedy_one_pass_puts_in_what_the_model_says_after_the_gold_tokens(examples, vocabulary):
    model = tiny_model(spread=0.5)
    drafts = drafts_of(examples, vocabulary, 0)
    one_pass(model, drafts, vocabulary, 0.0)
    for draft in drafts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([draft.example.ids])).logits[0]
        said = logits.masked_fill(~vocabulary.words, -torch.inf).argmax(-1).tolist()
        gold = list(draft.example.ids)
        assert draft.read == [said[t - 1] if draft.drawn[t] else gold[t] for t in range(len(gold))]


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_greedy_sequential_puts_in_what_the_model_says_after_what_it_read(examples, vocabulary, rate):
    model = tiny_model(spread=0.5)
    together, alone = (drafts_of(examples, vocabulary, 1, rate) for _ in range(2))
    sequential(model, together, vocabulary, 0.0, 256)
    sequential(model, alone, vocabulary, 0.0, 1)
    assert [d.read for d in together] == [d.read for d in alone]
    for draft in together:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([draft.read])).logits[0]
        said = logits.masked_fill(~vocabulary.words, -torch.inf).argmax(-1).tolist()
        gold = list(draft.example.ids)
        assert draft.read == [said[t - 1] if draft.drawn[t] else gold[t] for t in range(len(gold))]


def test_one_pass_and_sequential_agree_up_to_the_first_change_and_differ_after_it(examples, vocabulary):
    model, differ = tiny_model(spread=0.5), 0
    for seed in range(5):
        one, two = (drafts_of(examples, vocabulary, seed) for _ in range(2))
        one_pass(model, one, vocabulary, 1.0)
        sequential(model, two, vocabulary, 1.0, 256)
        for a, b in zip(one, two, strict=True):
            first = int(a.drawn.argmax())
            assert a.read[: first + 1] == b.read[: first + 1]
            differ += a.read != b.read
    assert differ > 0


def test_the_share_of_tokens_drawn_is_beta_and_of_rows_the_share(examples, vocabulary):
    many = examples * 100
    config = BashConfig(beta_from=0.3, beta_to=0.3, share=0.5, refresh=8)
    mixed = Bash(many, vocabulary, config, 8, 1000, 0)
    batches = mixed.next_batches(tiny_model(), 0)
    rows = [row for batch in batches for row in batch]
    free = np.mean([replaceable(row, vocabulary).sum() for row in rows])
    state = mixed.state
    assert state["rows"] == len(rows)
    assert state["rewritten"] / len(rows) == pytest.approx(0.5, abs=0.1)
    assert state["drawn"] / (state["rewritten"] * free) == pytest.approx(0.3, abs=0.05)
    assert state["changed"] == sum(a != b for row in rows for a, b in zip(row.read, row.ids, strict=True))
    assert 0 < state["changed"] <= state["drawn"]


def test_noise_changes_as_many_tokens_as_the_draws_would_have(examples, vocabulary):
    model, put, elsewhere = tiny_model(), set(), 0
    for seed in range(10):
        own, noise = (drafts_of(examples, vocabulary, seed, 0.5) for _ in range(2))
        one_pass(model, own, vocabulary, 1.0)
        bash.uniform(model, noise, vocabulary, 1.0)
        assert [d.changed for d in noise] == [d.changed for d in own]
        for draft in noise:
            moved = {t for t in range(len(draft.read)) if draft.read[t] != draft.example.ids[t]}
            assert moved <= set(np.flatnonzero(replaceable(draft.example, vocabulary)))
            put |= {draft.read[t] for t in moved}
            elsewhere += not moved <= set(np.flatnonzero(draft.drawn))
    assert elsewhere > 0
    assert len(put) > 40


def test_beta_rises_on_a_line_after_a_plain_start(examples, vocabulary):
    config = BashConfig(beta_from=0.0, beta_to=0.6, share=1.0, refresh=2, start=0.25)
    mixed = source(examples, vocabulary, config)
    assert [mixed.beta(step) for step in range(2, 8)] == pytest.approx([0.0, 0.12, 0.24, 0.36, 0.48, 0.6])
    plain = mixed.next_batches(tiny_model(), 0)
    assert len(plain) == 2
    assert all(not row.context for batch in plain for row in batch)
    assert len(mixed.next_batches(tiny_model(), 2)) == 2


def test_rows_and_batches_are_those_of_plain_fine_tuning(examples, vocabulary):
    steps: dict[str, list[int]] = {}

    def tokens(name, given):
        _, history = sft.train(tiny_model(), examples, [], TRAINING, 3, source=given)
        steps[name] = [line["tokens"] for line in history]

    tokens("plain", None)
    tokens("mixed", source(examples, vocabulary, ALL, seed=3))
    assert steps["plain"] == steps["mixed"]
    nothing = replace(ALL, beta_from=0.0, beta_to=0.0)
    one, _ = sft.train(tiny_model(), examples, [], TRAINING, 3)
    two, _ = sft.train(tiny_model(), examples, [], TRAINING, 3, source=source(examples, vocabulary, nothing, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_methods_share_their_settings():
    config = BashConfig(refresh=7, beta_to=0.3)
    assert of_method("bash", config) == config
    assert of_method("bash-sequential", config).mixing == "sequential"
    assert of_method("noise", config).tokens == "uniform"
    assert of_method("scheduled", config) == replace(config, refresh=1)
    with pytest.raises(ValueError, match=r"beta_from and beta_to must be in 0\.\.1"):
        BashConfig(beta_to=1.5)
    for temperature in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature must be at least 0, and finite"):
            BashConfig(temperature=temperature)
    with pytest.raises(ValueError, match="tokens uniform goes with mixing one-pass"):
        BashConfig(tokens="uniform", mixing="sequential")


@pytest.mark.fault
@pytest.mark.parametrize("method", bash.METHODS)
@pytest.mark.parametrize("every", [2, 3])
def test_killed_and_resumed_equals_uninterrupted(examples, vocabulary, tmp_path: Path, method, every):
    # Snapshots are of steps 0, 3 and 6: a checkpoint of step 2 or 4 lies between two, one of step 3 on one.
    mixing = of_method(method, ALL)
    config = replace(TRAINING, checkpoint_every=every)
    check_resuming(examples, config, tmp_path, lambda: source(examples, vocabulary, mixing))


@pytest.mark.fault
def test_a_checkpoint_of_another_mix_is_not_continued(examples, vocabulary, tmp_path: Path):
    config = replace(TRAINING, steps=4, checkpoint_every=2)
    sft.train(tiny_model(), examples, [], config, 0, tmp_path, source=source(examples, vocabulary))
    for other in (None, source(examples, vocabulary, replace(ALL, share=0.5))):
        with pytest.raises(BadInput, match="checkpoint of a run with other settings or rows"):
            sft.train(tiny_model(), examples, [], config, 0, tmp_path, source=other)


def test_lora_and_padded_batches_mix_too(examples, vocabulary):
    for changes in ({"lora_rank": 2}, {"packing": False}):
        config = replace(TRAINING, **changes)
        mixed = source(examples, vocabulary)
        _, history = sft.train(tiny_model(), examples, [], config, 0, source=mixed)
        assert len(history) == TRAINING.steps
        assert mixed.state["changed"] > 0
