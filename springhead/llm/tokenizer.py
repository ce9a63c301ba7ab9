"""The word-level tokenizer of the small Llama, and the chat templates of both students.

One token per word, number and sign of the generated problems, and one per phrase whose words always come together
("more figs than", "How many figs does"). Short rows, with little between a name and the names it refers to, are
what makes from-scratch training on a CPU affordable. The vocabulary is derived from the
generators' own word lists, so it is the same on every machine and no problem contains an unknown word.

It is a plain `tokenizers` model, saved as `tokenizer.json`; `AutoTokenizer.from_pretrained` loads it.
"""

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from springhead.llm import logic, problems
from springhead.llm.worlds import vocabularies

PAD, EOS, UNKNOWN, SEPARATOR = "<pad>", "<eos>", "<unk>", "<answer>"
_AROUND_ITEM = ("more {} than", "fewer {} than", "as many {} as", "times as many {} as", "How many {} does")
_FIXED = ("together.", "Answer:", "True or false:")

SMALL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '" + SEPARATOR + "' }}{% endif %}"
    "{% endfor %}"
)
"""Question, separator, answer, end. The separator after each question is also the generation prompt."""

CHATML_TRAINING_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as SmolLM2 reads it, without the injected system message, and with the generation block that marks
the trained tokens: an answer and its end sign, nothing else."""


def phrases() -> list[str]:
    """Texts of several words that are one token each, longest first, so that the longest match wins."""
    items = sorted({item for world in vocabularies().values() for item in world.items})
    endings = sorted({f"{world.base}?" for world in vocabularies().values()})
    found = [*_FIXED, *endings, *(frame.format(item) for frame in _AROUND_ITEM for item in items)]
    return sorted(found, key=lambda phrase: (-len(phrase), phrase))


def vocabulary() -> list[str]:
    """Every token of the small tokenizer: special tokens, phrases, then all words in sorted order."""
    words = sorted({*problems.lexicon(), *logic.lexicon()} - set(phrases()))
    return [PAD, EOS, UNKNOWN, SEPARATOR, *phrases(), *words]


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer with its chat template."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNKNOWN))
    # Longest phrase first, then whole words, whole numbers, single signs; white space separates and is dropped.
    whole = "|".join(re.escape(phrase) for phrase in phrases())
    pattern = rf"{whole}|[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.Split(Regex(r"^\s+$"), "removed"),
        ]
    )
    # Joins with spaces and pulls full stops and question marks to the word before.
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return as_small_tokenizer(backend)


def as_small_tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of the small Llama as the library knows it: its special tokens, which `backend` must have, and
    `SMALL_TEMPLATE`.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[SEPARATOR],
        model_max_length=1024,
        padding_side="left",
    )
    tokenizer.chat_template = SMALL_TEMPLATE
    return tokenizer


def unknown_words(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[str]:
    """Words of the texts that the tokenizer maps to its unknown token, sorted; [] where it has none."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    found: set[str] = set()
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        found |= {text[start:end] for token, (start, end) in spans if token == unknown}
    return sorted(found)
