"""Texts and chats from files: shards of stories, and your own text, JSON and Parquet, also gzipped (.gz).

A record is the part of a document that training needs: {"story": text}, {"messages": dialog}, where a dialog
is a list of messages as read_message gives them, or {"prompt": text, "completion": text}, of which only the
completion is learned. "tools": True is beside messages whose row defines tools, which is not read. Files are
read in blocks, so that they may be larger than memory.
"""

import glob
import gzip
import itertools
import json
import os
import shlex
import zlib

from plumbing.cli import unescape
from plumbing.files import MANIFEST, likely_encoding, matching
from plumbing.json_stream import BLOCK, read_array, read_json
from plumbing.messages import read_dialog, text_of

SHARDS = "TinyStories_all_data"  # the folder of the shards, inside the data folder
EXPECTED = f'expected a list of {{"story": text}}; delete {SHARDS} and run tiny_stories.py download again'
KINDS = {".txt": "UTF-8 text", ".md": "UTF-8 text", ".json": "JSON in UTF-8", ".jsonl": "JSON in UTF-8",
         ".ndjson": "JSON in UTF-8", ".parquet": "Parquet"}  # suffix -> what such a file holds
FIELD = "text"  # the usual name of a row's text
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system",
           "history")  # A row may have these columns besides a text.
# Who speaks in a turn of ShareGPT's conversations -> the role of that message.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "system": "system", "tool": "tool", "observation": "tool"}

# -----------------------------------------------------------------------------
# Files


def find_shards(folder):
    return sorted(glob.glob(os.path.join(glob.escape(folder), "data*.json")))


def kind_of(path):
    """The suffix that says what a file holds: in lower case, without .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def find_inputs(inputs):
    """Returns (paths of the files that inputs name, number of files in their folders that are left out).

    inputs: one or several: files; folders, for every file below them of one of KINDS; patterns, for shells
    that don't expand them. A path that exists is never taken for a pattern. In folders, hidden files and
    what text() writes beside its shards are left out. FileNotFoundError: an input names no file. ValueError:
    a file that is named is of another kind.
    """
    paths = []
    left_out = 0
    for name in map(os.fspath, [inputs] if isinstance(inputs, str | os.PathLike) else inputs):
        matches = matching(name)
        if not matches:
            missing = "file that matches" if glob.has_magic(name) else "such file"
            raise FileNotFoundError(f"{name}: found no {missing}, expected --input PATH...")
        for match in matches:
            if os.path.isdir(match):
                readable, others = files_below(match)
                paths += readable
                left_out += others
            else:
                check_kind(match)
                paths.append(match)
    return paths, left_out


def check_kind(path):
    kind = kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"{path}: found {kind or 'no'} suffix, expected one of {' '.join(KINDS)}, with or "
                         "without .gz")


def files_below(folder):
    """Returns (sorted paths of the files below a folder that can be read, number of the others)."""
    def fail(error):
        raise error

    readable = []
    num_others = 0
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(".part")]
        for name in names:
            if kind_of(name) in KINDS and not name.startswith(".") and name != MANIFEST:
                readable.append(os.path.join(parent, name))
            else:
                num_others += 1
    if not readable:
        raise FileNotFoundError(f"{folder}: found no file in this folder that ends in {' '.join(KINDS)}, "
                                "expected one at least")
    return sorted(readable), num_others


def read_shard(path, block=BLOCK):
    """Yields the records of a shard, a JSON list of {"story": text}; ValueError names the file and story."""
    record = None
    with open(path, encoding="utf-8") as file:
        for record in read_records(os.fspath(path), "story", read_array(file, block), "story", EXPECTED):
            yield record
    if record is None:
        raise ValueError(f"{path}: found [], {EXPECTED}")


def read_documents(path, field, separator, block=BLOCK):
    """Yields the records of a file; ValueError names the file and the document.

    The suffix says whether a file holds text, JSON or Parquet. field: as in record_of. separator: as in
    split_at.
    """
    check_kind(path)
    open_text = gzip.open if path.lower().endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig") as file:
        expected = (f'expected {{"{field}": text}}, see --field, or messages, conversations, prompt and '
                    "completion, or instruction and output")
        if KINDS[kind_of(path)] == "UTF-8 text":
            field = FIELD
            rows = ({field: check_zeros(piece)} for piece in split_at(file, separator, block))
            expected = "expected UTF-8"
        elif kind_of(path) == ".parquet":
            rows = read_parquet(path, field)
        else:
            # No line at all is JSON Lines of no document, but no JSON.
            rows = read_json(file, block, may_be_empty=kind_of(path) != ".json")
        yield from read_records(path, "document", rows, field, expected)


def read_records(path, unit, rows, field, expected):
    """Yields the record of each row; ValueError says path, unit, number, what was found and expected."""
    rows = iter(rows)
    for number in itertools.count():
        try:
            row = next(rows, rows)
        except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}, {unit} {number}: {fault(error, path)}, {expected}") from error
        if row is rows:
            return
        try:
            record = record_of(row, field, expected)
        except ValueError as error:
            raise ValueError(f"{path}, {unit} {number}: {error}") from None
        if "messages" in record and row.get("tools"):
            record["tools"] = True  # The definitions themselves are not read.
        yield record


def fault(error, path):
    """What was found in a file, by the exception that reading it has raised."""
    if str(error).startswith("found"):
        return str(error)
    why = str(error)
    if isinstance(error, UnicodeDecodeError):
        encoding = likely_encoding(error.object)
        unpack = "gzip -dc" if path.lower().endswith(".gz") else "cat"
        why = (f"byte {error.object[error.start]:#04x}, perhaps {encoding}: {unpack} {shlex.quote(path)} | "
               f"iconv -f {encoding} -t UTF-8 > NEW converts it")
    elif isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return f"found no whole gzip file ({error}); fetch it again"
    elif isinstance(error, json.JSONDecodeError):
        why = error.msg  # Its line and column count from the beginning of a block.
    return f"found no {KINDS[kind_of(path)]} ({why})"

# -----------------------------------------------------------------------------
# Records


def record_of(row, field, expected) -> dict:
    """The record of a row, an object of JSON; ValueError says what was found and expected.

    The first of these that it has, and that isn't null, is read: the text under field, if that is not FIELD;
    messages; conversations, as in ShareGPT's files; prompt and completion, as texts or lists of messages;
    instruction, input and output, as in Alpaca's; the text under field.
    """
    if not isinstance(row, dict):
        raise ValueError(f"found {shown(row)}, {expected}")
    has = {key for key, value in row.items() if value is not None}
    if field in has and field not in (FIELD, "messages", "conversations"):
        return {"story": text_under(row, field, expected)}
    if "messages" in has:
        return {"messages": read_dialog(row["messages"])}
    if "conversations" in has:
        return {"messages": system_of(row) + read_dialog(turns_of(row["conversations"]))}
    if {"prompt", "completion"} <= has:
        return completion_of(row["prompt"], row["completion"])
    if {"instruction", "output"} <= has:
        return {"messages": system_of(row) + exchange_of(row)}
    for asked, answer in (("prompt", "completion"), ("instruction", "output")):
        if asked in has and answer in row:  # A null answer is no reason to learn another text of the row.
            raise ValueError(f"found {answer} null beside {asked}, expected text")
    if field in has:
        return {"story": text_under(row, field, expected)}
    raise ValueError(f"found keys {shown(list(row))}, {expected}")


def shown(value):
    """The beginning of a value of a row, for an error."""
    return json.dumps(value, default=str)[:60]


def text_under(row, key, expected="expected text"):
    """The text of a row under a key; ValueError if it is something else."""
    if not isinstance(row[key], str):
        raise ValueError(f"found {key} {shown(row[key])}, {expected}")
    return row[key]


def system_of(row):
    """The message of a system prompt that a row has beside its turns, as a list of none or one."""
    return [{"role": "system", "content": text_under(row, "system")}] if row.get("system") else []


def turns_of(turns):
    """ShareGPT's turns, {"from": one of SPEAKERS, "value": text}, as messages; others stay as they are."""
    if not isinstance(turns, list):
        raise ValueError(f"found conversations {shown(turns)}, expected a list of turns")
    messages = []
    for number, turn in enumerate(turns):
        if isinstance(turn, dict) and "from" in turn:
            # The speaker in a file may be a list, which a dict can't be searched for.
            if turn["from"] not in list(SPEAKERS):
                raise ValueError(f"message {number}: found from {shown(turn['from'])}, expected one of "
                                 f"{', '.join(SPEAKERS)}")
            if not isinstance(turn.get("value"), str):
                raise ValueError(f"message {number}: found value {shown(turn.get('value'))}, expected text")
            turn = turn | {"role": SPEAKERS[turn["from"]], "content": turn["value"]}
        messages.append(turn)
    return messages


def exchange_of(row):
    """The two messages of an Alpaca row: instruction and input, with an empty line between, and output."""
    if row.get("history"):
        raise ValueError("found history beside instruction, expected such turns as messages")
    question = text_under(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{text_under(row, 'input')}"
    return [{"role": "user", "content": question},
            {"role": "assistant", "content": text_under(row, "output")}]


def completion_of(prompt, completion):
    """The record of a prompt and its completion, two texts or, for a dialog, two lists of messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        found = f"prompt of {type(prompt).__name__}, completion of {type(completion).__name__}"
        raise ValueError(f"found {found}, expected two texts or two lists of messages")
    dialog = read_dialog(prompt + completion)
    for message in dialog[:len(prompt)]:
        if message["role"] == "assistant":
            message["weight"] = 0  # Only the completion is learned.
    return {"messages": dialog}


def texts_of(record):
    """The texts of a record: its stripped story, or those of its messages or its two parts as they are."""
    if "messages" in record:
        return list(map(text_of, record["messages"]))
    if "completion" in record:
        return [record["prompt"], record["completion"]]
    return [record["story"].strip()]


def is_learned(message):
    """Whether a message of a record is to be learned: the assistant's are, unless their weight is 0."""
    return message["role"] == "assistant" and message.get("weight") != 0

# -----------------------------------------------------------------------------
# Texts and Parquet in blocks


def split_at(file, separator, block=BLOCK):
    """Yields the pieces of a text file between separators, as unescape reads them; None: one whole piece."""
    if separator is None:
        yield file.read()
        return
    separator = unescape(separator)
    rest = ""
    # Each read at least doubles the rest, so that the time for a long piece is linear in its length.
    while text := file.read(max(block, len(rest))):
        *pieces, rest = (rest + text).split(separator)
        yield from pieces
    yield rest


def check_zeros(text):
    """Returns a text; ValueError if it is UTF-16 without a byte order mark, which reads as UTF-8, too."""
    head = text[:64].encode()
    if likely_encoding(head).startswith("UTF-16"):
        raise UnicodeDecodeError("utf-8", head, head.index(0), head.index(0) + 1, "zeros between characters")
    return text


def read_parquet(path, field):
    """The rows of a .parquet file, which are read one by one, as dicts of field and COLUMNS."""
    try:
        import pyarrow.parquet as parquet  # It is large and few need it, so it is imported only here.
    except ImportError as error:
        raise ValueError(f"{path}: found no pyarrow to read it with; pip install pyarrow") from error

    def rows():
        file = parquet.ParquetFile(path)
        columns = [name for name in (*COLUMNS, field) if name in file.schema_arrow.names]
        if not columns:
            raise ValueError(f"found columns {shown(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            yield from batch.to_pylist()
    return rows()
