"""Texts and chats from files: shards of stories, and your own text, JSON and Parquet, also gzipped (.gz).

A record is the part of a document that training needs, as plumbing/records.py has it. "tools": True is
beside messages whose row defines tools, which is not read. Files are read in blocks, so that they may be
larger than memory.
"""

import glob
import gzip
import itertools
import json
import os
import shlex
import zlib

from plumbing.cli import unescape
from plumbing.files import MANIFEST, matching
from plumbing.json_stream import BLOCK, json_values, read_array
from plumbing.records import COLUMNS, FIELD, record_of, shown
from plumbing.text_files import likely_encoding, open_text

SHARDS = "TinyStories_all_data"  # the folder of the shards, inside the data folder
EXPECTED = f'expected a list of {{"story": text}}; delete {SHARDS} and run tiny_stories.py download again'
KINDS = {".txt": "UTF-8 text", ".md": "UTF-8 text", ".json": "JSON in UTF-8", ".jsonl": "JSON in UTF-8",
         ".ndjson": "JSON in UTF-8", ".parquet": "Parquet"}  # suffix -> what such a file holds

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
    with open_text(path) as file:
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
            rows = json_values(file, block, may_be_empty=kind_of(path) != ".json")
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
