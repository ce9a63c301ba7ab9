"""A Llama of a few thousand parameters and a few rows, for tests that train or decode."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from springhead.llm.tokenizer import small_tokenizer

ROWS: list[dict[str, Any]] = [
    {
        "id": "a",
        "prompt": "Ana has 3 figs. Ben has 2 more figs than Ana. How many figs does Ben have?",
        "completion": "Ana = 3. Ben = 3 + 2 = 5. Answer: 5",
    },
    {"id": "b", "prompt": "Cal has 4 nuts. How many nuts does Cal have?", "completion": "Cal = 4. Answer: 4"},
    {
        "id": "c",
        "prompt": "Dan has 2 plums. Eva has 6 plums. Finn has as many plums as Dan and Eva together. "
        "How many plums does Finn have?",
        "completion": "Dan = 2. Eva = 6. Finn = 2 + 6 = 8. Answer: 8",
    },
    {"id": "d", "prompt": "Gus has 9 limes. How many limes does Gus have?", "completion": "Gus = 9. Answer: 9"},
]


ENDS = ["<eos>"]
"""The end signs of the tiny model."""


def tiny_model(seed: int = 0, spread: float = 0.1, **changes: Any) -> LlamaForCausalLM:
    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(initializer_range=spread, bos_token_id=None, **(shape | changes))
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return small_tokenizer()


def byte_tokenizer(*special: str, **settings: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of any text: one token a byte, and the special tokens; no template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **({"eos_token": "</s>"} | settings))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def save_tiny(folder: Path, **changes: Any) -> Path:
    """A model folder with the tiny model and its tokenizer."""
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
