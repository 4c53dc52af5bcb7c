"""The messages of dialogs, as files and callers have them, read to what is written to a model."""

import contextlib
import json
from collections.abc import Sequence

from plumbing.chat_template import REASONING

# A message's role -> what the header of the message says. Files have two names for a tool's answer and,
# since newer models of OpenAI, two for the system prompt.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython",
         "ipython": "ipython", "developer": "system"}
LEARNED = "weight", "train", "training"  # Keys by which 0 or false keeps a message from being learned.
BESIDE_TEXT = "function_call", "image", "images", "audio", "video", "videos"  # Keys of what would be lost.
KEPT = *REASONING, "name", "tool_call_id"  # Keys that a chat template may read besides.


def read_dialog(dialog: Sequence[dict]) -> list[dict]:
    """The messages of a dialog, each as in read_message; ValueError names the message and its key."""
    if not isinstance(dialog, list | tuple):
        raise ValueError(f"found {type(dialog).__name__} {dialog!r:.60}, expected a list of messages")
    messages = []
    for number, message in enumerate(dialog):
        try:
            messages.append(read_message(message))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return messages


def read_message(message: dict) -> dict:
    """A message's role, one of ROLES, its content as one str, what else a template may read, its weight.

    content: text, or a list of {"type": "text", "text": str}, which are joined. An assistant's tool_calls
    are as in read_tool_call, and then it may have no content. Of other keys those of KEPT are kept as they
    are. "weight": 0 is there if one of LEARNED is 0, which keeps an assistant's message from being learned.
    ValueError names the key.
    """
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(message, dict) or "role" not in message or not ("content" in message or calls):
        found = list(message) if isinstance(message, dict) else message
        raise ValueError(f"found message {found!r:.60}, expected a dict of role and content")
    role = message["role"]
    check_role(role)
    for key in BESIDE_TEXT:
        if message.get(key):
            raise ValueError(f"found {key} {message[key]!r:.60}, expected a message of text alone")
    read = {"role": role}
    content = message.get("content")
    if not (content is None and calls):
        read["content"] = read_content(content)
    if calls:
        if role != "assistant":
            raise ValueError(f"found tool_calls of role {role!r}, expected them of the assistant alone")
        if not isinstance(calls, list):
            raise ValueError(f"tool_calls: found {calls!r:.60}, expected a list of calls")
        for call in calls:
            read_tool_call(call)
        read["tool_calls"] = calls
    read |= {key: message[key] for key in KEPT if message.get(key) is not None}
    for key in LEARNED if role == "assistant" else ():
        weight = message.get(key)
        if weight is not None and weight not in (0, 1):
            raise ValueError(f"found {key} {weight!r:.60}, expected 0 or 1")
        if weight == 0:
            read["weight"] = 0
    return read


def check_role(role: object) -> None:
    """Raises ValueError unless a role, of any type as files have them, is one of ROLES."""
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"found role {role!r:.60}, expected one of {', '.join(ROLES)}")


def read_content(content: object) -> str:
    """The text of a message's content; ValueError if it isn't text, or parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content: expected one str, found {type(content).__name__} {content!r:.60}; give "
                         "text, or a list of parts of text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"content: found a part of type {kind!r:.60}, expected parts of type 'text', "
                             "each with its text")
        texts.append(text)
    return "".join(texts)


def read_tool_call(call: object) -> str:
    """The text with which Llama 3.1 calls a tool, as in its chat template; ValueError unless it is a call.

    call: {"function": {"name": str, "arguments": dict, or that as JSON}}, or the inner dict itself.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # Text that is no JSON is named below.
            arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"tool_calls: found {call!r:.60}, expected a function with a name and arguments")
    return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


def text_of(message: dict) -> str:
    """What a message that was read says in Llama 3's format: its content, then its calls of tools."""
    return message.get("content", "") + "".join(map(read_tool_call, message.get("tool_calls", ())))
