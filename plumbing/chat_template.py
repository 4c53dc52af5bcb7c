"""Dialogs as text, by a template or a format of our own, in which no content forges a special token.

A Hugging Face folder has a template, a program in Jinja's language that puts messages together to the text a
model was trained with. Two things have to be known of that text: which special tokens are the template's,
for a content that spells one must not become one; and where an answer's words stand, for they alone are
learned. Both are told by marks. Each word of a content comes behind a mark of its message, and the
template's own words come behind none. Marks are lone surrogates, which no text has: see well_formed.
"""

import datetime
import functools
import json
import os
import re
from pathlib import Path

FILE = "chat_template.jinja"  # It counts before the template in tokenizer_config.json.
ROLES_OF_TOKENS = "bos", "eos", "unk", "sep", "pad", "cls", "mask"  # A template knows them as bos_token, …
MARKS = re.compile("[\ud800-\udbff]")
GAP = "\udfff"  # stands in the place of an answer
REASONING = "reasoning_content", "thinking", "reasoning"  # keys of an assistant's reasoning in a message
NOTHING = re.compile("(?!)")
SPACE = re.compile(r"\s*")
MOST_STEPS = 10**7  # calls and rounds of loops of a rendering; those of long dialogs are thousands
MOST_CHARS = 2**26  # A rendering may have so many.

# -----------------------------------------------------------------------------
# Templates


def read_template(folder, config):
    """(path, source) of the template of a folder, or None; config: what its tokenizer_config.json holds.

    ValueError: it is no UTF-8, or there are several of which none is the default.
    """
    path = Path(folder, FILE)
    if path.exists():
        try:
            return path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: found {error}, expected UTF-8; download it again") from None
    path = path.with_name("tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}
    if isinstance(template, dict):
        names = ", ".join(map(str, template)) or "none"
        template = template.get("default")
        if template is None:
            raise ValueError(f"{path}: found templates named {names}, expected one named default; name that "
                             f"which is to be used so, or put it beside as {FILE}")
    if template is None:
        return None
    if not isinstance(template, str):
        raise ValueError(f"{path}: found chat_template {template!r:.60}, expected text; download it again")
    return path, template


class ChatTemplate:
    """A template, which renders as in transformers: in Jinja's sandbox, with the same functions and tokens.

    path: its file, for errors. config: as in read_template. ValueError: it is no Jinja, or, when it renders,
    it fails, refuses the dialog, or takes more than MOST_STEPS or MOST_CHARS.
    """

    def __init__(self, path, source, config):
        import jinja2  # Meta's folders do without.
        self.path = path
        self.steps = 0
        try:
            environment = self.sandbox()
            tree = environment.parse(well_formed(source))
            for loop in tree.find_all(jinja2.nodes.For):
                loop.iter = jinja2.nodes.Filter(loop.iter, "counted", [], [], None, None)
            self.template = environment.from_string(tree)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ValueError(f"{path}: found a template that is no Jinja ({one_line(error)}), expected that "
                             "of the model; download it again") from None
        self.variables = {}
        for role in ROLES_OF_TOKENS:
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                self.variables[f"{role}_token"] = token

    def sandbox(self):
        """Jinja's environment as transformers sets it up, with what bounds a rendering."""
        import jinja2.ext
        import jinja2.sandbox
        count = self.count

        class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
            def call(self, context, obj, /, *args, **kwargs):
                count()
                return super().call(context, obj, *args, **kwargs)

            @staticmethod
            def concat(pieces):
                # A macro or a block may write a content alone, which then stays Hidden.
                pieces = list(filter(None, pieces))
                return pieces[0] if len(pieces) == 1 else "".join(pieces)

        class Generation(jinja2.ext.Extension):
            """{% generation %}, by which some templates name an answer; we find answers in any template."""
            tags = {"generation"}

            def parse(self, parser):
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.Scope(body).set_lineno(line)

        def counted(values):
            for value in values:
                count()
                yield value

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                              sort_keys=sort_keys)

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        extensions = [Generation, jinja2.ext.loopcontrols]
        sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        sandbox.filters |= {"tojson": tojson, "counted": counted}
        sandbox.globals["raise_exception"] = raise_exception
        return sandbox

    def count(self):
        """Takes note of a step of a rendering; ValueError if these are too many."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise ValueError(f"it takes more than {MOST_STEPS:,} steps")

    def __call__(self, messages, generation_prompt, now):
        """The text of messages; now: the time that the template may write."""
        messages = [with_reasoning(message) for message in messages]
        self.steps = 0
        pieces = []
        size = 0
        try:
            for piece in self.template.generate(
                    **self.variables, messages=messages, tools=None, documents=None,
                    add_generation_prompt=generation_prompt, strftime_now=now.strftime):
                pieces.append(piece)
                size += len(piece)
                if size > MOST_CHARS:
                    raise ValueError(f"it writes more than {MOST_CHARS:,} characters")
        except Exception as error:  # A template is a program, so it can fail in any way.
            raise ValueError(f"{self.path}: found {outlined(messages)}, expected a dialog that this "
                             f"template takes: {one_line(error)}") from None
        return "".join(pieces)


def with_reasoning(message):
    """A message with its reasoning under the names that templates know it by, as transformers has it."""
    for key in REASONING:
        if key in message:
            return {"thinking": message[key], **message, "reasoning_content": message[key]}
    return message


def outlined(messages):
    """What a dialog is, in words by which it can be found in a file."""
    if not messages:
        return "no message"
    roles = ", ".join(message["role"] for message in messages)
    return f"messages of {roles:.200}, the first {unmarked(str(messages[0].get('content', '')))!r:.60}"


def one_line(error):
    """What an exception says, on one line, without the marks of what it quotes."""
    text = " ".join(unmarked(str(error)).split()) or type(error).__name__
    return f"{text:.300}"

# -----------------------------------------------------------------------------
# Marks


def well_formed(text):
    """A text with U+FFFD for lone surrogates, which UTF-8 lacks, so that they can be marks."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def mark_of(number):
    """The mark of a message; that of one far away may be the same."""
    return chr(0xD800 + number % 1024)


def unmarked(text):
    """A rendering as the model sees it."""
    return MARKS.sub("", text)


class Hidden(str):
    """A content as a template gets it: to whatever it asks the text itself, but written with marks.

    write: what puts them into a text. What a method makes of the text is hidden again, so that trimmed, cut
    or replaced it still can't be taken for the template's.
    """

    def __new__(cls, text, write):
        text = well_formed(text)
        self = super().__new__(cls, write(text))
        self._text = text  # The sandbox shows templates no name that begins so.
        self._write = write
        return self

    def __str__(self):
        return self

    def __iter__(self):
        return (Hidden(character, self._write) for character in self._text)


def on_the_text(name):
    """The method of that name, which reads and makes texts without marks."""
    method = getattr(str, name)

    def call(self, *args, **kwargs):
        args = [arg._text if isinstance(arg, Hidden) else arg for arg in args]
        return hide(method(self._text, *args, **kwargs), self._write)
    return call


OPERATORS = {"__contains__", "__eq__", "__ge__", "__getitem__", "__gt__", "__hash__", "__le__", "__len__",
             "__lt__", "__mul__", "__ne__", "__rmul__"}
METHODS = {name for name in dir(str) if not name.startswith("_")}
for name in (OPERATORS | METHODS) - {"format", "format_map"}:  # These two the sandbox replaces by its own.
    setattr(Hidden, name, on_the_text(name))


def hide(value, write):
    """A value of JSON with every text in it Hidden, also those of keys."""
    if isinstance(value, str):
        return Hidden(value, write)
    if isinstance(value, list | tuple):
        return type(value)(hide(part, write) for part in value)
    if isinstance(value, dict):
        return {hide(key, write): hide(part, write) for key, part in value.items()}
    return value

# -----------------------------------------------------------------------------
# Renderings


def names_pattern(names):
    """What finds names in a text, of several that begin alike the longest; nothing, if there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


@functools.lru_cache(maxsize=4)
def patterns_of(names):
    """What finds words, or beginnings of names within them; names; names of which no content has a part."""
    spelled = names_pattern(names)
    initials = re.escape("".join(sorted({name.strip()[0] for name in names})))
    words = re.compile(rf"[{initials}]|[^\s{initials}]+" if initials else r"\S+")
    return words, spelled, re.compile(f"(?<!{MARKS.pattern})({spelled.pattern})")


class Rendering:
    """A dialog's text with marks, and where its answers stand.

    template: makes a text of messages, generation_prompt and the time, as a ChatTemplate does. names: of the
    special tokens, which no content may forge. messages: as read_dialog gives them. Errors: the template's.
    text: what the template makes of contents of which each word is marked. Where that says something else
    than of plain contents, the template has looked into a text that it put together itself; then text is
    what it makes of contents of which only the names are marked.
    """

    def __init__(self, template, names, messages, generation_prompt):
        self.template = template
        self.messages = messages
        self.generation_prompt = generation_prompt
        self.now = datetime.datetime.now()  # one time for all that is compared
        words, spelled, self.made = patterns_of(tuple(names))
        plain = template(self.hidden(NOTHING), generation_prompt, self.now)
        self.contents = self.hidden(words)
        self.text = template(self.contents, generation_prompt, self.now)
        self.has_all_marks = unmarked(self.text) == plain
        if not self.has_all_marks:
            self.contents = self.hidden(spelled)
            self.text = template(self.contents, generation_prompt, self.now)

    def hidden(self, marked):
        """The messages with Hidden texts; marked: what matches the places behind a mark."""
        messages = []
        for number, message in enumerate(self.messages):
            write = functools.partial(marked.sub, mark_of(number) + r"\g<0>")
            shown = {key: hide(value, write) for key, value in message.items() if key != "weight"}
            messages.append(shown | {"role": message["role"]})
        return messages

    def attempt(self, messages, generation_prompt):
        """The text of other messages; one that is in no dialog, if the template refuses these."""
        try:
            return self.template(messages, generation_prompt, self.now)
        except ValueError:
            return GAP + GAP

    def pieces(self):
        """The plain texts between the template's special tokens, and these, in turn: text, name, …, text."""
        return [unmarked(piece) for piece in self.made.split(self.text)]

    def answer(self, number, ends):
        """(begin, end) in the plain text of an answer, the words of message number, or None.

        Its words are what lies between the texts that the template puts before and after any words. Where
        that isn't all the difference they make, as with a call of a tool, they are all of the difference,
        unless other messages have a part in it. What the template writes between the prompt for the answer
        and the words belongs to it, too, for a model that is asked has to write it; and so does the special
        token behind the words that is one of ends. None: the template leaves nothing of the words.
        """
        messages = [*self.contents]
        messages[number] = {"role": messages[number]["role"], "content": Hidden("words", lambda text: GAP)}
        before, gap, after = self.attempt(messages, self.generation_prompt).partition(GAP)
        if not gap or GAP in after:
            return None
        begin = len(before)
        end = len(self.text) - len(after)
        if begin > end or not self.text.startswith(before) or not self.text.endswith(after):
            begin, end = self.difference(before, after)
            if not self.has_all_marks or set(MARKS.findall(self.text, begin, end)) != {mark_of(number)}:
                return None
            last_word = self.text.rfind(mark_of(number), begin, end)
            for name in self.made.finditer(self.text, last_word, end):
                if name[1] in ends:  # What comes behind the end of the answer is the template's.
                    end = name.start()
                    break
        message = self.messages[number]
        has_words = (message.get("content") or "").strip() or message.get("tool_calls")
        if has_words and not self.text[begin:end].strip():
            return None
        prompt = self.attempt(self.contents[:number], generation_prompt=True)
        if self.text.startswith(prompt) and not MARKS.search(self.text, len(prompt), begin):
            begin = min(begin, len(prompt))
        following = self.made.match(self.text, SPACE.match(self.text, end).end())
        if following and following[1] in ends:
            end = following.end()
        return len(unmarked(self.text[:begin])), len(unmarked(self.text[:end]))

    def difference(self, before, after):
        """(begin, end) of the least part of text that differs from what before and after enclose."""
        begin = len(os.path.commonprefix([self.text, before]))
        end = len(self.text) - len(os.path.commonprefix([self.text[begin:][::-1], after[::-1]]))
        for name in self.made.finditer(self.text):  # Two special tokens may begin or end alike.
            if name.start() < begin < name.end():
                begin = name.start()
            if name.start() < end < name.end():
                end = name.start()
        return begin, max(begin, end)
