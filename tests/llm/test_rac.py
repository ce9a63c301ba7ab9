from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from springhead.bounds import OutOfRange
from springhead.errors import BadInput
from springhead.llm import chat, generation, rac, sft
from springhead.llm.packing import Example, encode, encode_rows, pack
from springhead.llm.rac import Form, Rac, RacConfig
from springhead.llm.sft import SftConfig
from tests.llm.runs import check_resuming
from tests.llm.tiny import ENDS, ROWS, byte_tokenizer, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit
TRAINING = SftConfig(steps=8, batch_tokens=160, learning_rate=1e-2)
CONFIG = RacConfig(cue="Answer:", share=1.0, refresh=3, max_new_tokens=8)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return encode_rows(ROWS, tiny_tokenizer(), 128, "error", ENDS)[0]


@pytest.fixture(scope="module")
def form() -> Form:
    return Form.of(tiny_model(), tiny_tokenizer(), CONFIG.cue)


def text(ids) -> str:
    return " ".join(token.replace(" ", "_") for token in tiny_tokenizer().convert_ids_to_tokens(list(ids)))


def source(
    examples, form, config: RacConfig = CONFIG, right=None, seed: int = 0, max_length: int = 200, steps: int = 8
) -> Rac:
    given = right or rac.same_answer(tiny_tokenizer(), form.ends)
    return Rac(examples, form, given, config, steps, TRAINING.batch_tokens, max_length, seed)


def rows_of(batches) -> tuple[list[Example], list[Example]]:
    """The plain rows and the corrections."""
    rows = [row for batch in batches for row in batch]
    cue = tiny_tokenizer().convert_tokens_to_ids("<answer>")
    return [r for r in rows if r.ids.count(cue) == 1], [r for r in rows if r.ids.count(cue) == 2]


def test_a_correction_shows_answer_and_cue_and_trains_the_reference_alone(examples, form):
    prompt, reference = rac.split(examples[1])
    assert text(reference) == "Cal = 4 . Answer: 4 <eos>"
    shown = tiny_tokenizer()("Cal = 5.")["input_ids"]
    row = rac.correction(prompt, shown, reference, form)
    asked = "Cal has 4 nuts . How_many_nuts_does Cal have? <answer>"
    assert text(row.ids) == f"{asked} Cal = 5 . <eos> Answer: <answer> Cal = 4 . Answer: 4 <eos>"
    trained = [t for t, m in zip(row.ids, row.completion_mask, strict=True) if m]
    assert text(trained) == "Cal = 4 . Answer: 4 <eos>"
    assert text(form.asked_again(prompt, shown)) == f"{asked} Cal = 5 . <eos> Answer: <answer>"


def test_the_form_is_what_the_chat_template_writes():
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", eos_token="<|im_end|>")
    chat.use_template(tokenizer, "chatml")
    form = Form.of(tiny_model(vocab_size=len(tokenizer)), tokenizer, "Check it.")
    assert tokenizer.decode(form.cue) == "<|im_end|>\n<|im_start|>user\nCheck it.<|im_end|>\n<|im_start|>assistant\n"
    said = [("user", "1+1"), ("assistant", "3"), ("user", "Check it."), ("assistant", "2")]
    whole = encode({"messages": [{"role": r, "content": c} for r, c in said]}, tokenizer, ["<|im_end|>"])
    alone = encode({"prompt": "1+1", "completion": "2"}, tokenizer, ["<|im_end|>"])
    row = rac.correction(rac.split(alone)[0], tokenizer("3")["input_ids"], rac.split(alone)[1], form)
    assert whole.ids[: len(row.ids)] == row.ids
    assert rac.split(whole)[1] == rac.split(alone)[1]


def test_the_prompt_may_be_asked_again_after_the_cue(examples):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompt, reference = rac.split(examples[1])
    shown = tokenizer("Cal = 5.")["input_ids"]
    asked = "Cal has 4 nuts . How_many_nuts_does Cal have? <answer>"
    for cue, said in (("", ""), ("Answer:", " Answer: <answer>")):
        row = rac.correction(prompt, shown, reference, Form.of(model, tokenizer, cue, again=True))
        assert text(row.ids) == f"{asked} Cal = 5 . <eos>{said} {asked} Cal = 4 . Answer: 4 <eos>"
        assert sum(row.completion_mask) == len(reference)
    with pytest.raises(ValueError, match="an empty cue needs again"):
        replace(CONFIG, cue="")


def test_words_of_the_cue_that_the_tokenizer_does_not_know_are_named():
    with pytest.raises(BadInput, match=r"rac cue 'Check that': words outside the tokenizer's vocabulary"):
        Form.of(tiny_model(), tiny_tokenizer(), "Check that")


def test_what_is_shown_is_what_the_snapshot_answers(examples, form):
    model = tiny_model(spread=0.5)
    config = replace(CONFIG, temperature=0.0)
    _, fixed = rows_of(source(examples, form, config).next_batches(model, 0))
    decoding = generation.Decoding(8)
    expected = set()
    for example in examples:
        prompt, reference = rac.split(example)
        said = generation.answer_ids(model, [prompt], decoding, form.ends, form.pad)[0].ids
        expected.add(rac.correction(prompt, said, reference, form).ids)
    assert {row.ids for row in fixed} == expected


def test_which_rows_are_answered_does_not_decide_what_is_drawn(examples, form, monkeypatch):
    made = source(examples, form, replace(CONFIG, share=0.5))
    keys: list[int] = []

    def answer(model, rows, wanted):
        keys.extend(wanted)
        return [[] for _ in rows]

    monkeypatch.setattr(made, "_answers", answer)
    assert len(list(made._units(tiny_model(), [0] * 400, True))) == 400
    assert 150 < len(keys) < 250
    drawn = [generation._generator(0, key).random() for key in keys]  # what picks their first tokens
    assert sum(number > 0.5 for number in drawn) == pytest.approx(len(drawn) / 2, rel=0.25)


def test_a_corrected_answer_is_drawn_anew():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    form = replace(Form.of(model, tokenizer, CONFIG.cue), cue=())
    asked = [generation.prompt_ids(tokenizer, row["prompt"]) for row in ROWS]
    hot = generation.Decoding(8, temperature=1.0)
    first = generation.generate(model, tokenizer, [row["prompt"] for row in ROWS], hot)
    # Nothing is shown and no cue stands between, so that only the random numbers differ.
    assert rac.again(model, tokenizer, asked, [[] for _ in asked], form, hot) != first


def test_a_cut_answer_is_a_prefix_of_the_whole_one(examples, form):
    model = tiny_model(spread=0.5)
    _, whole = rows_of(source(examples, form).next_batches(model, 0))
    _, cut = rows_of(source(examples, form, replace(CONFIG, cut="prefix")).next_batches(model, 0))

    def shown(row: Example) -> tuple[int, ...]:
        start = row.ids.index(tiny_tokenizer().convert_tokens_to_ids("<answer>")) + 1
        length = len(row.ids) - start - sum(row.completion_mask) - len(form.cue)
        return row.ids[start : start + length]

    # Both answer the rows of the stream in the same order with the same draws.
    pairs = [(shown(a), shown(b)) for a, b in zip(whole, cut, strict=False)]
    assert all(1 <= len(b) <= len(a) and a[: len(b)] == b for a, b in pairs)
    assert any(len(b) < len(a) for a, b in pairs)


def test_right_answers_are_a_bounded_share_of_the_corrections(examples, form):
    many = examples * 20
    answers = iter(range(10**6))

    def every_second(reference, answer) -> bool:
        return next(answers) % 2 == 0

    for share in (0.0, 0.3, 1.0):
        rows = source(many, form, replace(CONFIG, right_share=share, refresh=8), every_second)
        _, fixed = rows_of(rows.next_batches(tiny_model(), 0))
        state = rows.state
        assert state["answered_right"] == pytest.approx(state["answered"] / 2, abs=1)
        assert state["corrections"] - len(fixed) in (0, 1)
        assert state["right"] / state["corrections"] == pytest.approx(min(share, 0.5), abs=0.05)
        assert state["right"] <= share * state["corrections"]


def test_right_is_the_final_answer_or_else_every_token(form):
    tokenizer = tiny_tokenizer()
    right = rac.same_answer(tokenizer, form.ends)

    def ids(words: str) -> list[int]:
        return list(tokenizer(words)["input_ids"])

    reference = [*ids("Cal = 4. Answer: 4"), tokenizer.eos_token_id]
    assert right(reference, ids("Answer: 4"))
    assert not right(reference, ids("Cal = 4. Answer: 5"))
    assert not right(reference, ids("Cal = 4."))
    plain = [*ids("Cal has 4"), tokenizer.eos_token_id]
    assert right(plain, ids("Cal has 4"))
    assert not right(plain, ids("Cal has 5"))


def test_lambda_weighs_the_plain_rows(examples, form):
    batches = source(examples, form, replace(CONFIG, plain_weight=0.25)).next_batches(tiny_model(), 0)
    plain, fixed = rows_of(batches)
    assert {row.weight for row in plain} == {0.25}
    assert {row.weight for row in fixed} == {1.0}
    rows = [plain[0], fixed[0]]
    model = tiny_model()
    with torch.no_grad(), sft.packed_attention_on(model):
        losses = [float(sft.loss_sum(model, pack([replace(row, weight=1.0)]))) for row in rows]
        together = float(sft.loss_sum(model, pack(rows)))
        mean = sft.Trainer(model, TRAINING, 0)
    assert together == pytest.approx(0.25 * losses[0] + losses[1], rel=1e-5)
    weight = 0.25 * sum(rows[0].completion_mask) + sum(rows[1].completion_mask)
    with sft.packed_attention_on(model):
        assert mean.train_step(rows) == pytest.approx(together / weight, rel=1e-5)
    alone = source(examples, form, replace(CONFIG, plain_weight=0.0, right_share=1.0))
    plain, fixed = rows_of(alone.next_batches(tiny_model(), 0))
    assert not plain
    assert fixed


def test_steps_and_tokens_are_those_told(examples, form):
    config = replace(CONFIG, start=0.25, refresh=4)
    rows = source(examples, form, config)
    plain = rows.next_batches(tiny_model(), 0)
    assert len(plain) == 2
    assert not rows_of(plain)[1]
    for step, count in ((2, 4), (6, 2)):
        batches = rows.next_batches(tiny_model(), step)
        assert len(batches) == count
        assert rows_of(batches)[1]
        assert all(sum(len(row.ids) for row in batch) <= TRAINING.batch_tokens for batch in batches)


def test_over_long_corrections_are_left_out_and_counted(examples, form):
    rows = source(examples, form, max_length=5)
    _, fixed = rows_of(rows.next_batches(tiny_model(), 0))
    assert not fixed
    assert rows.state["overlong"] > 0


ALONE = replace(CONFIG, plain_weight=0.0, right_share=1.0, refresh=1)
"""Corrections without plain rows, a batch at a time."""
TOO_LONG = "all corrections are longer than max_length"


def test_a_whole_pass_without_a_correction_that_fits_is_refused(examples, form):
    rows = source(examples, form, ALONE, max_length=5)
    with pytest.raises(BadInput, match=TOO_LONG):
        rows.next_batches(tiny_model(), 0)
    assert rows.state["overlong"] == len(examples)


def test_a_few_over_long_corrections_in_succession_are_passed_over(examples, form):
    # One row in thirty has a correction that fits; as many as are answered together often have none.
    many = [examples[1], *[examples[2]] * 29]
    longest = 2 * len(examples[1].ids) + CONFIG.max_new_tokens + len(form.cue)
    assert longest < len(examples[2].ids) + len(rac.split(examples[2])[1])
    rows = source(many, form, replace(ALONE, refresh=4), max_length=longest)
    _, fixed = rows_of(rows.next_batches(tiny_model(), 0))
    assert fixed
    assert rows.state["corrections"] - len(fixed) in (0, 1)
    assert rows.state["overlong"] > 3 * len(many)


def test_rows_without_a_correction_that_fits_are_counted_from_call_to_call(examples, form, monkeypatch):
    fits, row = set(range(4)) | {6}, Example((5,) * 40, (True,) * 40)  # four make a batch

    def started(state) -> Rac:
        made = source(examples, form, ALONE)
        made.state.update(state)
        monkeypatch.setattr(
            made, "_units", lambda _, rows, __: ([row] * (made.state["row"] in fits) for _ in range(len(rows)))
        )
        return made

    first = started({})
    assert first.next_batches(tiny_model(), 0) == [[row] * 4]
    assert first.state["row"] == 6
    fits.clear()  # the next snapshot's answers are longer
    for going_on in (started(dict(first.state)), first):
        with pytest.raises(BadInput, match=TOO_LONG):
            going_on.next_batches(tiny_model(), 1)
        assert going_on.state["row"] == 8  # the end of the pass that the first call began


@pytest.mark.fault
def test_killed_and_resumed_with_over_long_corrections_equals_uninterrupted(examples, form, tmp_path: Path):
    config = replace(TRAINING, checkpoint_every=2)
    many = [examples[1], *[examples[2]] * 29]
    longest = 2 * len(examples[1].ids) + CONFIG.max_new_tokens + len(form.cue)
    resumed = check_resuming(many, config, tmp_path, lambda: source(many, form, ALONE, max_length=longest))
    assert resumed.state["corrections"] > 0
    assert resumed.state["overlong"] > 3 * len(many)


@pytest.mark.fault
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("cut", ["full", "prefix"])
def test_killed_and_resumed_equals_uninterrupted(examples, form, tmp_path: Path, every, cut):
    how = replace(CONFIG, cut=cut, share=0.7, right_share=0.5, plain_weight=0.5, start=0.25)
    config = replace(TRAINING, checkpoint_every=every)
    resumed = check_resuming(examples, config, tmp_path, lambda: source(examples, form, how))
    assert resumed.state["corrections"] > 0


def test_correcting_answers_again_after_the_first_answer_and_the_cue(form):
    model, tokenizer = tiny_model(spread=0.5), tiny_tokenizer()
    prompts = [row["prompt"] for row in ROWS]
    decoding = generation.Decoding(8)
    pairs = rac.correct(model, tokenizer, prompts, form, decoding)
    assert [pair.first for pair in pairs] == generation.generate(model, tokenizer, prompts, decoding)
    asked = generation.prompt_ids(tokenizer, prompts[2])
    said = generation.answer_ids(model, [asked], decoding, form.ends, form.pad)[0].ids
    second = generation.answer_ids(model, [[*asked, *said, *form.cue]], decoding, form.ends, form.pad)[0].ids
    assert pairs[2].second == tokenizer.decode(second, skip_special_tokens=True).strip()


def test_training_teaches_to_get_from_a_wrong_answer_to_the_reference(examples, form):
    wrong = [rac.split(other)[1][:-1] for other in [*examples[1:], examples[0]]]
    held_out = [rac.correction(*_asked(row, shown), form) for row, shown in zip(examples, wrong, strict=True)]
    config = replace(TRAINING, steps=60)
    losses = []
    for given in (None, source(examples, form, replace(CONFIG, refresh=10), steps=60)):
        model, _ = sft.train(tiny_model(), examples, [], config, 0, source=given)
        with torch.no_grad(), sft.packed_attention_on(model):
            losses.append(float(sft.loss_sum(model, pack(held_out))))
    assert losses[1] < 0.8 * losses[0]


def _asked(row: Example, shown) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    prompt, reference = rac.split(row)
    return prompt, tuple(shown), reference


def test_rates_count_what_correction_changed():
    before = [True, True, True, True, False, False]
    after = [True, True, True, False, True, False]
    assert rac.rates(before, after) == {
        "plain": pytest.approx(4 / 6),
        "corrected": pytest.approx(4 / 6),
        "wrong_to_right": 0.5,
        "right_to_wrong": 0.25,
    }
    assert rac.rates(np.array(before), np.array(after)) == rac.rates(before, after)
    assert rac.rates([True], [True])["wrong_to_right"] == 0.0
    with pytest.raises(BadInput, match="no answers to compare"):
        rac.rates([], [])


def test_settings_that_could_leave_batches_empty_are_refused():
    with pytest.raises(ValueError, match="plain_weight 0 needs share 1 and right_share 1"):
        replace(CONFIG, plain_weight=0.0)
    with pytest.raises(ValueError, match="plain_weight 0 needs start 0"):
        replace(CONFIG, plain_weight=0.0, right_share=1.0, start=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; use at least 1"),
        ({"batch_rows": 0}, "batch_rows is 0; use at least 1"),
        ({"refresh": 0}, "refresh is 0; use at least 1"),
        ({"temperature": -0.5}, "temperature is -0.5; use at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; use at least 0"),
        ({"temperature": float("inf")}, "temperature is inf; use at least 0, and finite"),
        ({"plain_weight": -1.0}, "plain_weight is -1.0; use at least 0"),
        ({"plain_weight": float("inf")}, "plain_weight is inf; use at least 0, and finite"),
        ({"right_share": 1.5}, "right_share is 1.5; use a number between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(OutOfRange, match=message):
        replace(CONFIG, **changes)


def test_a_weight_of_prompt_tokens_is_refused_since_the_models_answers_would_be_trained(examples):
    weighted = replace(TRAINING, prompt_loss_weight=0.1)
    with pytest.raises(BadInput, match=r"sft.prompt_loss_weight is 0.1, and rac would train the model's own answers"):
        rac.source(CONFIG, examples, tiny_model(), tiny_tokenizer(), weighted, 200, 0)
