"""The standard streams, fit for any text, whatever their encoding, and for readers that leave early."""

import codecs
import contextlib
import os
import sys

from tqdm import tqdm


def open_streams():
    """Makes the standard streams fit for any text, whatever their encoding, and open if they were closed.

    Output escapes the characters that it has no bytes for. Input that is said to be ASCII is read as UTF-8.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # Whoever started this process has closed it.
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if not hasattr(stream, "reconfigure"):  # A notebook's has no encoding.
            continue
        if name != "stdin":
            stream.reconfigure(errors="backslashreplace")
        if name == "stderr":
            sys.stderr = Remarks(stream)
        elif name == "stdin" and codecs.lookup(stream.encoding).name == "ascii":
            stream.reconfigure(encoding="utf-8")


class Remarks:
    """Standard error that ends nothing: what can't be written, as its reader is gone, is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with dropping(self.stream):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with dropping(self.stream):
            self.stream.flush()


@contextlib.contextmanager
def dropping(stream):
    """Drops what can't be written to a stream, with all that follows."""
    try:
        yield
    except (OSError, ValueError):  # A ValueError says that it is closed.
        with contextlib.suppress(OSError, ValueError):  # What is still in its buffer goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush_or_drop_output():
    """Flushes standard output; what can't be written is dropped, so that Python doesn't try again."""
    with dropping(sys.stdout):
        sys.stdout.flush()


def say(text, stream=None):
    """Prints a text above progress bars; an output that is gone, such as a lost terminal, ends nothing.

    stream: None: standard output.
    """
    stream = stream or sys.stdout
    with dropping(stream), tqdm.external_write_mode(file=stream):
        print(text, file=stream, flush=True)


@contextlib.contextmanager
def only_first_prints():
    """Lets no process but torchrun's first print, until an error."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            yield
