"""The command ``springhead export``: which documents, and where they go."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from springhead.errors import BadInput
from springhead.lineage.graph import not_in_an_output

FORMATS = ("openlineage", "croissant", "data-card", "model-card")


def export(root: Path, kind: str, ref: str | None = None, out: Path | None = None, url: str | None = None) -> str:
    """Makes documents and returns what to print: the document itself, or where it went.

    Args:
        root: the repository root.
        kind: one of ``FORMATS``.
        ref: what they are about; default all executions, all data sets, or the promoted models.
        out: a file, or a folder for several documents; default standard output.
        url: for ``openlineage`` the server that takes the events, for ``croissant`` where the
            files of the repository are published.

    Raises:
        BadInput: if an argument is wrong, nothing is meant by ``ref``, or ``out`` cannot be written.
    """
    if kind not in FORMATS:
        raise BadInput(f"{kind}: no such format; there are {', '.join(FORMATS)}")
    if url is not None and kind.endswith("-card"):
        raise BadInput(f"--url is for openlineage and croissant, not for {kind}")
    if out is not None:
        not_in_an_output(root, out, "--out")
    if kind == "openlineage":
        return _openlineage(root, ref, out, url)
    made = _croissants(root, ref, out, url) if kind == "croissant" else _cards(root, kind, ref)
    if out is None:
        if len(made) > 1:
            names = ", ".join(made)
            raise BadInput(f"these are {len(made)} documents ({names}); name one, or give a folder with --out")
        return next(iter(made.values()))
    if len(made) == 1 and ref is not None and not out.is_dir():
        return _write(out, next(iter(made.values())))
    return "\n".join(_write(out / name, text) for name, text in made.items())


def _openlineage(root: Path, ref: str | None, out: Path | None, url: str | None) -> str:
    from springhead.export import openlineage

    made = openlineage.events(root, ref)
    text = "".join(json.dumps(event, sort_keys=True, ensure_ascii=False) + "\n" for event in made)
    said = []
    if out is not None:
        said.append(_write(out / "openlineage.jsonl" if out.is_dir() else out, text))
    if url is not None:
        said.append(f"{openlineage.send(made, url)} events sent")
    return "\n".join(said) if said else text.rstrip("\n")


def _croissants(root: Path, ref: str | None, out: Path | None, url: str | None) -> dict[str, str]:
    from springhead.export import cards, croissant

    facts = cards.Facts(root)
    stages = cards.data_stages(root, facts.graph, ref)
    alone = len(stages) == 1 and ref is not None and out is not None and not out.is_dir()
    folder = root if out is None else (out.parent if alone else out)

    def document(stage: str) -> str:
        described = croissant.describe(facts, stage, folder.resolve(), url)
        return json.dumps(described, indent=1, ensure_ascii=False) + "\n"

    return _named(stages, ".croissant.json", document)


def _cards(root: Path, kind: str, ref: str | None) -> dict[str, str]:
    from springhead.export import cards

    facts = cards.Facts(root)
    if kind == "data-card":
        stages = cards.data_stages(root, facts.graph, ref)
        return _named(stages, ".md", lambda stage: cards.data_card(facts, stage))
    models = {m.path: m for m in cards.models_of(root, facts.graph, ref, facts.ledger)}
    return _named(list(models), ".md", lambda path: cards.model_card(facts, models[path]))


def _named(names: list[str], suffix: str, document: Callable[[str], str]) -> dict[str, str]:
    """Returns documents by file name; whatever a name holds, it is one plain file name."""
    return {re.sub(r"[^\w@.-]+", "-", name).strip("-.") + suffix: document(name) for name in names}


def _write(path: Path, text: str) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out {path}: cannot be written ({error.strerror}); choose another place") from error
    return str(path)
