import json
from pathlib import Path

import pytest

from springhead.errors import BadInput
from springhead.llm import chat
from springhead.llm.packing import encode, read_conversations
from tests.llm.tiny import byte_tokenizer, tiny_tokenizer

pytestmark = pytest.mark.unit
TURNS = [("user", "One\nand two?"), ("assistant", "3."), ("user", "Why"), ("assistant", " So. ")]
CONVERSATION = [{"role": role, "content": content} for role, content in TURNS]
WRITTEN = {
    "chatml": (
        "<|im_start|>user\nOne\nand two?<|im_end|>\n<|im_start|>assistant\n", "3.<|im_end|>",
        "\n<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\n", " So. <|im_end|>", "\n",
    ),
    "llama-3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nOne\nand two?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "3.<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nWhy<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        " So. <|eot_id|>", "",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nOne\nand two?<end_of_turn>\n<start_of_turn>model\n", "3.<end_of_turn>",
        "\n<start_of_turn>user\nWhy<end_of_turn>\n<start_of_turn>model\n", " So. <end_of_turn>", "\n",
    ),
    "phi-3": (
        "<|user|>\nOne\nand two?<|end|>\n<|assistant|>\n", "3.<|end|>",
        "\n<|user|>\nWhy<|end|>\n<|assistant|>\n", " So. <|end|>", "\n",
    ),
    "plain": ("One\nand two?\n", "3.</s>", "Why\n", " So. </s>", ""),
}  # fmt: skip
"""By template: text before an answer, answer with its end sign, and so on."""

CHATML_OF_A_MODEL = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_for(name: str):
    special = [mark for marks in chat._MARKS.values() for mark in marks]
    tokenizer = byte_tokenizer(*special, "<|end_header_id|>", "<|begin_of_text|>", "<bos>", "<|assistant|>")
    chat.use_template(tokenizer, name)
    return tokenizer


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_named_templates_train_answers_and_end_signs_token_by_token(name: str) -> None:
    tokenizer = tokenizer_for(name)
    ids, mask = chat.encode_messages(tokenizer, CONVERSATION, [tokenizer.eos_token])
    expected_ids: list[int] = []
    expected_mask: list[bool] = []
    for number, text in enumerate(WRITTEN[name]):
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected_ids += part
        expected_mask += [number % 2 == 1] * len(part)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(WRITTEN[name])
    assert ids == expected_ids
    assert mask == expected_mask
    assert chat.prompt_ids(tokenizer, CONVERSATION[:3]) == ids[: len(ids) - sum(map(len, _tail(tokenizer, name)))]
    chat.check_template(tokenizer, [tokenizer.eos_token])


def _tail(tokenizer, name: str) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in WRITTEN[name][3:]]


def test_a_template_without_blocks_trains_the_same_tokens_as_one_with_them() -> None:
    tokenizer = tokenizer_for("chatml")
    system = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    marked = chat.encode_messages(tokenizer, system, ["<|im_end|>"])
    tokenizer.chat_template = CHATML_OF_A_MODEL
    assert chat.encode_messages(tokenizer, system, ["<|im_end|>"]) == marked
    chat.check_template(tokenizer, ["<|im_end|>"])
    # A default system message is context, and the answers are trained as before.
    ids, mask = chat.encode_messages(tokenizer, CONVERSATION, ["<|im_end|>"])
    spoken = "".join(tokenizer.decode([i]) for i, trained in zip(ids, mask, strict=True) if trained)
    assert spoken == "3.<|im_end|> So. <|im_end|>"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "not its answer|does not end in an end sign"),
        (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
            "{% endgeneration %}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
            "does not end in an end sign",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% endfor %}",
            "of 2 answers of a probe are trained",
        ),
        (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A:' }}{% generation %}"
            "{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
            "trained after other tokens than it is generated after",
        ),
        (
            "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ '(old answer)' }}"
            "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
            "rewrites earlier turns",
        ),
        ("{{ raise_exception('not for me') }}", "cannot write this conversation"),
        ("{% for m in %}", "cannot write this conversation"),
    ],
)
def test_a_template_that_would_train_the_wrong_tokens_is_refused(template: str, message: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match=message):
        chat.check_template(tokenizer, ["</s>"])


@pytest.mark.fault
def test_an_unknown_template_is_named(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(BadInput, match=r"unknown template 'vicuna'; choose own, a .jinja file, chatml, llama-3"):
        chat.use_template(tokenizer, "vicuna")
    with pytest.raises(BadInput, match="brings none of its own"):
        chat.use_template(tokenizer, "own")
    with pytest.raises(BadInput, match=r"llama-3: the tokenizer has no token <\|start_header_id\|>, <\|eot_id\|>"):
        chat.use_template(tokenizer, "llama-3")
    with pytest.raises(BadInput, match=r"no\.jinja: no such file"):
        chat.use_template(tokenizer, str(tmp_path / "no.jinja"))
    with pytest.raises(BadInput, match="no chat template"):
        chat.encode_messages(tokenizer, CONVERSATION, ["</s>"])
    (tmp_path / "own.jinja").write_text(chat.TEMPLATES["plain"])
    chat.use_template(tokenizer, str(tmp_path / "own.jinja"))
    chat.check_template(tokenizer, ["</s>"])


def test_the_small_tokenizer_trains_what_it_should() -> None:
    chat.check_template(tiny_tokenizer(), ["<eos>"])


def test_rows_of_every_form_are_read_and_named_by_file_and_line(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Ana", "completion": "3"},
        {"prompt": [{"role": "user", "content": "Ana"}], "completion": [{"role": "assistant", "content": "3"}]},
        {"id": "mine", "messages": [{"role": "user", "content": "Ana"}, {"role": "assistant", "content": "3"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_conversations(path)
    assert [row["id"] for row in read] == ["rows.jsonl:1", "rows.jsonl:2", "mine"]
    assert len({encode(row, tiny_tokenizer()) for row in read}) == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Ana", "completion": "3"', "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"prompt": "Ana"}', "needs 'messages'"),
        ('{"prompt": "Ana", "completion": ""}', "the answer of message 1 is empty"),
        ('{"prompt": "Ana", "completion": " \\n"}', "the answer of message 1 is empty"),
        ('{"prompt": "Ana", "completion": 3}', "content of message 1 must be text, found int"),
        ('{"messages": []}', "needs 'messages'"),
        ('{"messages": [{"role": "user"}]}', "message 0 must have role and content"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 0 has the role 'bot'"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Ana", "completion": "3"}\n' + line + "\n")
    with pytest.raises(BadInput, match=rf"rows\.jsonl:2: .*{message}"):
        read_conversations(path)
    path.write_text("")
    with pytest.raises(BadInput, match=r"rows\.jsonl: no rows"):
        read_conversations(path)
