"""Texts and chats out of files: TinyStories' shards, or .txt, .jsonl, .json and .parquet, also gzipped."""

import glob
import gzip
import json
import os
import re
import zlib

from tokenizer import ROLES

SHARDS = "TinyStories_all_data"  # the folder of unpacked shards, inside the data folder
BLOCK = 2**20  # characters or bytes that are read at once

SPACE, COMMA, CLOSING = map(re.compile, (r"[ \t\n\r]*", r"[ \t\n\r]*,[ \t\n\r]*", r"[ \t\n\r]*\]"))
EXPECTED = f'expected a list of {{"story": text}}; delete {SHARDS} and run tiny_stories.py download again'


def find_shards(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "data*.json")))


def read_shard(path):
    """Yields the records of a shard, as they are read; ValueError names the file and the story."""
    record = None
    with open(path, encoding="utf-8") as file:
        for record in read_records(f"{path}, story", read_array(file), "story", EXPECTED):
            yield record
    if record is None:
        raise ValueError(f"{path}: found [], {EXPECTED}")


def read_records(name, rows, field, expected):
    """Yields what training needs of rows: {"story": text} or {"messages": dialog}; ValueError names one."""
    number = 0
    try:
        for row in rows:
            if isinstance(row, dict) and is_dialog(row.get("messages")):
                yield {"messages": row["messages"]}
            elif isinstance(row, dict) and isinstance(row.get(field), str):
                yield {"story": row[field]}
            else:
                raise ValueError(f"found {json.dumps(row, default=str):.60}")
            number += 1
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = error if str(error).startswith("found") else f"found no JSON in UTF-8 ({error})"
        raise ValueError(f"{name} {number}: {found}, {expected}") from error


def read_array(file):
    """Yields the values of a JSON array while it is read. ValueError, RecursionError: it isn't one."""
    decode, text = json.JSONDecoder().raw_decode, file.read(BLOCK)
    if not (opening := re.match(r"[ \t\n\r]*\[", text)):
        raise ValueError(f"found {' '.join(text[:60].split()) or 'nothing'}")
    at, before = opening.end(), SPACE
    while not (closing := CLOSING.match(text, at)):
        try:
            if not (begin := before.match(text, at)):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            (value, end), wrong = decode(text, begin.end()), None
        except (ValueError, RecursionError) as error:
            end, wrong = len(text), error
        # cut here, perhaps, as numbers may be in 1|.5|e+|3; as much again is read, so that time stays linear
        if end > len(text) - 3 and (more := file.read(max(BLOCK, end - at))):
            text, at = text[at:] + more, 0
        elif wrong:
            raise wrong
        else:
            yield value
            at, before = end, COMMA
    if (text[closing.end():] + file.read()).strip(" \t\n\r"):
        raise json.JSONDecodeError("Extra data", text, closing.end())


def read_documents(path, field, separator):
    """Yields the records of one input file; ValueError names it and the document."""
    kind = os.path.splitext(path.removesuffix(".gz"))[1]
    if kind not in (".txt", ".jsonl", ".json", ".parquet"):
        raise ValueError(f"{path}: found {kind or 'no'} suffix, expected .txt, .jsonl, .json or .parquet")
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
        if kind == ".txt":
            rows = ({field: piece} for piece in split_at(file, separator))
        elif kind == ".jsonl":
            rows = (json.loads(line) for line in file if not line.isspace())
        else:
            rows = read_array(file) if kind == ".json" else read_parquet(path, field)
        expected = f'expected {{"{field}": text}}, see --field, or {{"messages": [{{"role", "content"}}]}}'
        yield from read_records(f"{path}, document", rows, field, expected)


def split_at(file, separator):
    """Yields the pieces of a text file between separators, or all of it."""
    if separator is None:
        yield file.read()
        return
    separator, rest = separator.replace("\\n", "\n"), ""
    while block := file.read(max(BLOCK, len(rest))):
        *pieces, rest = (rest + block).split(separator)
        yield from pieces
    yield rest


def read_parquet(path, field):
    try:
        import pyarrow.parquet as parquet  # here, as few need it
    except ImportError as error:
        raise ValueError(f"{path}: found no pyarrow to read it with; pip install pyarrow") from error
    file = parquet.ParquetFile(path)
    columns = [name for name in ("messages", field) if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=1000, columns=columns):
        yield from batch.to_pylist()


def is_dialog(messages):
    return isinstance(messages, list) and messages != [] and all(
        isinstance(message, dict) and message.keys() == {"role", "content"}
        and isinstance(message["content"], str) and message["role"] in list(ROLES) for message in messages)


def texts_of(record):
    return [m["content"] for m in record["messages"]] if "messages" in record else [record["story"].strip()]
