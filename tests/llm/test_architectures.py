"""Any causal model: packed where its attention allows, padded where not; decoded from the cache that fits."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from springhead.errors import BadInput
from springhead.llm import decoders, kvcache, packing, sft
from springhead.llm.generation import Decoding, answer_ids
from springhead.llm.packing import Example
from springhead.llm.sft import SftConfig
from tests.llm.tiny import tiny_tokenizer

pytestmark = pytest.mark.unit
CONFIG = SftConfig(steps=2, batch_tokens=80, learning_rate=1e-3)
SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.4,
         "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2}  # fmt: skip
PACKING: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "phi3": {},
    "olmo2": {},
}
"""Architectures whose rows can be packed, with settings of their own."""
PADDED: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "vocab_size": len(tiny_tokenizer())},
    "llama4_text": {
        "attention_chunk_size": 4,
        "intermediate_size_mlp": 48,
        "num_local_experts": 1,
        "vocab_size": len(tiny_tokenizer()),
    },
}
"""Architectures that shape their scores in ways of their own, or attend in chunks."""


def make(kind: str, changes: dict[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **(SHAPE | changes))
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).float().eval()


def rows(*lengths: int) -> list[Example]:
    made = []
    for k, length in enumerate(lengths):
        ids = tuple((7 * k + 5 * i) % 40 + 5 for i in range(length))
        made.append(Example(ids, tuple(i >= length // 2 for i in range(length))))
    return made


@torch.no_grad()
def uncached(model: PreTrainedModel, ids: tuple[int, ...], count: int) -> list[int]:
    given = list(ids)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([given]), use_cache=False).logits[0, -1].argmax())
        if token == 0:
            break
        given.append(token)
    return given[len(ids) :]


def ids_of(model, prompts, decoding: Decoding) -> list[list[int]]:
    return [given.ids for given in answer_ids(model, prompts, decoding, [0], 2)]


@pytest.mark.parametrize("kind", PACKING)
def test_packed_loss_and_ragged_decoding_are_the_models_own(kind: str) -> None:
    model, given = make(kind, PACKING[kind]), rows(5, 12, 9, 17)
    assert packing.packs(model)
    with torch.no_grad():
        alone = sum(float(sft.loss_sum(model, packing.pad([row]))) for row in given)
        with sft.packed_attention_on(model):
            packed = float(sft.loss_sum(model, packing.pack(given)))
    assert packed == pytest.approx(alone, rel=1e-4)
    prompts = [row.ids for row in given]
    with decoders.decoder_for(model, prompts, 2) as decoder:
        assert isinstance(decoder, decoders.Ragged)
    assert ids_of(model, prompts, Decoding(10, 4)) == [uncached(model, ids, 10) for ids in prompts]


@pytest.mark.parametrize("kind", PACKING)
def test_what_prompts_share_is_read_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kvcache._GROUP_ROWS, "cpu", 2)  # several groups of rows, of several lengths
    model = make(kind, PACKING[kind])
    monkeypatch.setattr(decoders, "_SPARED", 30)
    common = tuple(range(5, 25))
    prompts = [common + row.ids for row in rows(1, 12, 5, 9)]
    asked = [prompts[n] for n in (1, 0, 1, 2, 3, 1, 0)]
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, made: read.append(given[0].numel()))
    found = ids_of(model, asked, Decoding(10, len(asked)))
    hook.remove()
    assert read[:2] == [len(common), sum(len(prompt) - len(common) for prompt in prompts)]
    assert found == [uncached(model, ids, 10) for ids in asked]


def test_a_prompt_that_another_begins_with_keeps_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_SPARED", 10)
    model = make("llama", {})
    whole = tuple(range(5, 40))
    for asked in ([whole, whole[:20], whole[:20]], [whole] * 3):
        assert ids_of(model, asked, Decoding(6, 3)) == [uncached(model, ids, 6) for ids in asked]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_rows_stay_right_while_the_room_grows_and_others_leave(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kvcache._GROUP_ROWS, "cpu", 2)
    monkeypatch.setattr(kvcache, "_BLOCK", 8)
    monkeypatch.setattr(decoders, "_SPARED", 20)
    monkeypatch.setitem(decoders._PROMPT_TOKENS, "cpu", 12)  # equal prompts fall into several passes
    model = make(kind, PACKING[kind])
    given = [tuple(range(5, 20)) + row.ids for row in rows(9, 3, 9, 1, 6)]
    with torch.no_grad(), decoders.decoder_for(model, [given[n] for n in (0, 0, 2, 1, 3, 4)], 2) as decoder:
        logits = decoder.prefill()
        live, seen = [list(given[n]) for n in (0, 0, 2, 1, 3, 4)], []
        for step in range(20):
            seen += [(tuple(row), found) for row, found in zip(live, logits, strict=True)]
            if step in (0, 7):  # the first leaves
                live = [live[n] for n in decoder.keep(list(range(1, len(live))))]
            tokens = [(7 * step + 3 * n) % 40 + 5 for n in range(len(live))]
            live = [[*row, token] for row, token in zip(live, tokens, strict=True)]
            logits = decoder.step(tokens)
    assert {len(row) for row, _ in seen} >= {16, 40}
    for row, found in seen:
        torch.testing.assert_close(found, uncached_logits(model, row), rtol=1e-3, atol=1e-4)


def test_a_common_beginning_is_read_apart_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, common = make("llama", {}), tuple(range(5, 25))

    def passes(asked: list[tuple[int, ...]]) -> int:
        read: list[int] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *given: read.append(given[1][0].numel()))
        with decoders.decoder_for(model, asked, 2) as decoder, torch.no_grad():
            decoder.prefill()
        hook.remove()
        return len(read)

    many = [common + (n, m) for n in range(30, 36) for m in range(30, 36)]
    assert passes(many) == 2
    assert passes(many[:20]) == 1  # 380 tokens spared
    monkeypatch.setattr(decoders, "_SPARED", 1)
    assert passes(many[:20]) == 2
    assert passes([common[:3] + row.ids for row in rows(13, 12)]) == 1  # three tokens before thirteen


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_length_are_read_in_one_pass(rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_SPARED", 1)
    factors = {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4} if rope == "longrope" else {}
    settings = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 48, **factors}
    model = make("llama", {"rope_parameters": settings, "max_position_embeddings": 96})
    asked = [tuple(range(5, 45)) + row.ids for row in rows(30, 20, 15)]
    with torch.no_grad(), decoders.decoder_for(model, asked, 2) as decoder:
        logits = decoder.prefill()
    for found, ids in zip(logits, asked, strict=True):
        torch.testing.assert_close(found, uncached_logits(model, ids), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def uncached_logits(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]  # type: ignore[no-any-return]


def test_gradients_of_shared_keys_are_those_of_padded_rows() -> None:
    model, given = make("llama", {}), rows(5, 12, 9, 17)
    found = []
    for packed in (True, False):
        model.zero_grad()
        with sft.packed_attention_on(model) if packed else nullcontext():
            sft.loss_sum(model, packing.pack(given) if packed else packing.pad(given)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", PADDED)
def test_other_attention_is_told_apart_trained_padded_and_decoded_by_the_library(kind: str) -> None:
    model, given = make(kind, PADDED[kind]), rows(5, 12, 9)
    assert not packing.packs(model)
    with pytest.raises(BadInput, match="would see each other; set packing to false"):
        sft.train(model, given, [], CONFIG, 0)
    prompts = [row.ids for row in given]
    with decoders.decoder_for(model, prompts, 2) as decoder:
        assert isinstance(decoder, decoders.Library)
    assert ids_of(model, prompts, Decoding(8, 3)) == [uncached(model, ids, 8) for ids in prompts]
    with torch.no_grad():
        alone = sum(float(sft.loss_sum(model, packing.pad([row]))) for row in given)
    assert float(sft.loss_sum(model, packing.pad(given))) == pytest.approx(alone, rel=1e-4)
    samples = sft.Samples(tiny_tokenizer(), ["Ana"], max_new_tokens=3)
    _, history = sft.train(model, given, given, replace(CONFIG, packing=False), 0, samples=samples)
    assert len(samples.taken) == 1
    weight = sum(sft.target_weight(row, 0.0) for row in given)
    assert history[0]["train_loss"] == pytest.approx(alone / weight, rel=1e-3)


def test_a_model_with_a_running_state_is_told_apart() -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1, initializer_range=0.4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    assert not packing.packs(model)


def test_packed_attention_refuses_what_it_does_not_have() -> None:
    from springhead.llm.attention import packed_attention

    query = torch.zeros(1, 2, 3, 4)
    layout = packing.pack(rows(3)).layout
    with pytest.raises(BadInput, match="has no softcap, which this model asks for; set packing to false"):
        packed_attention(torch.nn.Identity(), query, query, query, None, layout=layout, softcap=30.0)
    with pytest.raises(BadInput, match="has no dropout"):
        packed_attention(torch.nn.Identity(), query, query, query, None, layout=layout, dropout=0.1)
    with pytest.raises(BadInput, match="needs the batch's layout"):
        packed_attention(torch.nn.Identity(), query, query, query, None)
