import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from springhead.errors import BadInput, Finding
from springhead.llm import checkpoints, packing, sft
from springhead.llm.adapters import merged, with_lora
from springhead.llm.attention import PACKED
from springhead.llm.history import run_figures
from springhead.llm.packing import Example, encode, encode_rows, pack
from springhead.llm.sft import SftConfig
from springhead.llm.tokenizer import CHATML_TRAINING_TEMPLATE
from tests.llm.runs import Killed, check_resuming
from tests.llm.tiny import ENDS, ROWS, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit
CONFIG = SftConfig(steps=6, batch_tokens=60, learning_rate=3e-3)
PINNED = [4.087048, 3.655020, 3.422120, 3.246706, 3.067781, 2.859324]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return encode_rows(ROWS, tiny_tokenizer(), 128, "error", ENDS)[0]


def test_completion_mask_covers_the_answer_and_the_end_sign_token_by_token():
    tokenizer = tiny_tokenizer()
    example = encode(ROWS[0], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(example.ids))
    context = "Ana has 3 figs . Ben has 2 more_figs_than Ana . How_many_figs_does Ben have? <answer>"
    answer = "Ana = 3 . Ben = 3 + 2 = 5 . Answer: 5 <eos>"
    assert [token.replace(" ", "_") for token in tokens] == f"{context} {answer}".split(" ")
    assert list(example.completion_mask) == [False] * len(context.split()) + [True] * len(answer.split())


def test_mask_of_a_conversation_covers_every_answer_and_no_question():
    tokenizer = tiny_tokenizer()
    turns = [("user", "Ana"), ("assistant", "3"), ("user", "Ben"), ("assistant", "5")]
    example = encode({"messages": [{"role": r, "content": c} for r, c in turns]}, tokenizer)
    trained = [t for t, m in zip(example.ids, example.completion_mask, strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(trained) == ["3", "<eos>", "5", "<eos>"]


def test_chatml_template_trains_the_end_sign_but_not_the_newline_after_it():
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    texts, spans = render_jinja_template(
        conversations=[messages], chat_template=CHATML_TRAINING_TEMPLATE, return_assistant_tokens_mask=True
    )
    assert texts[0] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    (start, end) = spans[0][0]
    assert texts[0][start:end] == "Yes<|im_end|>"


def test_rows_that_cannot_be_trained_on_are_named():
    tokenizer = tiny_tokenizer()
    with pytest.raises(BadInput, match="row x7: needs 'messages'"):
        encode({"id": "x7", "prompt": "Ana"}, tokenizer)
    with pytest.raises(BadInput, match=r"row x8: words outside the tokenizer's vocabulary: \['Zorro'\]"):
        encode({"id": "x8", "prompt": "Zorro has 3 figs.", "completion": "3"}, tokenizer)
    with pytest.raises(BadInput, match="row x9: no token to train on"):
        encode({"id": "x9", "messages": [{"role": "user", "content": "Ana"}]}, tokenizer)


def test_overlong_rows_are_dropped_cut_or_refused_and_counted():
    tokenizer = tiny_tokenizer()
    full, counts = encode_rows(ROWS, tokenizer, 128, "error", ENDS)
    longest = max(len(e.ids) for e in full)
    assert counts == {
        "rows": 4,
        "tokens": sum(len(e.ids) for e in full),
        "targets": sum(sum(e.completion_mask) for e in full),
        "dropped": 0,
        "truncated": 0,
    }
    kept, counts = encode_rows(ROWS, tokenizer, longest - 1, "drop", ENDS)
    assert (len(kept), counts["dropped"]) == (3, 1)
    cut, counts = encode_rows(ROWS, tokenizer, longest - 1, "truncate", ENDS)
    assert (len(cut), counts["truncated"], max(len(e.ids) for e in cut)) == (4, 1, longest - 1)
    # Row a's question alone fills 14 tokens: cut there, nothing would be left to train on.
    assert encode_rows(ROWS[:2], tokenizer, 14, "truncate", ENDS)[1]["dropped"] == 1
    with pytest.raises(BadInput, match=f"row c: {longest} tokens, max_length is {longest - 1}"):
        encode_rows(ROWS, tokenizer, longest - 1, "error", ENDS)
    with pytest.raises(BadInput, match=r"no training rows left of 4 \(4 longer than max_length 5\); raise it"):
        encode_rows(ROWS, tokenizer, 5, "drop", ENDS)
    with pytest.raises(BadInput, match="no evaluation rows left of 4"):
        encode_rows(ROWS, tokenizer, 5, "drop", ENDS, what="evaluation")


def reference_loss(model: torch.nn.Module, examples: list[Example], prompt_weight: float) -> tuple[float, float]:
    """Sum of weighted losses and of weights, row by row with the library's own attention."""
    total = weight = 0.0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor([example.ids])
            logits = model(input_ids=ids).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            weights = torch.tensor([1.0 if m else prompt_weight for m in example.completion_mask[1:]])
            total += float((losses * weights).sum())
            weight += float(weights.sum())
    return total, weight


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_packed_loss_is_the_loss_of_the_rows_alone(examples, prompt_weight):
    model = tiny_model()
    expected, weight = reference_loss(model, examples, prompt_weight)
    batch = pack(examples, prompt_weight)
    with torch.no_grad(), sft.packed_attention_on(model):
        packed = float(sft.loss_sum(model, batch))
    assert packed == pytest.approx(expected, rel=1e-5)
    assert float(batch.weights.sum()) == pytest.approx(weight, rel=1e-6)
    assert model.config._attn_implementation != PACKED


def test_rows_of_a_packed_batch_do_not_see_each_other(examples):
    model = tiny_model()
    # The second row's loss must not change with the first row's content.
    other = Example(tuple(reversed(examples[0].ids)), (False,) * len(examples[0].ids))
    quiet = Example(examples[0].ids, (False,) * len(examples[0].ids))
    with torch.no_grad(), sft.packed_attention_on(model):
        one, two = (float(sft.loss_sum(model, pack([first, examples[1]]))) for first in (quiet, other))
        alone = float(sft.loss_sum(model, pack([examples[1]])))
    assert one == pytest.approx(alone, rel=1e-5)
    assert two == pytest.approx(alone, rel=1e-5)


def test_accumulation_normalises_by_target_tokens_of_the_whole_step(examples):
    models = [tiny_model(), tiny_model()]
    losses = []
    for model, micro in zip(models, (0, 40), strict=True):
        trainer = sft.Trainer(model, replace(CONFIG, micro_tokens=micro, batch_tokens=1000), 0)
        with sft.packed_attention_on(model):
            losses.append(trainer.train_step(examples))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_batches_are_full_reproducible_and_cover_each_epoch():
    lengths = [10, 20, 30, 15, 25]
    first = list(itertools.islice(packing.batches(lengths, 50, 3), 12))
    assert first == list(itertools.islice(packing.batches(lengths, 50, 3), 12))
    assert first != list(itertools.islice(packing.batches(lengths, 50, 4), 12))
    assert all(sum(lengths[i] for i in batch) <= 50 for batch in first)
    stream = [i for batch in first for i in batch]
    for epoch in range(len(stream) // 5):
        assert sorted(stream[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert next(packing.batches([80], 50, 0)) == [0]


def test_first_losses_are_pinned():
    # Made-up token ids: the pins hold whatever becomes of the tokenizer.
    rows = []
    for k in range(8):
        ids = tuple((7 * k + 3 * i) % 40 + 4 for i in range(6 + k))
        rows.append(Example(ids, (False,) * 3 + (True,) * (3 + k)))
    _, history = sft.train(tiny_model(vocab_size=50), rows, [], CONFIG, seed=1)
    losses = [line["train_loss"] for line in history]
    np.testing.assert_allclose(losses, PINNED, rtol=2e-3)
    batch = next(packing.batches([len(e.ids) for e in rows], CONFIG.batch_tokens, 1))
    total, weight = reference_loss(tiny_model(vocab_size=50), [rows[i] for i in batch], 0.0)
    assert losses[0] == pytest.approx(total / weight, rel=1e-5)
    assert [line["tokens"] for line in history] == sorted({line["tokens"] for line in history})


def test_training_fits_the_rows_and_the_held_out_loss_is_measured(examples):
    config = replace(CONFIG, steps=60, learning_rate=1e-2, eval_every=30)
    _, history = sft.train(tiny_model(), examples, examples, config, seed=0)
    measured = [line["eval_loss"] for line in history if line["eval_loss"] >= 0]
    assert [line["step"] for line in history if line["eval_loss"] >= 0] == [30, 60]
    assert history[0]["train_loss"] > 3.0
    assert measured[-1] < 0.7


def test_learning_rate_warms_up_and_ends_at_its_floor():
    config = SftConfig(steps=100, batch_tokens=1, learning_rate=1.0, warmup=0.1, final_rate=0.2)
    rates = [sft.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.fault
@pytest.mark.parametrize("rank", [0, 2])
def test_killed_and_resumed_equals_uninterrupted(examples, tmp_path: Path, rank):
    config = replace(CONFIG, steps=7, checkpoint_every=2, lora_rank=rank, lora_alpha=4.0, eval_every=3)
    check_resuming(examples, config, tmp_path, held_out=examples)


@pytest.mark.fault
def test_a_checkpoint_of_another_model_is_refused(examples, tmp_path: Path):
    sft.Trainer(tiny_model(), CONFIG, 0)
    trainer = sft.Trainer(tiny_model(), CONFIG, 0)
    with sft.packed_attention_on(trainer.model):
        trainer.train_step(examples)
    trainer.save(tmp_path / "checkpoint")
    wider = sft.Trainer(tiny_model(num_hidden_layers=3), CONFIG, 0)
    with pytest.raises(BadInput, match="checkpoint of another model"):
        wider.restore(tmp_path / "checkpoint")


@pytest.mark.fault
def test_a_checkpoint_from_another_base_model_is_not_continued(examples, tmp_path: Path):
    config = replace(CONFIG, steps=4, checkpoint_every=2, lora_rank=2)
    sft.train(tiny_model(), examples, [], config, 0, tmp_path)
    other_weights, other_angles = tiny_model(seed=1), tiny_model(rope_theta=500.0)
    for other in (other_weights, other_angles):
        with pytest.raises(BadInput, match="or from another base model; delete the folder"):
            sft.train(other, examples, [], config, 0, tmp_path)
    sft.train(tiny_model(), examples, [], config, 0, tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize("renaming", [0, 1, 2])
def test_a_kill_between_the_renamings_of_a_checkpoint_loses_none(examples, tmp_path: Path, monkeypatch, renaming):
    folder, rename = tmp_path / "checkpoint", os.replace
    done: list[str] = []

    def killed(source, target):
        if Path(source).is_dir():
            if len(done) == renaming:
                raise Killed
            done.append(str(target))
        rename(source, target)

    trainer = sft.Trainer(tiny_model(), CONFIG, 0)
    with sft.packed_attention_on(trainer.model):
        trainer.train_step(examples)
        trainer.save(folder)
        trainer.train_step(examples)
        monkeypatch.setattr(os, "replace", killed)
        if renaming < 2:  # the old one away, the new one in its place
            with pytest.raises(Killed):
                trainer.save(folder)
        else:
            trainer.save(folder)
        monkeypatch.setattr(os, "replace", rename)
        found = checkpoints.checkpoint_of(folder)
        assert found is not None
        again = sft.Trainer(tiny_model(), CONFIG, 0)
        again.restore(found)
        assert again.step == (1 if renaming == 0 else 2)
        # The next save, killed as well while it writes, leaves what there was.
        monkeypatch.setattr(sft, "write_json_atomic", killed_writing)
        with pytest.raises(Killed):
            again.save(folder)
    assert checkpoints.checkpoint_of(folder) == folder
    monkeypatch.undo()
    trainer.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def killed_writing(*_):
    raise Killed


@pytest.mark.fault
def test_training_that_diverges_stops_and_keeps_the_weights(examples):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Finding, match=r"step 1: loss nan.*lower learning_rate"):
        sft.train(model, examples, [], CONFIG, 0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_broken_model_says_nothing_about_sound_ones_of_its_shape(monkeypatch):
    monkeypatch.setattr(packing, "_PACKS", {})
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    assert packing.packs(model)  # so that training comes to its loss, and stops there
    assert not packing._PACKS
    assert packing.packs(tiny_model())
    assert list(packing._PACKS.values()) == [True]


def test_merged_lora_equals_the_adapted_model_and_changes_it(examples):
    config = replace(CONFIG, steps=4, lora_rank=4, lora_alpha=8.0, learning_rate=2e-2)
    ids = torch.tensor([examples[0].ids])
    base = tiny_model()
    with torch.no_grad():
        plain = base(input_ids=ids).logits
    adapted = with_lora(base, 4, 8.0, (), 0)
    trainer = sft.Trainer(adapted, config, 0)
    assert all("lora_" in name for name in trainer.named)
    with sft.packed_attention_on(adapted):
        for _ in range(4):
            trainer.train_step(examples)
    with torch.no_grad():
        wrapped = adapted(input_ids=ids).logits
        flat = merged(adapted)(input_ids=ids).logits
    torch.testing.assert_close(flat, wrapped, rtol=1e-4, atol=1e-4)
    assert float((flat - plain).abs().max()) > 0.01


def test_bad_settings_are_refused():
    for key, value in (
        ("learning_rate", 0.0), ("steps", 0), ("batch_tokens", 0), ("micro_tokens", -5), ("eval_every", -1),
        ("sample_every", -1), ("checkpoint_every", -1), ("lora_rank", -1), ("lora_alpha", -1.0), ("beta2", 2.0),
        ("beta2", 1.0), ("clip", -1.0), ("clip", math.nan), ("weight_decay", -0.1), ("warmup", 1.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{key} is {value}; use "):
            replace(CONFIG, **{key: value})
    with pytest.raises(ValueError, match="lora_targets needs a lora_rank"):
        replace(CONFIG, lora_targets=("q_proj",))


def test_clip_0_trains_without_clipping(examples):
    def trained(clip: float) -> tuple[list[float], torch.nn.Module]:
        model, history = sft.train(tiny_model(), examples, [], replace(CONFIG, clip=clip), 0)
        return [line["train_loss"] for line in history], model

    (without, one), (wide, two), (narrow, _) = trained(0.0), trained(1e9), trained(1e-9)
    assert without == wide
    assert without != narrow
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_asked_for_and_has_no_rows_is_refused(examples):
    for key in ("eval_every", "sample_every"):
        with pytest.raises(BadInput, match=rf"sft\.{key} is 2, but no rows or prompts were named for it"):
            sft.train(tiny_model(), examples, [], replace(CONFIG, **{key: 2}), 0)


def test_the_evaluation_loss_is_computed_as_precisely_as_the_training_loss(examples):
    losses = {}
    for precision in ("float32", "bfloat16"):
        trainer = sft.Trainer(tiny_model(), replace(CONFIG, precision=precision, batch_tokens=1000), 0)
        with sft.packed_attention_on(trainer.model):
            losses[precision] = sft.evaluation_loss(trainer, examples)
            assert losses[precision] == pytest.approx(trainer.train_step(examples), rel=1e-6)
    assert losses["float32"] != pytest.approx(losses["bfloat16"], rel=1e-6)


def test_padded_and_packed_steps_have_the_same_loss_and_update(examples):
    models = [tiny_model(), tiny_model()]
    losses = []
    for model, packed in zip(models, (True, False), strict=True):
        _, history = sft.train(model, examples, examples, replace(CONFIG, packing=packed), seed=1)
        losses.append([line["train_loss"] for line in history] + [history[-1]["eval_loss"]])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_memory_and_nothing_else(examples, rank):
    config = replace(CONFIG, steps=3, lora_rank=rank)
    runs = [
        sft.train(tiny_model(), examples, [], replace(config, gradient_checkpointing=on), 2)[1] for on in (False, True)
    ]
    np.testing.assert_allclose(*[[line["train_loss"] for line in run] for run in runs], rtol=1e-5)


def test_bfloat16_computes_in_half_and_keeps_float32_weights(examples):
    whole, half = (
        sft.train(tiny_model(), examples, [], replace(CONFIG, precision=precision), 1)
        for precision in ("float32", "bfloat16")
    )
    losses = [np.array([line["train_loss"] for line in history]) for _, history in (whole, half)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)
    assert not np.array_equal(*losses)
    assert all(p.dtype == torch.float32 for p in half[0].parameters())


def test_schedules_end_where_they_should():
    base = SftConfig(steps=10, batch_tokens=1, learning_rate=1.0, warmup=0.0, final_rate=0.0)
    line = [sft.learning_rate(replace(base, schedule="linear"), step) for step in range(10)]
    np.testing.assert_allclose(line, 1 - np.arange(10) / 10)
    assert {sft.learning_rate(replace(base, schedule="constant", final_rate=0.1), step) for step in range(10)} == {1.0}
    cosine = [sft.learning_rate(base, step) for step in range(10)]
    np.testing.assert_allclose(cosine, 0.5 * (1 + np.cos(np.pi * np.arange(10) / 10)))


def test_samples_show_what_the_model_says_while_it_learns_and_survive_a_kill(examples, tmp_path: Path):
    config = replace(CONFIG, steps=8, learning_rate=3e-2, sample_every=4, checkpoint_every=4)

    def samples():
        return sft.Samples(tiny_tokenizer(), [ROWS[1]["prompt"], ROWS[3]["prompt"]], max_new_tokens=8)

    def kill_in_step_6(step, **_):
        if step == 6:
            raise Killed

    whole, cut, resumed = samples(), samples(), samples()
    sft.train(tiny_model(), examples, [], config, 0, samples=whole)
    assert [(taken["step"], taken["conversation"]) for taken in whole.taken] == [(4, 0), (4, 1), (8, 0), (8, 1)]
    assert whole.taken[0]["text"] != whole.taken[2]["text"]
    with pytest.raises(Killed):
        sft.train(tiny_model(), examples, [], config, 0, tmp_path, log=kill_in_step_6, samples=cut)
    sft.train(tiny_model(), examples, [], config, 0, tmp_path, samples=resumed)
    assert resumed.taken == whole.taken


@pytest.mark.fault
def test_a_sample_prompt_beyond_the_context_is_named_before_training(examples):
    model, steps = tiny_model(), []
    words = " ".join(["Ana"] * (model.config.max_position_embeddings + 1))
    samples = sft.Samples(tiny_tokenizer(), [ROWS[1]["prompt"], words])
    with pytest.raises(BadInput, match=r"samples\[1\]: \d+ tokens leave no room"):
        sft.train(model, examples, [], CONFIG, 0, samples=samples, log=lambda step, **_: steps.append(step))
    assert not steps


def test_a_checkpoint_of_other_settings_or_rows_is_not_continued(examples, tmp_path: Path):
    config = replace(CONFIG, steps=4, checkpoint_every=2)
    sft.train(tiny_model(), examples, [], config, 0, tmp_path)
    for changed, rows, seed in (
        (replace(config, beta2=0.9), examples, 0),
        (config, examples[1:], 0),
        (config, examples, 1),
    ):
        with pytest.raises(BadInput, match="checkpoint of a run with other settings or rows"):
            sft.train(tiny_model(), rows, [], changed, seed, tmp_path)


def test_lora_adapts_the_layers_that_are_named_and_saves_alone(examples, tmp_path: Path):
    from peft import PeftModel

    config = replace(CONFIG, lora_rank=2, lora_targets=("q_proj", "v_proj"), learning_rate=2e-2)
    trained, _ = sft.train(tiny_model(), examples, [], config, 0, adapter=tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    named = {name.split(".")[-4] for name, _ in again.named_parameters() if "lora_" in name}
    assert named == {"q_proj", "v_proj"}
    flat = again.merge_and_unload()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(flat.state_dict()[name], value)
    assert b"/" not in (tmp_path / "adapter/adapter_config.json").read_bytes()
    with pytest.raises(BadInput, match=r"lora_targets \['nose'\]"):
        sft.train(tiny_model(), examples, [], replace(config, lora_targets=("nose",)), 0)


def test_figures_of_a_run_have_no_evaluation_loss_that_was_not_measured():
    line = {"step": 2, "tokens": 30, "train_loss": 0.5, "learning_rate": 0.1}
    counts = {"rows": 3, "dropped": 1, "truncated": 0, "tokens": 20}
    same = {"rows": 3, "dropped": 1, "truncated": 0, "steps": 2, "tokens": 30, "epochs": 1.5, "train_loss": 0.5}
    assert run_figures([{**line, "eval_loss": -1.0}], counts) == same
    dropped = {"eval_loss": 0.25, "eval_dropped": 2, "eval_truncated": 1}
    held_out = {"rows": 4, "dropped": 2, "truncated": 1}
    assert run_figures([{**line, "eval_loss": 0.25}], counts, held_out) == {**same, **dropped}
