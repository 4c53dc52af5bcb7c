"""JSON read in blocks, value by value, so that a file may be larger than memory: an array, or JSON Lines."""

import json
import re

BLOCK = 2**20  # characters that are read at once
SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space, which is less than Python's \s
COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
OPENING = re.compile(r"[ \t\n\r]*\[")
CLOSING = re.compile(r"[ \t\n\r]*\]")
END = re.compile(r"[ \t\n\r]*\Z")


def json_values(file, block=BLOCK, may_be_empty=True):
    """Yields the values of a JSON array, or those that stand one after another, as in JSON Lines.

    may_be_empty: whether a file may hold nothing. Errors: see read_array.
    """
    text = file.read(block)
    while text and END.match(text):
        text = file.read(block)
    if not text and not may_be_empty:
        raise ValueError("found nothing")
    if OPENING.match(text):
        yield from read_array(file, block, text)
        return
    while text:
        yield from read_values(file, text, 0, SPACE, END, block)
        text = file.read(block)


def read_array(file, block=BLOCK, text=""):
    """Yields the values of a JSON array while it is read; ValueError or RecursionError if it isn't one.

    text: what has been read of the file.
    """
    text = text or file.read(block)
    opening = OPENING.match(text)
    if not opening:
        raise ValueError(f"found {' '.join(text[:60].split()) or 'nothing'}")
    rest = yield from read_values(file, text, opening.end(), COMMA, CLOSING, block)
    if (rest + file.read()).strip(" \t\n\r"):
        raise json.JSONDecodeError("Extra data", rest, 0)


def read_values(file, text, at, between, ending, block):
    """Yields the JSON values from text[at] on until ending matches; returns the text after that.

    between: what matches between two values. More of the file is read where text ends within a value.
    """
    decode = json.JSONDecoder().raw_decode
    separator = SPACE  # Nothing but space comes before the first value.
    while not (end_of_values := ending.match(text, at)):
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
        if end > len(text) - 3 and not is_final(wrong, text):
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
            separator = between
    return text[end_of_values.end():]


def is_final(error, text):
    """Whether text that follows can't mend an error, which spares reading the rest of a large file."""
    if not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Unterminated"):
        return False
    return error.pos < len(text) - 20  # Literals and escapes that are cut off are shorter.
