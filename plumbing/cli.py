"""The command line that every script shares: fire, made strict, with a line of help for every flag.

Fire alone reads `--prompt "Hello, world"` as a tuple and `--prompt 2024` as an int, and it runs a command
with its defaults before it stumbles over a flag that doesn't exist. So the words are first laid out by the
function's signature; then fire converts them, as the annotations say, and calls the function. A flag's line
of help is its line under "Args:" in the function's docstring.
"""

import errno
import functools
import inspect
import math
import os
import re
import sys

import fire

from plumbing.flags import convert, kinds, read_words
from plumbing.machine import limit_threads
from plumbing.streams import flush_or_drop_output, open_streams


def run(commands, default, argv=None):
    """Runs the function that the command line names, with the flags given; what it returns is dropped.

    commands: name -> function; every parameter annotated with str, int, float, tuple[float, float], bool (a
        switch: --flag or --noflag), bool | int (a switch that may have a number), list[str] (one or several
        words, or the flag several times), or one of these | None. One without a default may be given by
        position, unless it is keyword-only.
    default: the command when none is named, None where one has to be. argv: words in place of the process's.
    ValueError and OSError are what a user can get wrong: one line on standard error, exit status 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    limit_threads()
    try:
        run_command(commands, default, argv)
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        flush_or_drop_output()
        if isinstance(error, BrokenPipeError):  # The reader of our output has left: nothing went wrong.
            if os.environ.get("WORLD_SIZE", "1") != "1":
                sys.exit(1)  # torchrun has to end the others, which would wait for this process.
            return
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
            error = "no space left for standard output, or for another file; make room, then run again"
        sys.exit("error: " + " ".join(str(error).splitlines()))
    except KeyboardInterrupt:
        sys.exit(130)


def run_command(commands, default, words):
    """Calls the function that the words name, or prints help; ValueError where they don't fit."""
    command = words.pop(0) if words and words[0] in commands else default
    if command is None and words in (["--help"], ["-h"]):
        for name, function in commands.items():
            print(f"{name}: {fire.docstrings.parse(inspect.getdoc(function) or '').summary}")
        return
    if command is None:
        raise ValueError(f"expected {' or '.join(commands)}, found {[*words, 'none'][0]}; try --help")
    function = commands[command]
    parameters = inspect.signature(function).parameters

    @fire.decorators.SetParseFns(**{name: functools.partial(convert, p) for name, p in parameters.items()})
    @functools.wraps(function)
    def returning_nothing(*args, **flags):  # Fire would print a result, or even call it.
        function(*args, **flags)

    if "--help" in words or words == ["-h"]:
        print_help(command, function)
        others = f"Commands: {' '.join(commands)}{'; without one: ' + default if default else ''}. "
        others = others + "Help: COMMAND --help. " if len(commands) > 1 else ""
        print(f"\n{others}A bool is turned off by --noNAME.")
    else:
        texts = read_words(words, command, parameters, commands)
        fire.Fire(returning_nothing, command=[f"--{name}={text}" for name, text in texts.items()])


def print_help(command, function):
    """Prints what a command does, and a line for each of its flags: type, meaning, default."""
    docstring = fire.docstrings.parse(inspect.getdoc(function) or "")
    meanings = {arg.name: arg.description for arg in docstring.args or []}
    print(f"{command}: {docstring.summary}\n")
    if docstring.description:
        print(f"{docstring.description}\n")
    for name, p in inspect.signature(function).parameters.items():
        kind = " | ".join(inspect.formatannotation(kind) for kind in kinds(p))
        value = "required" if p.default is p.empty else f"default {p.default!r}"
        print(f"  --{name} {kind}".ljust(34), f"{meanings.get(name, '')} ({value})".strip())


def expect(fits, name, value, expected):
    """Raises ValueError naming the setting, unless `fits`."""
    if not fits:
        raise ValueError(f"{name} is {value}; expected {expected}")


def expect_at_least(least, **settings):
    """Raises ValueError naming the setting that is below `least`, infinite or not a number; None is fine."""
    for name, value in settings.items():
        expect(value is None or least <= value < math.inf, name, value, f"at least {least}")


ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


def unescape(text):
    r"""A text flag's value with \n, \t and \\ as a line break, a tab and one backslash; the rest stays."""
    return re.sub(r"\\[nt\\]", lambda escape: ESCAPES[escape[0]], text)
