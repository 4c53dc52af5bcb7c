"""The words of a command line, laid out by the signature of the function that they are for."""

import inspect
import json
import types
import typing


def kinds(parameter):
    """The types that a parameter is annotated with, but for None."""
    annotation = parameter.annotation
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return [kind for kind in members if kind is not types.NoneType]


def read_words(words, command, parameters, commands):
    """Parameter name -> the text given for it, a list's as JSON; ValueError names a word that is wrong.

    commands: the names of which `command` is one.
    """
    required = [name for name, p in parameters.items() if p.default is p.empty]
    positional = [name for name in required if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY]
    switches = {name for name, p in parameters.items() if bool in kinds(p)}
    lists = {name for name, p in parameters.items() if list[str] in kinds(p)}
    flags = " ".join(f"--{name}" for name in parameters)
    texts = {}
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        name = name[2:].replace("-", "_")
        if not word.startswith("-"):
            if not positional:
                raise ValueError(f"unexpected word {word!r}: commands are {' '.join(commands)}, and "
                                 f"{command} takes {flags}")
            name = positional.pop(0)
            equals = ""  # A word of its own may have a =, too.
            text = word
        elif word.startswith("--no") and name.removeprefix("no") in switches and not equals:
            name = name.removeprefix("no")
            text = "False"
        elif not word.startswith("--") or name not in parameters:
            raise ValueError(f"unknown flag {word}: {command} takes {flags}")
        elif not equals and name in switches:
            is_value = bool(words) and (words[0].lower() in ("true", "false")
                                        or int in kinds(parameters[name]) and words[0].isdecimal())
            text = words.pop(0) if is_value else "True"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{name} needs a value; one that begins with -- goes as --{name}=VALUE")
            text = words.pop(0)
        if name in lists:
            several = [*json.loads(texts.get(name, "[]")), text]
            while not equals and words and not words[0].startswith("--"):
                several.append(words.pop(0))
            text = json.dumps(several)
        elif name in texts:
            raise ValueError(f"--{name} is given twice")
        texts[name] = text
    if missing := [f"--{name}" for name in required if name not in texts]:
        raise ValueError(f"{command} needs {' '.join(missing)}: see {command} --help")
    return texts


def convert(parameter, text):
    """The value of a flag's text; ValueError says what was found and what was expected."""
    for kind in kinds(parameter):
        try:
            if kind is bool:
                return {"true": True, "false": False}[text.lower()]
            if kind == list[str]:
                return json.loads(text)
            if typing.get_origin(kind) is tuple:
                members = typing.get_args(kind)
                return tuple(t(part) for t, part in zip(members, text.split(","), strict=True))
            return kind(text)
        except (KeyError, ValueError):
            continue
    expected = " or ".join(inspect.formatannotation(kind) for kind in kinds(parameter))
    raise ValueError(f"--{parameter.name} {text}: expected {expected}")
