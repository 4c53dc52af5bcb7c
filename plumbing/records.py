"""Rows of files, in any of the forms that data sets have, as records.

A record is the part of a document that training needs: {"story": text}, {"messages": dialog}, where a dialog
is a list of messages as read_message gives them, or {"prompt": text, "completion": text}, of which only the
completion is learned.
"""

import json

from plumbing.messages import read_dialog, text_of

FIELD = "text"  # the usual name of a row's text
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system",
           "history")  # A row may have these columns besides a text.
# Who speaks in a turn of ShareGPT's conversations -> the role of that message.
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "system": "system", "tool": "tool", "observation": "tool"}


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
