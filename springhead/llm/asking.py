"""How a stage asks a model: in shards that survive a kill, with a record of how the answers were decoded.

The shards lie in the stage's scratch folder, which is the same for the same inputs and goes when the stage succeeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from springhead.jsonio import read_json, write_json_atomic
from springhead.llm import chat, generation
from springhead.llm.answers import Row, conversation_of, read_answers, write_answers
from springhead.progress import Progress


def described(model: PreTrainedModel, decoding: generation.Decoding) -> dict[str, Any]:
    """How answers come about: the decoding, and the device and number format of the model."""
    return {**asdict(decoding), "stop": list(decoding.stop), **_numerics(model)}


def _numerics(model: PreTrainedModel) -> dict[str, str]:
    return {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}


def ask(
    rows: Sequence[Row],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: generation.Decoding,
    digest: str,
    scratch: Path,
    progress: Progress | None = None,
) -> list[str]:
    """Answer rows, in their order; what an earlier, killed run answered is not asked again.

    A shard is a batch, and the longest prompts come first: the batches, and with them the last bits of every logit, are
    those of one call of `generation.generate` with all rows.

    Args:
        rows: each with an `id` of its own, and a `prompt` or `messages`.
        model: what answers.
        tokenizer: its tokenizer.
        decoding: how; a row's draws are seeded by its id.
        digest: of the model's folder.
        scratch: folder of this model's answers to these rows.
        progress: told about finished rows.

    Raises:
        BadInput: see `write_answers`; or a prompt leaves no room for an answer in the model's context.
    """

    def engine(
        conversations: Sequence[generation.Conversation], keys: Sequence[generation.Key]
    ) -> list[generation.Answer]:
        return generation.answer(model, tokenizer, conversations, decoding, keys=keys)

    prompts = [generation.prompt_ids(tokenizer, conversation_of(row)) for row in rows]
    generation.room_of(generation.context_of(model.config), prompts, decoding, [str(row["id"]) for row in rows])
    longest_first = [rows[i] for i in sorted(range(len(rows)), key=lambda i: (-len(prompts[i]), i))]
    scratch.mkdir(parents=True, exist_ok=True)
    path = write_answers(
        longest_first,
        engine,
        digest,
        chat.template_digest(tokenizer),
        decoding,
        scratch,
        shard_rows=decoding.batch_rows,
        numerics=_numerics(model),
        progress=progress,
    )
    texts = {str(line["parents"][0]): str(line["text"]) for line in read_answers(path)}
    return [texts[str(row["id"])] for row in rows]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """A JSON value that is made once and read from scratch when a killed stage runs again."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, make())
    return read_json(path)
