"""The prompts and messages that a command is given, and what is said of the texts that they become."""

import contextlib
import os
import sys

from plumbing.cli import expect, unescape
from plumbing.machine import has_input, keys_at_once
from plumbing.text_files import decode, read_lines

PROMPTS = ("Once upon a time", "One day", "Lily and George were best friends", "On a dark and stormy night")


def holds_dialogs(path):
    """Whether a file of prompts holds dialogs, as its name says; else each of its lines is a prompt."""
    return os.fspath(path).lower().removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json"))


def read_prompts(prompt, prompt_file, default):
    """The texts to complete: --prompt, unescaped, or --prompt_file's lines as they are, or the default.

    ValueError: both are given, or a text is empty.
    """
    if prompt is not None and prompt_file is not None:
        raise ValueError("found --prompt and --prompt_file; expected one of them")
    if prompt is not None:
        expect(prompt, "--prompt", "empty", "a text")
        return [unescape(prompt)]
    if prompt_file is None:
        return list(default)
    if holds_dialogs(prompt_file):
        raise ValueError(f"{prompt_file}: its name says that it holds dialogs, which `python llama31.py` "
                         "answers; expected a text file")
    prompts = read_lines(prompt_file)
    for number, line in enumerate(prompts, 1):
        expect(line, f"{prompt_file}, line {number}", "empty", "a prompt in every line")
    return prompts


def say_spelled(prompts, names):
    """Says on standard error how many special tokens the prompts spell out, which are read as characters."""
    count = sum(prompt.count(name) for prompt in prompts for name in names)
    if count:
        print(f"the prompts spell out {count} special tokens, which are read as characters; --special reads "
              "them as tokens", file=sys.stderr)


def say_cut(count, texts, max_seq_len):
    """Says on standard error how many of the texts end because the context is full, if any does."""
    if count:
        print(f"{count} of {texts} texts end because the context of {max_seq_len} tokens is full; "
              "--max_seq_len sets it", file=sys.stderr)


def typed_message():
    """What is typed at a terminal: a line, and those that come at once behind it, as pasting brings them.

    Where readline is told to let the terminal mark what is pasted, input() itself returns several lines.
    """
    is_edited = "readline" in sys.modules and sys.stdout.isatty()  # Then input() takes keys, not lines.
    with keys_at_once(sys.stdin) if is_edited else contextlib.nullcontext():
        lines = [input("> ")]
        with contextlib.suppress(EOFError):
            while has_input(sys.stdin, seconds=0.05):
                lines.append(input())
    return "\n".join(lines)


def piped_message(number):
    """The next line of standard input, whose number it is; ValueError where it is not in UTF-8."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    data = line.removesuffix("\n").removesuffix("\r").encode("utf-8", "surrogateescape")
    return decode(data, "standard input", number)
