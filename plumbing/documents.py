"""Texts and chats from files: shards of stories, and .txt, .jsonl, .json and .parquet, also gzipped (.gz).

A record is the part of a document that training needs: {"story": text}, or {"messages": dialog}, where a
dialog is a list of {"role": one of ROLES, "content": text}. Files are read in blocks, so that they may be
larger than memory.
"""

import glob
import gzip
import json
import os
import re
import zlib

from tokenizer import ROLES

BLOCK = 2**20  # characters that are read at once
SHARDS = "TinyStories_all_data"  # the folder of the shards, inside the data folder
EXPECTED = f'expected a list of {{"story": text}}; delete {SHARDS} and run tiny_stories.py download again'


def find_shards(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "data*.json")))


def read_shard(path, block=BLOCK):
    """Yields the records of a shard, a JSON list of {"story": text}; ValueError names the file and story."""
    record = None
    with open(path, encoding="utf-8") as file:
        for record in read_records(f"{path}, story", read_array(file, block), "story", EXPECTED):
            yield record
    if record is None:
        raise ValueError(f"{path}: found [], {EXPECTED}")


def read_documents(path, field, separator, block=BLOCK):
    """Yields the records of a file; ValueError names the file and the document.

    The suffix says which kind of file it is. field: the name of the text in objects and rows. separator: as
    in split_at.
    """
    kind = os.path.splitext(path.removesuffix(".gz"))[1]
    if kind not in (".txt", ".jsonl", ".json", ".parquet"):
        raise ValueError(f"{path}: found {kind or 'no'} suffix, expected .txt, .jsonl, .json or .parquet")
    open_text = gzip.open if path.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig") as file:
        if kind == ".txt":
            rows = ({field: piece} for piece in split_at(file, separator, block))
        elif kind == ".jsonl":
            rows = (json.loads(line) for line in file if not line.isspace())
        elif kind == ".json":
            rows = read_array(file, block)
        else:
            rows = read_parquet(path, field)
        expected = f'expected {{"{field}": text}}, see --field, or {{"messages": [{{"role", "content"}}]}}'
        yield from read_records(f"{path}, document", rows, field, expected)


def read_records(name, rows, field, expected):
    """Yields the record of each row, whose text is under field; ValueError says name, number, expected."""
    number = 0  # enumerate would not give the number of a row whose reading fails.
    try:
        for row in rows:
            yield record_of(row, field)
            number += 1
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        found = error if str(error).startswith("found") else f"found no JSON in UTF-8 ({error})"
        raise ValueError(f"{name} {number}: {found}, {expected}") from error


def record_of(row, field):
    """The record of a row, whose text is under field; ValueError begins with "found"."""
    if isinstance(row, dict) and is_dialog(row.get("messages")):
        return {"messages": row["messages"]}
    if isinstance(row, dict) and isinstance(row.get(field), str):
        return {"story": row[field]}
    raise ValueError(f"found {json.dumps(row, default=str):.60}")


def is_dialog(messages):
    """Whether a value is a list of at least one {"role": one of ROLES, "content": text}."""
    if not isinstance(messages, list) or not messages:
        return False
    for message in messages:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            return False
        # The role in a file may be a list or an object, which a dict such as ROLES can't be searched for.
        if not isinstance(message["content"], str) or message["role"] not in list(ROLES):
            return False
    return True


def texts_of(record):
    """The texts of a record: its stripped story, or the contents of its messages as they are."""
    if "messages" in record:
        return [message["content"] for message in record["messages"]]
    return [record["story"].strip()]


def split_at(file, separator, block=BLOCK):
    r"""Yields the pieces of a text file between separators; None: the whole text as one piece.

    A separator may have \n, a backslash and an n, for a line break.
    """
    if separator is None:
        yield file.read()
        return
    separator = separator.replace("\\n", "\n")
    rest = ""
    # Each read at least doubles the rest, so that the time for a long piece is linear in its length.
    while text := file.read(max(block, len(rest))):
        *pieces, rest = (rest + text).split(separator)
        yield from pieces
    yield rest


SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space, which is less than Python's \s
COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
CLOSING = re.compile(r"[ \t\n\r]*\]")


def read_array(file, block=BLOCK):
    """Yields the values of a JSON array while it is read; ValueError or RecursionError if it isn't one."""
    decode = json.JSONDecoder().raw_decode
    text = file.read(block)
    opening = re.match(r"[ \t\n\r]*\[", text)
    if not opening:
        raise ValueError(f"found {' '.join(text[:60].split()) or 'nothing'}")
    at = opening.end()
    separator = SPACE  # No comma comes before the first value.
    while not (closing := CLOSING.match(text, at)):
        wrong = None
        try:
            begin = separator.match(text, at)
            if not begin:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            value, end = decode(text, begin.end())
        except (ValueError, RecursionError) as error:
            wrong = error
            end = len(text)
        more = ""
        if end > len(text) - 3:
            # The block may end within the value, even if it looks whole, as 1 does where 1.5 or 1e+5 stands.
            # Each read at least doubles the text, so that the time for a long value is linear in its length.
            more = file.read(max(block, end - at))
        if more:
            text = text[at:] + more
            at = 0
        elif wrong:
            raise wrong
        else:
            yield value
            at = end
            separator = COMMA
    if (text[closing.end():] + file.read()).strip(" \t\n\r"):
        raise json.JSONDecodeError("Extra data", text, closing.end())


def read_parquet(path, field):
    """Yields the rows of a .parquet file as dicts of the columns "messages" and field."""
    try:
        import pyarrow.parquet as parquet  # It is large and few need it, so it is imported only here.
    except ImportError as error:
        raise ValueError(f"{path}: found no pyarrow to read it with; pip install pyarrow") from error
    file = parquet.ParquetFile(path)
    columns = [name for name in ("messages", field) if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=1000, columns=columns):
        yield from batch.to_pylist()
