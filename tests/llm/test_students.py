import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import file_digest, tree_digest
from springhead.llm import chat, generation, problems, students
from springhead.llm.packing import encode
from springhead.llm.sft import SftConfig
from springhead.llm.students import HubModel, SmallLlama
from springhead.llm.tokenizer import small_tokenizer, unknown_words, vocabulary
from springhead.stage import for_test
from stages.llm.students import Params, run
from tests.llm.tiny import byte_tokenizer, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.unit
SMALL = SmallLlama(
    hidden_size=16,
    layers=1,
    heads=2,
    intermediate_size=24,
    initial_std=0.1,
    problems=30,
    ops_max=2,
    orders="random",
    redundant_max=1,
    vocabularies=("market",),
    holders=0,
    operators=("more", "fewer"),
    max_value=12,
    max_step=5,
    holdout=0.2,
    sft=SftConfig(steps=3, batch_tokens=200, learning_rate=1e-2, checkpoint_every=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("student") / "small"
    students.build("small-llama", out, SMALL, {}, seed=3)
    return out


def test_the_tokenizer_knows_every_word_of_the_generators_and_reads_back_what_it_wrote():
    tokenizer = small_tokenizer()
    spec = problems.ProblemSpec(operators=problems.OPERATORS, ops_max=4, depth_max=4)
    for problem in problems.generate(60, 1, spec):
        texts = [*problem.statements, *problem.redundant, problem.question, ". ".join(problem.chain) + "."]
        assert unknown_words(tokenizer, texts) == []
        for text in texts:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert unknown_words(tokenizer, ["Ana has 123 figs, Quux."]) == [",", "123", "Quux"]
    assert len(set(vocabulary())) == len(vocabulary()) == len(tokenizer)


def test_phrases_and_numbers_are_single_tokens():
    tokenizer = small_tokenizer()
    text = "Ana has as many figs as Ben and Cal together."
    assert tokenizer.tokenize(text) == ["Ana", "has", "as many figs as", "Ben", "and", "Cal", "together."]
    times = tokenizer.tokenize("Ana has 3 times as many figs as Ben.")
    assert times == ["Ana", "has", "3", "times as many figs as", "Ben", "."]
    assert tokenizer.tokenize("Ben = 12 - 3 = 9.") == ["Ben", "=", "12", "-", "3", "=", "9", "."]


def test_small_llama_loads_as_an_ordinary_hugging_face_model(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    example = encode({"prompt": "Ana has 3 figs.", "completion": "Answer: 3"}, tokenizer)
    assert sum(example.completion_mask) == 3
    own, own_tokenizer = students.load(folder)
    ids = torch.tensor([example.ids])
    torch.testing.assert_close(own(input_ids=ids).logits, model(input_ids=ids).logits)
    assert own_tokenizer.get_vocab() == tokenizer.get_vocab()


def test_the_same_seed_gives_the_same_bytes_and_no_path_gets_into_them(folder: Path, tmp_path: Path):
    students.build("small-llama", tmp_path / "again", SMALL, {}, seed=3)
    students.build("small-llama", tmp_path / "other", SMALL, {}, seed=4)
    assert tree_digest(tmp_path / "again") == tree_digest(folder)
    assert tree_digest(tmp_path / "other") != tree_digest(folder)
    # Loaded and saved again, as fine-tuning does, a folder stays what it was.
    model, tokenizer = students.load(folder)
    students.save(model, tokenizer, tmp_path / "saved", students.stored_dtype(folder))
    assert tree_digest(tmp_path / "saved") == tree_digest(folder)
    for path in folder.iterdir():
        assert str(folder.parent).encode() not in path.read_bytes(), path


def always_saying(token: int, words: int, **ends: Any) -> LlamaForCausalLM:
    """A model whose next token is always the same."""
    model = tiny_model(vocab_size=words, tie_word_embeddings=False, eos_token_id=ends["eos"], pad_token_id=ends["pad"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0
    return model


def test_an_exported_model_stops_where_it_was_trained_to(tmp_path: Path):
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", pad_token="<pad>")
    old, new = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = always_saying(new, len(tokenizer), eos=old, pad=tokenizer.pad_token_id)
    chat.use_template(tokenizer, "chatml")
    students.save(model, tokenizer, tmp_path, torch.float32)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.generation_config.eos_token_id == read.config.eos_token_id == sorted([old, new])
    assert read.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20).tolist() == [[1, 2, 3, new]]


def test_pretraining_never_draws_from_the_evaluation_side():
    from springhead.llm import solver

    for row in students.pretraining_rows(SMALL, 0):
        statements = [s.strip() + "." for s in row["prompt"].rpartition(". ")[0].split(".") if s.strip()]
        question = row["prompt"].rpartition(". ")[2]
        needed = solver.parse(statements)
        assert needed
        assert problems.side_of(solver.signature(tuple(statements), question), SMALL.holdout) == problems.TRAIN


def test_unknown_and_broken_students_are_named(tmp_path: Path):
    with pytest.raises(BadInput, match=r"unknown student 'llama'; choose from small-llama, smollm2, tiny, or"):
        students.build("llama", tmp_path, SMALL, {"tiny": HubModel("a/b", "0" * 40, "0" * 64)}, 0)
    with pytest.raises(BadInput, match="not a model folder"):
        students.load(tmp_path)
    (save_tiny(tmp_path / "mine") / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BadInput, match=r"mine: cannot be loaded .*; get the model again, or, if a stage made it, "):
        students.load(tmp_path / "mine")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="no GPU; set device to cpu or auto"):
            students.pick_device("cuda")
    assert students.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_number_format_is_read_under_either_name(tmp_path: Path, key: str):
    write_json(tmp_path / "config.json", {key: "bfloat16"})
    assert students.stored_dtype(tmp_path) == torch.bfloat16


def test_a_hub_student_offline_says_what_to_do(tmp_path: Path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    hub = {"tiny": HubModel("springhead/no-such-model", "0" * 40, "0" * 64)}
    with pytest.raises(BadInput, match=r"hub\.tiny: cannot fetch springhead/no-such-model@0+ .*HF_HUB_OFFLINE"):
        students.build("tiny", tmp_path / "out", SMALL, hub, 0)


def in_cache(home: Path, folder: Path, repository: str, commit: str) -> None:
    """Put a folder where the hub's client keeps a snapshot."""
    place = home / ("models--" + repository.replace("/", "--"))
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()


def test_a_hub_student_in_shards_is_taken_from_the_cache_and_pinned(tmp_path: Path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    tiny_model().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    commit = "5" * 40
    in_cache(tmp_path / "cache", tmp_path / "theirs", "some/body", commit)
    pin = HubModel("some/body", commit, students.weights_digest(tmp_path / "theirs"), "own")
    students.build("tiny", tmp_path / "out", SMALL, {"tiny": pin}, 0)
    for name, value in tiny_model().state_dict().items():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()[name], value)
    assert read_json(tmp_path / "out/origin.json")["commit"] == commit
    # The same as a folder.
    local = HubModel(str(tmp_path / "theirs"), "", pin.sha256, "own")
    students.build("tiny", tmp_path / "again", SMALL, {"tiny": local}, 0)
    assert file_digest(tmp_path / "again/model.safetensors") == file_digest(tmp_path / "out/model.safetensors")


@pytest.mark.fault
def test_a_student_that_is_not_the_pinned_one_is_refused(tmp_path: Path):
    folder = save_tiny(tmp_path / "theirs")
    digest = students.weights_digest(folder)
    with pytest.raises(BadInput, match=rf"hub\.tiny: the weights of .* have the digest {digest}, expected 0+;"):
        students.build("tiny", tmp_path / "out", SMALL, {"tiny": HubModel(str(folder), "", "0" * 64, "own")}, 0)
    with pytest.raises(BadInput, match=r"chatml: the tokenizer has no token <\|im_start\|>"):
        students.build("tiny", tmp_path / "out", SMALL, {"tiny": HubModel(str(folder), "", digest)}, 0)
    with pytest.raises(ValueError, match="commit must be a full hash of 40 digits, found 'main': a branch can move"):
        HubModel("some/body", "main", digest)
    with pytest.raises(ValueError, match="is no folder, and a model of the hub needs a commit"):
        HubModel("some/body", "", digest)


def test_stage_writes_model_and_metrics(tmp_path: Path):
    stage = for_test(Params(SMALL, {}), tmp_path / "out", {}, {"student": "small-llama"}, 1, "llm", "students")
    run(stage)
    assert stage.record.metrics["steps"] == 3
    assert stage.record.metrics["parameters"] == students.load(stage.out)[0].num_parameters()
    assert stage.record.models[0]["sha256"] == tree_digest(stage.out)
    with pytest.raises(ValueError, match="multiple of 2 x heads"):
        replace(SMALL, heads=3)


@pytest.mark.e2e
@pytest.mark.slow
def test_smollm2_from_the_package_answers_and_reloads(tmp_path: Path):
    students.build("smollm2", tmp_path, SMALL, {}, 0)
    assert students.stored_dtype(tmp_path) == torch.bfloat16
    assert (tmp_path / "model.safetensors").stat().st_size < 300e6
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    continued = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(continued[0])
    assert tokenizer.pad_token == "<|endoftext|>" != tokenizer.eos_token
    example = encode({"prompt": "Hi", "completion": "Yes"}, tokenizer)
    trained = [t for t, m in zip(example.ids, example.completion_mask, strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(trained) == ["Yes", "<|im_end|>"]
    text = generation.generate(model, tokenizer, ["What is the capital of France?"], generation.Decoding(12))[0]
    assert "Paris" in text
