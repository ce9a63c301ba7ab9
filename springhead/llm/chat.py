"""Conversations and chat templates: from messages to tokens, and which of the tokens are trained.

A row is a conversation, `{"messages": [{"role", "content"}, ...]}`, or one turn, `{"prompt", "completion"}`. The chat
template turns it into text; trained are the assistant's contents and the end sign after each. There are two ways to
know them. A template with `{% generation %}` blocks marks them itself. For any other, the template is rendered up to
each answer, with the prompt for it, and up to its end: what the second text has beyond the first is the answer, up to
its last end sign. That is right for every template that only ever appends; one that rewrites earlier turns (some
drop old reasoning) is refused by name.

`check_template` proves on a conversation of its own, token by token, that a tokenizer trains answers, ends and nothing
else, and that training shows an answer the very tokens that generation will start from.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from springhead.errors import BadInput
from springhead.lineage.digests import json_digest
from springhead.llm.tokenizer import CHATML_TRAINING_TEMPLATE

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Mapping[str, Any]


def _turns(start: str, end: str, headers: Mapping[str, str], prefix: str = "", trailing: str = "") -> str:
    """A template of turns `start + header + content + end + trailing`, with the answer's block marked."""
    lines = [f"{{{{ {prefix!r} }}}}"] if prefix else []
    lines.append("{% for message in messages %}")
    for role, header in headers.items():
        word = "if" if role == "assistant" else "elif"
        content = f"{{{{ message['content'] + {end!r} }}}}"
        if role == "assistant":
            content = "{% generation %}" + content + "{% endgeneration %}"
        text = start + header
        lines.append(f"{{% {word} message['role'] == {role!r} %}}{{{{ {text!r} }}}}{content}{{{{ {trailing!r} }}}}")
    lines.append("{% else %}{{ raise_exception('no role ' + message['role']) }}{% endif %}{% endfor %}")
    opening = start + headers["assistant"]
    lines.append(f"{{% if add_generation_prompt %}}{{{{ {opening!r} }}}}{{% endif %}}")
    return "".join(lines)


TEMPLATES: dict[str, str] = {
    "chatml": CHATML_TRAINING_TEMPLATE,
    "llama-3": _turns(
        "<|start_header_id|>",
        "<|eot_id|>",
        {r: r + "<|end_header_id|>\n\n" for r in ("assistant", "user", "system")},
        prefix="<|begin_of_text|>",
    ),
    "gemma": _turns(
        "<start_of_turn>", "<end_of_turn>", {"assistant": "model\n", "user": "user\n"}, prefix="<bos>", trailing="\n"
    ),
    "phi-3": _turns("<|", "<|end|>", {r: r + "|>\n" for r in ("assistant", "user", "system")}, trailing="\n"),
    "plain": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    ),
}
"""Templates by name, for models that come without one. `plain` needs no special tokens: text, line break, answer,
end sign."""

_MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi-3": ("<|user|>", "<|end|>"),
}
"""The special tokens that a template is of no use without; the last one ends an answer."""


def use_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give a tokenizer a chat template, and the end sign that goes with it.

    Args:
        tokenizer: changed in place.
        name: "own" keeps the tokenizer's; a name of `TEMPLATES`; or the path of a Jinja file (`*.jinja`).

    Raises:
        BadInput: the template is unknown, the tokenizer has none of its own, or it lacks the template's tokens.
    """
    if name == "own":
        if not tokenizer.chat_template:
            raise BadInput(f"chat_template: the model brings none of its own; choose one of {', '.join(TEMPLATES)}")
        return
    if name.endswith(".jinja"):
        if not Path(name).is_file():
            raise BadInput(f"chat_template: {name}: no such file")
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
        return
    if name not in TEMPLATES:
        raise BadInput(f"chat_template: unknown template {name!r}; choose own, a .jinja file, {', '.join(TEMPLATES)}")
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in _MARKS.get(name, ()) if token not in vocabulary]:
        raise BadInput(f"chat_template {name}: the tokenizer has no token {', '.join(absent)}; choose another template")
    tokenizer.chat_template = TEMPLATES[name]
    if name in _MARKS:
        tokenizer.eos_token = _MARKS[name][-1]


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's conversation: its `messages`, or its `prompt` and `completion` as user and assistant.

    Raises:
        BadInput: naming the row's id, if there is none, a message is no message, or an answer is empty.
    """
    who = f"row {row.get('id', '(no id)')}"
    messages = row.get("messages")
    if messages is None and {"prompt", "completion"} <= set(row):
        messages = _as_turns(row["prompt"], "user") + _as_turns(row["completion"], "assistant")
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{who}: needs 'messages' (each with role and content) or 'prompt' and 'completion'")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadInput(f"{who}: message {number} must have role and content, found {message!r}")
        if message["role"] not in ROLES:
            raise BadInput(f"{who}: message {number} has the role {message['role']!r}; known are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            found = type(message["content"]).__name__
            raise BadInput(f"{who}: the content of message {number} must be text, found {found}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadInput(f"{who}: the answer of message {number} is empty; remove the row or write an answer")
    return [dict(message) for message in messages]


def _as_turns(value: Any, role: str) -> list[Any]:
    """A prompt or completion as messages: a text is one, a list is taken as it is."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answer_next: bool = False) -> str:
    """A conversation as text, as the template writes it.

    Raises:
        BadInput: the template is broken or refuses the conversation.
    """
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next)  # type: ignore[arg-type]
        )
    except Exception as error:  # Jinja's own kinds, and whatever a template raises
        raise BadInput(
            f"the chat template cannot write this conversation ({error}); choose another template"
        ) from error


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """A conversation in tokens, up to where the next answer begins."""
    text = render(tokenizer, messages, answer_next=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ends: Collection[str]
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and whether each is trained.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        ends: end signs, of which the model's generation stops at each.

    Raises:
        BadInput: the template cannot write it, or rewrites what it has written.
    """
    if "{% generation" in template_text(tokenizer) or "{%- generation" in template_text(tokenizer):
        encoded = tokenizer.apply_chat_template(
            list(messages),  # type: ignore[arg-type]
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
    text = render(tokenizer, messages)
    spans = [
        _answer_span(tokenizer, messages, i, text, ends) for i, m in enumerate(messages) if m["role"] == "assistant"
    ]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [
        start < end and any(low <= start and end <= high for low, high in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), inside


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template that is in use.

    Raises:
        BadInput: there is none.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise BadInput(f"the tokenizer has no chat template; choose one of {', '.join(TEMPLATES)}")
    return str(template)


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of the chat template that is in use.

    Raises:
        BadInput: there is none.
    """
    return json_digest(template_text(tokenizer))


def _answer_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, text: str, ends: Collection[str]
) -> tuple[int, int]:
    """Where the answer `index` lies in the text: from the end of its prompt to its last end sign."""
    before = render(tokenizer, messages[:index], answer_next=True)
    through = render(tokenizer, messages[: index + 1])
    if not (text.startswith(through) and through.startswith(before)):
        raise BadInput(
            "the chat template rewrites earlier turns or opens answers differently in training, so the trained tokens "
            f"cannot be told; mark them with a generation block, or choose one of {', '.join(TEMPLATES)}"
        )
    answer = through[len(before) :]
    found = max((answer.rfind(end) + len(end) for end in ends if end and end in answer), default=0)
    return len(before), len(before) + (found or len(answer))


def check_template(tokenizer: PreTrainedTokenizerBase, ends: Collection[str]) -> None:
    """Prove on a conversation of two answers that the template trains what it should.

    Args:
        tokenizer: with a chat template.
        ends: end signs of which a model's generation stops at each.

    Raises:
        BadInput: naming what is wrong: no token is trained, the end sign is not, a user's words are, or an answer
            is trained after other tokens than it is generated after.
    """
    answers = ("3.", "5.")
    said = [("user", "1."), ("assistant", answers[0]), ("user", "2."), ("assistant", answers[1])]
    messages = [{"role": role, "content": content} for role, content in said]
    ids, mask = encode_messages(tokenizer, messages, ends)
    spans: list[list[int]] = []
    for index, trained in enumerate(mask):
        if trained and (index == 0 or not mask[index - 1]):
            spans.append([])
        if trained:
            spans[-1].append(index)
    advice = f"; choose one of {', '.join(TEMPLATES)}"
    if len(spans) != 2:
        raise BadInput(f"chat template: {len(spans)} of 2 answers of a probe are trained{advice}")
    for number, span in enumerate(spans):
        text = tokenizer.decode([ids[i] for i in span], skip_special_tokens=False)
        stopped = next((end for end in ends if end and text.endswith(end)), None)
        if stopped is None:
            raise BadInput(
                f"chat template: the trained part {text!r} of a probe does not end in an end sign ({', '.join(ends)}), "
                f"so a model would not learn to stop{advice}"
            )
        if text.removesuffix(stopped).strip() != answers[number]:
            raise BadInput(f"chat template: the trained part of a probe is {text!r}, not its answer{advice}")
        prompt = prompt_ids(tokenizer, messages[: 2 * number + 1])
        if prompt != ids[: span[0]]:
            raise BadInput(
                "chat template: an answer is trained after other tokens than it is generated after "
                f"({tokenizer.decode(prompt[-8:])!r}, {tokenizer.decode(ids[max(0, span[0] - 8) : span[0]])!r}){advice}"
            )
