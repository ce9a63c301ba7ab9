"""Croissant descriptions of data sets: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html.

One description per data set folder: every file with its size and SHA-256, and record sets over
the files that Croissant's tools can read, the row table (Parquet) and texts (JSON lines). HDF5
is described as a file; the format has no way to name arrays inside it.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pajson
import pyarrow.parquet as pq

import springhead
from springhead.errors import BadInput
from springhead.export.cards import Facts
from springhead.lineage.digests import file_digest
from springhead.lineage.rows import DECISIONS, ROWS

CONFORMS_TO = "http://mlcommons.org/croissant/1.1"
_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        name: f"cr:{name}"
        for name in (
            "arrayShape", "citeAs", "column", "containedIn", "dataBiases", "dataCollection", "equivalentProperty",
            "excludes", "extract", "field", "fileObject", "fileProperty", "fileSet", "format", "includes", "isArray",
            "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "personalSensitiveInformation",
            "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "sdVersion", "separator",
            "source", "subField", "transform", "unArchive",
        )
    },
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}  # fmt: skip
_FORMATS = {
    ".jsonl": "application/jsonlines",
    ".parquet": "application/x-parquet",
    ".hdf5": "application/x-hdf5",
    ".json": "application/json",
    ".csv": "text/csv",
    ".png": "image/png",
}
_SAMPLE = 1 << 20  # bytes of JSON lines that show the columns


def describe(facts: Facts, stage: str, folder: Path, url: str | None = None) -> dict[str, Any]:
    """Returns the description of the data sets that a stage made, as JSON-LD.

    Args:
        facts: the checkout.
        stage: a stage that made data sets.
        folder: where the description will lie; the files are named relative to it.
        url: where the repository's files are published; each file is then named below it.

    Raises:
        BadInput: if a file is missing or is not what the receipt says.
    """
    made = facts.outputs(stage)
    out = facts.graph.maker(made[0]["path"]) and next(
        o for o in facts.graph.receipts[stage]["outputs"] if made[0]["path"].startswith(f"{o}/") or o == made[0]["path"]
    )
    assert out
    digests: Mapping[str, str] = facts.graph.receipts[stage]["outputs"][out]["files"]
    name = made[0]["name"] if len(made) == 1 else stage
    rows = ", ".join(f"{d['rows']:,} in {Path(d['path']).name}" for d in made)
    described: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "name": _identifier(name),
        "alternateName": name,
        "description": f"Made by the stage {stage} of Springhead {springhead.__version__}; rows: {rows}.",
        "conformsTo": CONFORMS_TO,
        # The content decides the version, and equal content has equal digests.
        "version": f"1.0.0+{facts.graph.receipts[stage]['outputs'][out]['sha256'][:16]}",
        "keywords": ["springhead", stage.partition("-")[0]],
        "distribution": [_file(facts.root, out, file, digests[file], folder, url) for file in sorted(digests)],
        "recordSet": [_records(facts.root / out / file, file) for file in sorted(digests) if _loads(file)],
    }
    rules = [rule for s in facts.graph.upstream(stage) for rule in facts.rows.rules(s)]
    if rules:
        described["rai:dataPreprocessingProtocol"] = [
            f"{r['stage']}: {r['rule']}: {r['kept']} rows kept, {r['dropped']} not kept, {r['replaced']} replaced"
            for r in rules
        ]
    return described


def _identifier(text: str) -> str:
    """Returns a name that every reader takes as a file name and an identifier."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "data"


def _file(root: Path, out: str, file: str, digest: str, folder: Path, url: str | None) -> dict[str, Any]:
    path = root / out / file
    if not path.is_file():
        raise BadInput(f"{out}/{file}: not in the workspace; run `dvc checkout {out}`, or `dvc pull {out}`")
    if file_digest(path) != digest:
        raise BadInput(f"{out}/{file}: is not what its receipt says; run `dvc checkout --force {out}`")
    return {
        "@type": "cr:FileObject",
        "@id": file,
        "name": file,
        "contentUrl": f"{url.rstrip('/')}/{out}/{file}" if url else Path(os.path.relpath(path, folder)).as_posix(),
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": _FORMATS.get(path.suffix, "application/octet-stream"),
        "sha256": digest,
    }


def _loads(file: str) -> bool:
    """Whether a record set is made over a file: the row table, the decisions and texts."""
    return file in (ROWS, DECISIONS) or ("/" not in file and file.endswith(".jsonl"))


def _records(path: Path, file: str) -> dict[str, Any]:
    schema = pq.read_schema(path) if file.endswith(".parquet") else _json_schema(path)
    name = Path(file).stem
    fields = []
    for column in schema:
        if pa.types.is_nested(column.type) and not pa.types.is_list(column.type):
            kind: pa.DataType | None = None  # a column of objects, which has no type of its own in Croissant
        else:
            kind = column.type.value_type if pa.types.is_list(column.type) else column.type
        data_type = _data_type(kind)
        if data_type is None:
            continue
        field: dict[str, Any] = {
            "@type": "cr:Field",
            "@id": f"{name}/{column.name}",
            "name": f"{name}/{column.name}",
            "dataType": data_type,
            "source": {"fileObject": {"@id": file}, "extract": {"column": column.name}},
        }
        if pa.types.is_list(column.type):
            field |= {"isArray": True, "arrayShape": "-1"}
        fields.append(field)
    records: dict[str, Any] = {"@type": "cr:RecordSet", "@id": name, "name": name, "field": fields}
    if any(f["@id"] == f"{name}/id" for f in fields) and name != "decisions":  # a row has several decisions
        records["key"] = {"@id": f"{name}/id"}
    return records


def _json_schema(path: Path) -> pa.Schema:
    """Returns the columns of the first lines of a JSON-lines file."""
    with path.open("rb") as file:
        sample = file.read(_SAMPLE)
    whole = sample[: sample.rfind(b"\n") + 1]
    try:
        return pajson.read_json(pa.BufferReader(whole)).schema
    except pa.ArrowInvalid as error:
        raise BadInput(
            f"{path}: its lines are no JSON objects of one form ({error}); `dvc checkout` restores it"
        ) from error


def _data_type(kind: pa.DataType | None) -> str | None:
    if kind is None or pa.types.is_null(kind):
        return None
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    if pa.types.is_floating(kind):
        return "sc:Float"
    return "sc:Text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None
