"""The command line that every script here shares: fire, made strict.

Fire alone reads `--prompt "Hello, world"` as a tuple and `--prompt 2024` as an int, and it runs a command with its
defaults before it stumbles over a flag that does not exist. Here the words are checked against the function's
signature before anything runs, values become what the annotations say, and an error is one line.
"""

import inspect
import os
import sys
import types
import typing

import fire


def run(commands, default, argv=None):
    """Runs the function that the command line names, with the flags given, and ends the process.

    commands: name -> function; every parameter annotated (str, int, float, bool, tuple[float, float], or one of
        them | None). A parameter without a default may be given by position, the others only as --flag.
    default: the command when none is named. argv: words to use in place of the process's own.
    ValueError and OSError are what a user can get wrong: one line on standard error, exit status 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in commands else default
    function = commands[command]
    if "--help" in argv or "-h" in argv:
        print(f"Commands: {' '.join(commands)}. Here is the help of {command}; for another: COMMAND --help\n",
              file=sys.stderr)
        argv = ["--help"]
    try:
        if argv != ["--help"]:
            argv = strict_words(command, function, argv)
        fire.Fire(function, command=argv, name=os.path.basename(sys.argv[0]), serialize=lambda result: None)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left: nothing went wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def strict_words(command, function, argv):
    """argv with every flag as --name=value, for fire; ValueError names what doesn't fit the function's signature."""
    parameters = inspect.signature(function).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty]
    kinds = {name: _kind(p.annotation) for name, p in parameters.items()}
    given, positional = {}, []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and name not in kinds and kinds.get(name.removeprefix("no").lstrip("_")) is bool:
            name, equals, value = name.removeprefix("no").lstrip("_"), "=", "False"
        if name not in kinds:
            flags = " ".join(f"--{flag}" for flag in parameters)
            raise ValueError(f"unknown flag --{name}: {command} takes {flags}")
        if not equals and kinds[name] is bool:
            value = words.pop(0) if words and words[0].lower() in ("true", "false") else "True"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{name} needs a value (one that begins with -- is written --{name}=VALUE)")
            value = words.pop(0)
        if name in given:
            raise ValueError(f"--{name} is given twice")
        given[name] = value
    for word, name in zip(positional, [name for name in required if name not in given], strict=False):
        given[name] = word
        positional = positional[1:]
    if positional:
        raise ValueError(f"unexpected word {positional[0]!r}: {command} takes flags, such as --{next(iter(kinds))}")
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"{command} needs {' and '.join(name.upper() for name in missing)}; see {command} --help")
    parsers = {name: _parser(name, kinds[name], p.annotation) for name, p in parameters.items()}
    for name, value in given.items():
        parsers[name](value)
    fire.decorators.SetParseFns(**parsers)(function)
    return [f"--{name}={value}" for name, value in given.items()]


def _kind(annotation):
    """The type behind an annotation: int of `int | None`, tuple of `tuple[float, float]`."""
    if isinstance(annotation, types.UnionType):
        annotation = next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    return typing.get_origin(annotation) or annotation


def _parser(name, kind, annotation):
    """A function from a flag's text to its value; ValueError says what was found and what was expected."""
    def parse(text):
        try:
            if kind is bool:
                return {"true": True, "false": False}[text.lower()]
            if kind is tuple:
                return tuple(each(part) for each, part in zip(typing.get_args(annotation), text.split(","),
                                                              strict=True))
            return kind(text)
        except (KeyError, ValueError):
            expected = str(annotation) if kind is tuple else kind.__name__
            raise ValueError(f"--{name} {text}: expected {expected}") from None
    return parse
