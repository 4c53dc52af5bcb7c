"""The command line that every script here shares: fire, made strict.

Fire alone reads `--prompt "Hello, world"` as a tuple and `--prompt 2024` as an int, and it runs a
command with its defaults before it stumbles over a flag that does not exist. Here the words are checked
against the function's signature before anything runs, values become what the annotations say, and an error
is one line.
"""

import functools
import inspect
import math
import os
import sys
import types
import typing

import fire


def run(commands, default, argv=None):
    """Runs the function that the command line names, with the flags given; what it returns is dropped.

    commands: name -> function; every parameter annotated with str, int, float, bool, tuple[float, float]
        or one of these | None. One without a default may be given by position, unless it is keyword-only.
    default: the command when none is named, None where one has to be. argv: words in place of the process's.
    ValueError and OSError are what a user can get wrong: one line on standard error, exit status 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in commands else default
    if command is None:
        sys.exit(f"error: expected a command, {' or '.join(commands)}; COMMAND --help tells more")
    function = commands[command]
    parameters = inspect.signature(function).parameters

    @fire.decorators.SetParseFns(**{name: functools.partial(convert, p) for name, p in parameters.items()})
    @functools.wraps(function)
    def returning_nothing(*args, **flags):  # fire would print a result, or even call it
        function(*args, **flags)

    try:
        if "--help" in argv or argv == ["-h"]:
            print(f"{command}: {inspect.getdoc(function) or ''}\n")
            for name, p in parameters.items():
                value = "required" if p.default is p.empty else f"default {p.default!r}"
                print(f"  --{name} {inspect.formatannotation(base_type(p))}".ljust(35), value)
            print(f"\nCommands: {' '.join(commands)}" + (f"; without one: {default}" if default else "")
                  + ". Help: COMMAND --help")
        else:
            texts = read_words(argv, command, parameters)
            fire.Fire(returning_nothing, command=[f"--{name}={text}" for name, text in texts.items()])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left: nothing went wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).splitlines()))
    except KeyboardInterrupt:
        sys.exit(130)


def read_words(words, command, parameters):
    """Parameter name -> the text given for it; ValueError names a word that doesn't fit the parameters."""
    required = [name for name, p in parameters.items() if p.default is p.empty]
    positional = [name for name in required if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    flags = " ".join(f"--{name}" for name in parameters)
    texts, words = {}, list(words)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        name = name[2:].replace("-", "_")
        if not word.startswith("-"):
            if not positional:
                raise ValueError(f"unexpected word {word!r}: {command} takes {flags}")
            name, text = positional.pop(0), word
        elif not word.startswith("--") or name not in parameters:
            raise ValueError(f"unknown flag {word}: {command} takes {flags}")
        elif not equals and base_type(parameters[name]) is bool:
            text = words.pop(0) if words and words[0].lower() in ("true", "false") else "True"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{name} needs a value; one that begins with -- goes as --{name}=VALUE")
            text = words.pop(0)
        if name in texts:
            raise ValueError(f"--{name} is given twice")
        texts[name] = text
    if missing := [f"--{name}" for name in required if name not in texts]:
        raise ValueError(f"{command} needs {' '.join(missing)}: see {command} --help")
    return texts


def base_type(parameter):
    """The type that a parameter is annotated with, without its `| None`."""
    if isinstance(parameter.annotation, types.UnionType):
        return next(t for t in typing.get_args(parameter.annotation) if t is not types.NoneType)
    return parameter.annotation


def convert(parameter, text):
    """The value of a flag's text; ValueError says what was found and what was expected."""
    kind = base_type(parameter)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            return tuple(t(part) for t, part in zip(typing.get_args(kind), text.split(","), strict=True))
        return kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"--{parameter.name} {text}: expected {inspect.formatannotation(kind)}") from None


def expect(fits, name, value, expected):
    """Raises ValueError naming the setting, unless `fits`."""
    if not fits:
        raise ValueError(f"{name} is {value}; expected {expected}")


def expect_at_least(least, **settings):
    """Raises ValueError naming the setting that is below `least`, infinite or not a number; None is fine."""
    for name, value in settings.items():
        expect(value is None or least <= value < math.inf, name, value, f"at least {least}")
