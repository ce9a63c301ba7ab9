"""Answers of a model to a file of rows, in shards that survive a kill, every answer with where it came from.

    out/run.json            what was asked: digests of model, template and rows, decoding, back end, number format
    out/shard-00000.jsonl   finished shards, written whole or not at all
    out/answers.jsonl       all answers in the order of the rows, when the last shard is done

    python -m springhead.llm.answers answers.yaml [decoding.seed=1 ...]        # --help lists the keys

A run that finds its own `run.json` goes on after the finished shards; another run's is refused. A row's draws are
seeded by its id and the number of the sample, so its text depends neither on its shard nor on what else is asked.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedTokenizerBase

from springhead.errors import BadInput, exit_code_of
from springhead.jsonio import canonical, read_json, read_jsonl, write_json_atomic
from springhead.lineage.digests import json_digest, tree_digest
from springhead.llm import chat, generation, students
from springhead.llm.generation import Answer, Conversation, Decoding, Key
from springhead.llm.tokenizer import unknown_words
from springhead.params import from_command
from springhead.progress import Progress

Row = Mapping[str, Any]
Engine = Callable[[Sequence[Conversation], Sequence[Key]], list[Answer]]
"""Answers conversations; the keys are what each row's draws are seeded by."""


def conversation_of(row: Row) -> Conversation:
    """What a row asks: its `messages` without a final answer, or its `prompt`.

    Raises:
        BadInput: it has neither, a message is no message, or nothing is left to answer.
    """
    who = row.get("id", "(no id)")
    given = asked_of(row)
    last = given[-1] if isinstance(given, list) and given else None
    asked = given[:-1] if isinstance(last, Mapping) and last.get("role") == "assistant" else given
    if not asked or not isinstance(asked, str | list):
        raise BadInput(f"row {who}: needs a 'prompt' or 'messages' to answer")
    chat.messages_of({"id": who, "messages": generation.as_messages(asked)})
    return asked


def asked_of(row: Row) -> Any:
    """A row's `messages`, or its `prompt` if they are absent or null, unchecked."""
    return row.get("prompt") if row.get("messages") is None else row["messages"]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; one without an id gets its file's name and line as id.

    Raises:
        BadInput: there are none, one is no conversation, or an id is no text or is there twice.
    """
    rows: list[Row] = []
    for number, row in enumerate(read_jsonl(path), start=1):
        rows.append({"id": f"{path.name}:{number}", **row})
        try:
            conversation_of(rows[-1])
        except BadInput as error:
            raise BadInput(f"{path}:{number}: {error}") from error
    check_ids(rows, str(path))
    return rows


def check_ids(rows: Sequence[Row], where: str) -> None:
    """Make sure that there are rows, each with an id of its own.

    Raises:
        BadInput: naming the first row that is wrong, by its number from 1.
    """
    if not rows:
        raise BadInput(f"{where}: no rows; give at least one")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        name = row.get("id")
        if not isinstance(name, str) or not name:
            raise BadInput(f"{where}: row {number}: its 'id' must be a text that is not empty, found {name!r}")
        if name in seen:
            raise BadInput(f"{where}: row {number}: the id {name!r} is that of row {seen[name]}; ids must be different")
        seen[name] = number


def check_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, context: int | None) -> None:
    """Make sure that a model knows the words of every prompt and has room to answer it, before the first is answered.

    Args:
        rows: see `conversation_of`.
        tokenizer: the model's, with a chat template.
        context: tokens that the model can read and write, if there is a limit.

    Raises:
        BadInput: naming the first row that has to be changed.
    """
    prompts = []
    for row in rows:
        asked = generation.as_messages(conversation_of(row))
        ids = chat.prompt_ids(tokenizer, asked)
        prompts.append(ids)
        if tokenizer.unk_token_id in ids and (words := unknown_words(tokenizer, [m["content"] for m in asked])):
            raise BadInput(
                f"row {row['id']}: words outside the tokenizer's vocabulary: {words}; use others, or another model"
            )
    generation.room_of(context, prompts, Decoding(), [str(row["id"]) for row in rows])


def check_out(out: Path) -> None:
    """Make sure that a folder is there or can be made, before anything is computed that is to be written there.

    Raises:
        BadInput: naming the part of the path that is no folder, or may not be written.
    """
    place = next(part for part in (out, *out.absolute().parents) if part.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BadInput(f"out {out}: {place} is no folder that can be written to; choose another")


def write_answers(
    rows: Sequence[Row],
    engine: Engine,
    model: str,
    template: str,
    decoding: Decoding,
    out: Path,
    *,
    samples: int = 1,
    shard_rows: int = 1024,
    backend: str = "torch",
    numerics: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Answer rows into a folder, going on where an earlier run of the same request stopped.

    Args:
        rows: each with a unique `id`, and a `prompt` or `messages`.
        engine: answers conversations.
        model: digest of the model that the engine runs.
        template: digest of the chat template that it writes conversations with.
        decoding: how it decodes.
        out: the folder to write.
        samples: answers to each row; more than one makes sense above temperature 0 alone.
        shard_rows: answers in a shard: what a kill loses at most.
        backend: name of the engine; answers of two back ends are not the same to the last token.
        numerics: device and number format that the engine computes in; a run in another does not go on.
        progress: told about finished answers.

    Returns:
        The file of all answers. Each line has `id` (its digest), `parents` (the row's id), `sample`, `text`, `tokens`
        (their number, without end sign), `finish`, `model`, `template`, `decoding` and `backend`.

    Raises:
        BadInput: see `check_ids` and `conversation_of`; the samples would be equal; or `out` holds another run.
    """
    if samples < 1 or shard_rows < 1:
        raise BadInput("samples and shard_rows must be at least 1")
    if samples > 1 and decoding.temperature == 0:
        raise BadInput(f"samples is {samples}, but at temperature 0 all are the same; raise it, or ask once")
    check_ids(rows, "rows to answer")
    request: dict[str, Any] = {
        "model": model,
        "template": template,
        "rows": json_digest([{"id": row["id"], "asked": conversation_of(row)} for row in rows]),
        "decoding": {**asdict(decoding), "stop": list(decoding.stop)},
        "samples": samples,
        "shard_rows": shard_rows,
        "backend": backend,
        **(numerics or {}),
    }
    del request["decoding"]["batch_rows"]  # no answer depends on it
    _claim(out, request)
    asked = [(row, number) for row in rows for number in range(samples)]
    shards = [asked[start : start + shard_rows] for start in range(0, len(asked), shard_rows)]
    names = [out / f"shard-{index:05d}.jsonl" for index in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        if not name.exists():
            keys = [f"{row['id']}/{number}" for row, number in shard]
            given = engine([conversation_of(row) for row, _ in shard], keys)
            lines = [_line(row, number, answer, request) for (row, number), answer in zip(shard, given, strict=True)]
            _write_whole(name, lines)
        if progress is not None:
            progress.advance(len(shard))
    whole = out / "answers.jsonl"
    temporary = out / ".answers.new"
    with temporary.open("wb") as file:
        for name in names:
            with name.open("rb") as shard_file:
                shutil.copyfileobj(shard_file, file)
    os.replace(temporary, whole)
    return whole


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """The answers of a file, each checked against its id.

    Raises:
        BadInput: a line is no answer, or was changed since it was written.
    """
    for number, line in enumerate(read_jsonl(path), start=1):
        if line.get("id") != json_digest({name: value for name, value in line.items() if name != "id"}):
            raise BadInput(f"{path}:{number}: the answer is not the one that was written; answer the rows again")
        yield line


def _claim(out: Path, request: Mapping[str, Any]) -> None:
    """Make the folder this run's, or find that it is."""
    if (out / "run.json").exists():
        if read_json(out / "run.json") != request:
            raise BadInput(f"{out}: holds the answers of another run; choose another folder or remove it")
        return
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out}: is not empty and has no run.json; choose another folder")
    write_json_atomic(out / "run.json", dict(request))


def _line(row: Row, sample: int, answer: Answer, request: Mapping[str, Any]) -> dict[str, Any]:
    line = {
        "parents": [row["id"]],
        "sample": sample,
        "text": answer.text,
        "tokens": len(answer.ids),
        "finish": answer.finish,
        **{name: request[name] for name in ("model", "template", "decoding", "backend")},
    }
    return {"id": json_digest(line), **line}


def _write_whole(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        for line in lines:
            file.write(canonical(line) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class Settings:
    """What to answer."""

    model: str
    """Folder of the model."""
    rows: str
    """JSON lines, each with a `prompt` or `messages`, and an `id`; without one, the line of the file is its id."""
    out: str
    """Folder to write; the same again goes on where it stopped."""
    decoding: Decoding
    """How to decode."""
    samples: int = 1
    """Answers to each row."""
    shard_rows: int = 1024
    """Answers in a shard: what a kill loses at most."""
    backend: Literal["torch", "vllm"] = "torch"
    """vllm where it is installed and there is a GPU."""
    chat_template: str = "own"
    """own, a name of `springhead.llm.chat.TEMPLATES`, or a .jinja file; vllm takes the model's own alone."""
    device: students.Device = "auto"
    """cpu, cuda or auto."""

    def __post_init__(self) -> None:
        if self.backend == "vllm" and self.chat_template != "own":
            raise ValueError(
                f"chat_template {self.chat_template!r}: backend vllm writes conversations with the model's own; set it "
                "to own, or use backend torch"
            )


def torch_engine(folder: Path, decoding: Decoding, device: students.Device, template: str = "own") -> Engine:
    """The engine of the torch back end.

    Raises:
        BadInput: not a safe model folder, or a template that it cannot use.
    """
    model, tokenizer = students.load_to_ask(folder, device)
    chat.use_template(tokenizer, template)
    return lambda conversations, keys: generation.answer(model, tokenizer, conversations, decoding, keys=keys)


def context_of(folder: Path) -> int | None:
    """How many tokens the model of a folder can read and write, if there is a limit; it is not loaded for that.

    Raises:
        BadInput: its configuration cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / 'config.json'}: cannot be read ({error}); get the model again") from error
    return generation.context_of(config)


def run(settings: Settings) -> Path:
    """Answer as the settings say; returns the file of all answers."""
    folder, out = Path(settings.model), Path(settings.out)
    check_out(out)
    rows = read_rows(Path(settings.rows))
    tokenizer = students.load_tokenizer(folder)
    chat.use_template(tokenizer, settings.chat_template)
    check_prompts(rows, tokenizer, context_of(folder))
    if settings.backend == "vllm":
        from springhead.llm.vllm_engine import VllmEngine

        engine: Engine = VllmEngine(folder, settings.decoding)
        numerics = {"device": "cuda", "dtype": "auto"}  # what vLLM makes of the model's own
    else:
        numerics = students.numerics(settings.device)
        engine = torch_engine(folder, settings.decoding, settings.device, settings.chat_template)
    with Progress(len(rows) * settings.samples, "answering", "answers") as bar:
        return write_answers(
            rows,
            engine,
            tree_digest(folder),
            chat.template_digest(tokenizer),
            settings.decoding,
            out,
            samples=settings.samples,
            shard_rows=settings.shard_rows,
            backend=settings.backend,
            numerics=numerics,
            progress=bar,
        )


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    about = ("springhead.llm.answers", str(__doc__), arguments)
    return exit_code_of(lambda: print(run(from_command(Settings, *about))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
