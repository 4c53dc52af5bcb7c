"""Text files in UTF-8, with an error that names what else one seems to be, and JSON files of one object."""

import codecs
import gzip
import json
import os
from pathlib import Path


def check_file(path, expected):
    """Raises FileNotFoundError if there is a folder or nothing at a path."""
    if not os.path.isfile(path):
        found = "a folder" if os.path.isdir(path) else "no such file"
        raise FileNotFoundError(f"{path}: found {found}, expected {expected}")


def open_text(path):
    """A text file in UTF-8, gzipped or not, opened to be read in parts."""
    opened = gzip.open if os.fspath(path).lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig")


def read_lines(path):
    """The lines of a text file in UTF-8; FileNotFoundError if there is none, ValueError: see decode."""
    check_file(path, "a text file")
    text = decode(Path(path).read_bytes(), path)
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def decode(data, name, first_line=1):
    """The text of bytes in UTF-8, whose byte order mark is dropped.

    ValueError begins with the name of where they are from; it says what they seem to be, and the way on.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
        if "\0" not in text:
            return text
        at = data.index(0)
    except UnicodeDecodeError as error:
        at = error.start
    encoding = likely_encoding(data)
    line = first_line + data[:at].count(b"\n")
    raise ValueError(f"{name}, line {line}: found byte {data[at]:#04x}, perhaps {encoding}; expected UTF-8: "
                     f"iconv -f {encoding} -t UTF-8 FILE > NEW converts it")


def likely_encoding(data):
    """What iconv calls the encoding that bytes are likely to be in if they aren't UTF-8."""
    head = data[:64]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if head.count(0) * 3 > len(head):
        return "UTF-16LE" if head[1:2] == b"\0" else "UTF-16BE"
    return "WINDOWS-1252"  # It has every character of Latin-1 that is text.


def read_json(path):
    """The object in a JSON file; FileNotFoundError or ValueError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected one of Hugging Face's; download it again")
    try:
        found = json.loads(path.read_bytes())  # Unlike text, bytes may begin with a byte order mark.
        if not isinstance(found, dict):
            raise ValueError(f"found {found!r:.40}, expected an object")
    except ValueError as error:
        raise ValueError(f"{path}: damaged, download it again: {error}") from None
    return found


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")
