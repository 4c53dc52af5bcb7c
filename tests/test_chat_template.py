"""Chat templates: transformers' ids, contents that forge nothing, the answers' words, errors on one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import smollm2
from hypothesis import example, given, settings
from hypothesis import strategies as st
from templates import LLAMA31, NAMES, SMOLLM2, TEMPLATES, UNFLAGGED, write_folder
from tiny import ROOT, random_llama, shard_tokens

import tiny_stories
from chat import Conversation
from llama31 import Llama
from plumbing import answers, chat_template, files
from plumbing.chat_template import Hidden, well_formed
from tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
CONFIG = "tokenizer_config.json"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder without a template, and so without roles of tokens."""
    return write_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Returns our and transformers' tokenizer of a template of a name."""
    folder = tmp_path_factory.mktemp("templates")
    made = {}

    def pair(name):
        if name not in made:
            template, bos, eos, _ = TEMPLATES[name]
            path = write_folder(folder / name, template, bos, eos)
            made[name] = (Tokenizer(path / "tokenizer.json"),
                          transformers.AutoTokenizer.from_pretrained(path))
        return made[name]
    return pair


@pytest.fixture
def folder(base, tmp_path):
    """Returns a tokenizer of that template, beside a tokenizer.json and a config of these entries."""
    def make(template=None, **config):
        path = Path(shutil.copytree(base, tmp_path / "folder", dirs_exist_ok=True))
        (path / CONFIG).write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"} | config))
        if template is not None:
            (path / "chat_template.jinja").write_text(template)
        return Tokenizer(path / "tokenizer.json")
    return make


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def apply(theirs, dialog, prompt=False, **more):
    """Transformers' ids of a dialog."""
    return theirs.apply_chat_template(dialog, add_generation_prompt=prompt, return_dict=False, **more)


# -----------------------------------------------------------------------------
# Ids

SPELLED = re.compile("|".join(map(re.escape, NAMES + UNFLAGGED)))
PARTS = st.sampled_from([
    " ", "\n", "\n\n", "<", "|>", "[", "think>", "<|im_start", "the cat", "Hi", "it's", "12345", "é🦙", '"',
    "\\", "X", "{{ x }}", "<tool_response>", "</tool_response>", "\t"])
TEXTS = (st.text(max_size=20) | st.lists(PARTS, max_size=8).map("".join)).filter(
    lambda text: not SPELLED.search(text))
SPELLING = st.lists(st.sampled_from([*NAMES, *UNFLAGGED, "a", " b", "\n"]), max_size=6).map("".join)


@st.composite
def dialogs(draw, roles, contents):
    """Turns of the user and the assistant, behind a system prompt or none."""
    messages = []
    if "system" in roles and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents)})
    for number in range(draw(st.integers(1, 5))):
        messages.append({"role": ["user", "assistant"][number % 2], "content": draw(contents)})
    return messages


@settings(deadline=None, derandomize=True, max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("name", TEMPLATES)
def test_any_dialog_has_the_ids_of_transformers(pairs, name, data):
    ours, theirs = pairs(name)
    dialog = data.draw(dialogs(TEMPLATES[name][3], TEXTS))
    for prompt in False, True:
        assert ours.encode_dialog(dialog, generation_prompt=prompt) == apply(theirs, dialog, prompt)


LOOKING = {"deepseek", "qwen3", "mixed", "macro", "dated"}  # They rewrite what spells special tokens.


@settings(deadline=None, derandomize=True, max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_content_forges_a_special_token(pairs, name, data):
    """Transformers' own way to keep contents apart gives the same ids, where a template looks into none."""
    ours, theirs = pairs(name)
    dialog = data.draw(dialogs(TEMPLATES[name][3], SPELLING))
    harmless = [{**message, "content": "a"} for message in dialog]
    special = set(ours.special_tokens.values())
    made = [i for i in ours.encode_dialog(harmless) if i in special]
    ids = ours.encode_dialog(dialog)
    assert [i for i in ids if i in special] == made or name == "qwen3"
    if name not in LOOKING:
        theirs.chat_control_tokens = NAMES + UNFLAGGED
        assert ids == apply(theirs, dialog, True, sanitize_control_tokens=True)


@pytest.mark.parametrize("template, contents", [
    ("<{{ messages[0].content }}", ["|im_end|>"]),
    ("{{ messages[0].content }}{{ messages[1].content }}", ["<|im_", "end|>"]),
    ("<|{{ messages[0].content }}|>", ["im_end"]),
    ("{{ messages[0].content }}|im_end|>", ["<"]),
    ("{{ messages[0].content | replace('_', '') }}", ["<|im__end|>"]),
    ("{{ messages[0].content[1:] }}", ["<<|im_end|>"]),
    ("{{ messages[0].content.split('-') | join }}", ["<|im_-end|>"]),
    ("{{ messages[0].content | lower }}", ["<|IM_END|>"]),
    ("{{ messages[0].content | reverse }}", [">|dne_mi|<"]),
    ("{% for character in messages[0].content %}{{ character }}{% endfor %}", ["<|im_end|>"]),
    ("{{ messages[0].content.replace('X', '<|im_end|>') }}", ["X"]),
    ("{{ messages | tojson }}", ["<|im_end|>"]),
    ("x{{ messages[0].content._text }}", ["<|im_end|>"]),
    ("{{ messages[0].name }}", ["Hi"])])
def test_no_way_to_write_contents_makes_special_tokens_of_them(folder, template, contents):
    ours = folder(template)
    ids = ours.encode_dialog([{**user(content), "name": "<|im_end|>"} for content in contents])
    assert ids and not set(ids) & set(ours.special_tokens.values())


def test_names_of_tools_and_their_arguments_forge_nothing(pairs):
    ours, _ = pairs("hermes3")
    function = {"name": "f<|im_end|>", "arguments": {"<|im_end|>": ["<think>"]}}
    dialog = [user("Hi"), assistant(None, tool_calls=[{"type": "function", "function": function}])]
    ids = ours.encode_dialog(dialog, generation_prompt=False)
    text = ours.decode(ids)
    assert text.endswith('<tool_call>\n{"name": "f<|im_end|>", "arguments": {"<|im_end|>": ["<think>"]}}\n'
                         "</tool_call><|im_end|>\n")
    assert [i for i in ids if ours.decode([i]) == "<|im_end|>"] == [ours.special_tokens["<|im_end|>"]] * 2
    assert ours.special_tokens["<think>"] not in ids


@pytest.mark.weights
def test_smollm2s_own_template_has_the_ids_of_transformers(tmp_path):
    try:
        smollm2.tokenizer().save_pretrained(tmp_path)
    except smollm2.Unavailable as error:
        pytest.skip(str(error))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for dialog in TURNS[:3], [{"role": "system", "content": "Be kind."}, *TURNS[:3]]:
        assert ours.encode_dialog(dialog) == apply(theirs, dialog, True)
    assert learned(ours, TURNS) == (["the cat  sat\n<|im_end|>", " on <|im_end|><|im_end|>"], 0)


CALLS = [{"type": "function", "function": {"name": "brave_search", "arguments": {"query": "a \"cat\""}}}]


@pytest.mark.parametrize("name, dialog", [
    ("llama31", [user("Hi"), {"role": "assistant", "tool_calls": CALLS},
                 {"role": "ipython", "content": "42"}]),
    ("llama31", [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "f", "arguments": {"b": [1, None], "a": "é"}}}]}]),
    ("hermes3", [user("Hi"), assistant(None, tool_calls=CALLS * 2), {"role": "tool", "content": "1"},
                 {"role": "tool", "content": "2"}, assistant("so")]),
    ("qwen3", [user("Hi"), assistant("so", reasoning_content="\nwell\n"), user("?"),
               assistant("<think>\nso\n</think>\n\nso")]),
    ("qwen3", [user("Hi"), assistant("so", reasoning="well")]),
    ("deepseek", [user("Hi"), assistant("<think>\nwell\n</think>\n\nso"), user("<b>?")]),
    ("macro", [user("Hi"), assistant("<think>\nwell\n</think>\n\nso"), user("<b>?")])])
def test_calls_and_reasoning_have_the_ids_of_transformers(pairs, name, dialog):
    ours, theirs = pairs(name)
    expected = theirs.apply_chat_template(dialog, return_dict=False)
    assert ours.encode_dialog(dialog, generation_prompt=False) == expected


def test_lone_surrogates_are_replaced_and_forge_no_marks(pairs):
    ours, theirs = pairs("smollm2")
    assert ours.encode_dialog([user("\ud800a\udfff")]) == apply(theirs, [user("\ufffda\ufffd")], True)


@settings(deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("a<|> \n\ud800é"), max_size=12),
       other=st.text(st.sampled_from("a<|> \n"), max_size=2))
def test_a_hidden_text_answers_as_the_text_does(text, other):
    hidden = Hidden(text, lambda text: "\ud800".join(text))
    text = well_formed(text)
    calls = {"strip": (), "split": (other or None,), "upper": (), "replace": (other, "b"), "find": (other,),
             "rstrip": (other or None,), "partition": (other or "a",), "splitlines": (), "title": (),
             "__contains__": (other,), "__len__": (), "__eq__": (text,), "__hash__": (), "__mul__": (2,),
             "__getitem__": (slice(1, None),), "__lt__": (other,), "startswith": (other,)}
    for method, args in calls.items():
        assert getattr(hidden, method)(*args) == getattr(text, method)(*args), method
    assert list(hidden) == list(text) and str(hidden) == text and {text: 1}[hidden] == 1
    assert (hidden == text) and not (hidden != text) and bool(hidden) == bool(text)


# -----------------------------------------------------------------------------
# Answers


def learned(tokenizer, dialog):
    """What of a dialog is learned: the texts of the runs of targets; and how many answers have none."""
    numbers = [number for number, message in enumerate(dialog) if message["role"] == "assistant"]
    ids, is_target, num_lost = tokenizer.encode_answers(dialog, numbers)
    assert ids == tokenizer.encode_dialog(dialog, generation_prompt=False)
    edges = np.flatnonzero(np.diff([0, *is_target, 0]))
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)], num_lost


TURNS = [user(" Hi <b>\n"), assistant("the cat  sat\n"), user("what? "), assistant(" on <|im_end|>")]


@pytest.mark.parametrize("name, dialog, texts", [
    ("llama31", TURNS, ["the cat  sat<|eot_id|>", "on <|im_end|><|eot_id|>"]),
    ("smollm2", TURNS, ["the cat  sat\n<|im_end|>", " on <|im_end|><|im_end|>"]),
    ("hermes3", TURNS, ["the cat  sat\n<|im_end|>", " on <|im_end|><|im_end|>"]),
    ("deepseek", TURNS, ["the cat  sat\n<｜end▁of▁sentence｜>", " on <|im_end|><｜end▁of▁sentence｜>"]),
    ("mistral", TURNS, [" the cat  sat</s>", " on <|im_end|></s>"]),  # The space before is the model's, too.
    ("guard", TURNS, [" cat  sat", " <|im_end|>"]),  # The first word is a token with the template's space.
    ("dated", TURNS, ["the cat  sat\n<|eot_id|>", " on <|im_end|><|eot_id|>"]),
    ("qwen3", TURNS, ["the cat  sat\n<|im_end|>", "<think>\n\n</think>\n\n on <|im_end|><|im_end|>"]),
    ("phi", TURNS, ["the cat  sat\n<|end|>", " on <|im_end|><|end|>"]),
    ("plain", TURNS, [" the cat  sat\n", "  on <|im_end|>"]),
    ("mixed", TURNS, ["the cat  sat\n<|im_end|>", " on <|im_end|><|im_end|>"]),
    ("smollm2", [assistant("a"), assistant(""), user("assistant"), assistant("")],
     ["a<|im_end|>", "<|im_end|>", "<|im_end|>"]),
    ("llama31", [user("Hi"), assistant(None, tool_calls=CALLS), {"role": "ipython", "content": "4"}],
     ['<|python_tag|>brave_search.call(query="a "cat"")<|eom_id|>']),
    ("hermes3", [user("Hi"), assistant(None, tool_calls=CALLS), {"role": "tool", "content": "4"},
                 assistant("so")],
     ['<tool_call>\n{"name": "brave_search", "arguments": {"query": "a \\"cat\\""}}\n</tool_call>'
      "<|im_end|>", "so<|im_end|>"]),
    ("deepseek", [user("Hi"), assistant("<think>\nwell\n</think>\n\nso"), user("?"), assistant("on")],
     ["\n\nso<｜end▁of▁sentence｜>", "on<｜end▁of▁sentence｜>"]),
    ("qwen3", [user("Hi"), assistant("<think>\nwell\n</think>\n\nso"), user("?"),
               assistant("on", reasoning="a")],
     ["so<|im_end|>", "<think>\na\n</think>\n\non<|im_end|>"])])
def test_an_answers_words_and_its_end_alone_are_learned(pairs, name, dialog, texts):
    ours, _ = pairs(name)
    stops = {"llama31": ["<|eot_id|>", "<|eom_id|>"]}.get(name)
    if stops:
        ours.stop_tokens = [ours.special_tokens[stop] for stop in stops]
    assert learned(ours, dialog) == (texts, 0)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_word_of_another_message_is_learned(pairs, name, data):
    ours, _ = pairs(name)
    contents = st.lists(PARTS | st.sampled_from(NAMES + UNFLAGGED), max_size=4).map("".join)
    dialog = data.draw(dialogs(TEMPLATES[name][3], contents))
    for message in dialog:
        if message["role"] != "assistant":
            message["content"] += "ZQZ"
    texts, _ = learned(ours, dialog)
    assert not any("z" in text.lower() for text in texts)


GENERATION = ("{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
              "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n{% else %}"
              "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@settings(deadline=None, derandomize=True, max_examples=20)
@given(dialog=dialogs(["system"], TEXTS.map(str.lstrip)))
def test_targets_are_those_that_a_template_names_to_transformers(generation_pair, dialog):
    ours, theirs = generation_pair
    made = theirs.apply_chat_template(dialog, return_dict=True, return_assistant_tokens_mask=True)
    numbers = [number for number, message in enumerate(dialog) if message["role"] == "assistant"]
    ids, is_target, num_lost = ours.encode_answers(dialog, numbers)
    assert (ids, is_target, num_lost) == (made["input_ids"], list(map(bool, made["assistant_masks"])), 0)


@pytest.fixture(scope="session")
def generation_pair(tmp_path_factory):
    path = write_folder(tmp_path_factory.mktemp("generation"), GENERATION, None, "<|im_end|>")
    return Tokenizer(path / "tokenizer.json"), transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("template, dialog, texts", [
    # It drops all answers but the last.
    ("{% for m in messages %}{% if m.role == 'user' or loop.last %}<|im_start|>{{ m.content }}<|im_end|>"
     "{% endif %}{% endfor %}", TURNS, ["<|im_start|> on <|im_end|><|im_end|>"]),
    # It writes answers twice.
    ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", TURNS, []),
    # An answer changes what stands around other messages' words.
    ("{% for m in messages %}{{ 'A' if 'cat' in messages[1].content else 'B' }}{{ m.content }}<|im_end|>"
     "{% endfor %}", TURNS, ["A on <|im_end|><|im_end|>"]),
    # It refuses a dialog in which this message is none that calls a tool.
    ("{% if not messages[1].tool_calls %}{{ raise_exception('no') }}{% endif %}{{ messages | tojson }}",
     [user("a"), assistant(None, tool_calls=CALLS)], []),
    # Calls begin and end with other special tokens than answers, and the prompt for them with none.
    ("{% for m in messages %}{% if m.tool_calls %}<|python_tag|>{{ m.tool_calls[0].function.name }}"
     "<|end_header_id|>{% else %}<|im_start|>{{ m.content }}<|start_header_id|>{% endif %}{% endfor %}"
     "{% if add_generation_prompt %}?{% endif %}",
     [user("a"), assistant(None, tool_calls=CALLS)], ["<|python_tag|>brave_search"]),
    # Something else than behind an answer stands behind the end of a call.
    ("{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|im_end|>!"
     "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
     [user("a"), assistant(None, tool_calls=CALLS)], ["brave_search<|im_end|>"]),
    # It writes all questions first.
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
     "{% for m in messages if m.role != 'user' %}{{ m.content }}<|im_end|>{% endfor %}", TURNS,
     [" cat  sat\n<|im_end|> on <|im_end|><|im_end|>"]),
    # What stands behind an answer is no stop token.
    ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", TURNS,
     ["the cat  sat\n", " on <|im_end|>"]),
    # It looks into what it put together, and an answer changes what stands around others' words.
    ("{% for m in messages %}{{ '!' if '<b>' in m.role ~ m.content }}"
     "{{ 'A' if '<|end|>' in messages[1].content else 'B' }}{{ m.content }}<|im_end|>{% endfor %}",
     [user("Hi <b>"), assistant("x <|end|>"), user("so")], []),
    # It keeps nothing of what an answer says, but for its end.
    ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}",
     [user("a"), assistant("<think>b</think>")], [])])
def test_of_an_answer_that_a_template_rewrites_what_is_left_is_learned(folder, template, dialog, texts):
    num_answers = sum(message["role"] == "assistant" for message in dialog)
    num_learned = "".join(texts).count("<|im_end|> on") + len(texts)
    assert learned(folder(template), dialog) == (texts, num_answers - num_learned)


# -----------------------------------------------------------------------------
# Files


def test_the_file_of_a_template_counts_before_the_configs(folder):
    from_config = folder(chat_template="config{{ bos_token }}", bos_token={"content": "<s>"})
    assert from_config.decode(from_config.encode_dialog([user("a")])) == "config<s>"
    ours = folder("file{{ eos_token }}", chat_template="config")
    theirs = transformers.AutoTokenizer.from_pretrained(Path(ours.model_path).parent)
    assert ours.decode(ours.encode_dialog([user("a")])) == "file<|im_end|>"
    assert ours.encode_dialog([user("a")]) == apply(theirs, [user("a")])


def test_of_named_templates_the_default_is_taken(folder):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": SMOLLM2}]
    ours = folder(chat_template=named)
    theirs = transformers.AutoTokenizer.from_pretrained(Path(ours.model_path).parent)
    assert ours.encode_dialog(TURNS[:1]) == apply(theirs, TURNS[:1], True)


@pytest.mark.parametrize("template, config, found", [
    (None, {"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "a"}]},
     f"{CONFIG}: found templates named tool_use, rag, expected one named default"),
    (None, {"chat_template": 3}, f"{CONFIG}: found chat_template 3, expected text"),
    (None, {"chat_template": "{% if %}"}, f"{CONFIG}: found a template that is no Jinja"),
    ("{{ messages[", {}, r"chat_template.jinja: found a template that is no Jinja \(.*\), expected that"),
    ("{% for m in messages %}{{ no(m) }}{% endfor %}", {}, "jinja: found messages of user, assistant, "
     "user, the first 'Hi', expected a dialog that this template takes: 'no' is undefined"),
    ("{{ raise_exception('no\n\nsystem ' + messages[0].content) }}", {}, "takes: no system Hi"),
    ("{{ messages[0].content + 3 }}", {}, "takes: can only concatenate str"),
    ("{{ messages.append(3) }}", {}, "takes: .*unsafe|not safely callable"),
    ("{{ messages[0].content.__class__.mro() }}", {}, "takes: .*unsafe"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {},
     "takes: it takes more than 100,000 steps"),
    ("{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", {}, "000 steps"),
    ("{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n else '' }}{% endmacro %}{{ f(40) }}", {}, "000 steps"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {}, "takes: .*recursion"),
    ("{% set big = 'a' * 9999999 %}{% for a in range(99) %}{{ big }}{% endfor %}", {},
     "takes: it writes more than 67,108,864 characters")])
def test_what_a_template_can_not_do_is_named_in_one_line(folder, template, config, found, monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_STEPS", 10**5)
    dialog = [user("Hi"), assistant("Ho"), user("Hi")]
    ours = folder(template, **config)
    with pytest.raises(ValueError, match=found) as error:
        ours.encode_dialog(dialog)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert ours.encode("Hi")  # Texts need no template.


def test_a_template_in_another_encoding_is_named(folder):
    ours = folder("a")
    Path(ours.model_path).with_name("chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja: found .*0xff.*, expected UTF-8"):
        ours.encode_dialog([user("a")])


def test_a_dialog_without_messages_is_the_templates_to_refuse(folder):
    with pytest.raises(ValueError, match="found no message, expected a dialog that this template takes"):
        folder(LLAMA31).encode_dialog([])


def test_without_a_template_the_format_is_llama_3s(folder):
    ours = folder()
    ids = ours.encode_dialog([user("Hi")])
    assert ours.decode(ids) == ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                                "<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_metas_folders_do_without_jinja(tmp_path):
    code = ("import sys; sys.modules['jinja2'] = None; from tokenizer import train_tokenizer; "
            f"print(train_tokenizer([], 512, {str(tmp_path / 'tokenizer.model')!r}).encode_dialog([]))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("[256, 262"), result.stderr


# -----------------------------------------------------------------------------
# A dialog that goes on


def test_tokens_that_were_told_are_kept_where_the_text_is_the_same(pairs):
    ours, _ = pairs("smollm2")
    dialog = [user("Hi")]
    prompt = ours.encode_dialog(dialog)
    own = [i for character in "the cat" for i in ours.encode(character)]  # not as encode writes it
    assert own != ours.encode("the cat")
    dialog += [assistant("the cat"), user("so")]
    ids = ours.encode_dialog(dialog, begun=prompt + own)
    canonical = ours.encode_dialog(dialog)
    assert ids[:len(prompt + own)] == prompt + own and ours.decode(ids) == ours.decode(canonical)
    assert ids[len(prompt + own):] == canonical[len(prompt + ours.encode("the cat")):]


@settings(deadline=None, derandomize=True, max_examples=20)
@example(begun=[]).via("edge")
@given(begun=st.lists(st.integers(0, 300), max_size=30))
@pytest.mark.parametrize("name", ["smollm2", "deepseek", "plain"])
def test_whatever_was_told_the_text_is_the_dialogs(pairs, name, begun):
    ours, _ = pairs(name)
    dialog = [user("Hi"), assistant("the cat"), user("so")]
    told = ours.encode_dialog(dialog[:1]) + begun
    ids = ours.encode_dialog(dialog, begun=told)
    assert ours.decode(ids) == ours.decode(ours.encode_dialog(dialog))


def test_reasoning_that_a_template_drops_is_cut_off_what_was_told(pairs):
    ours, _ = pairs("deepseek")
    prompt = ours.encode_dialog([user("Hi")])
    told = prompt + ours.encode("well</think>\n\nso", allowed_special="all")
    dialog = [user("Hi"), assistant("well</think>\n\nso"), user("?")]
    assert ours.encode_dialog(dialog, begun=told) == ours.encode_dialog(dialog)


# -----------------------------------------------------------------------------
# What uses them


def prepare(ours, folder, dialogs):
    """The tokens of text()'s train.bin of dialogs, in order, and which of them are targets."""
    (folder / "dialogs.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in dialogs))
    tiny_stories.text(input=[str(folder / "dialogs.jsonl")], data_dir=str(folder / "data"), num_workers=1,
                      val_fraction=0.3, tokenizer_path=ours.model_path)
    stored = np.concatenate([shard_tokens(folder / "data" / f"{name}.bin") for name in ("val", "train")])
    starts = np.flatnonzero(stored & files.START)
    return [part for part in np.split(stored, starts) if len(part)]


def test_chats_are_prepared_by_the_template(folder, tmp_path, capsys):
    ours = folder(SMOLLM2)
    dialogs = [[user(f"{number}?"), assistant(f"the cat {number}"), user("so"), assistant("no", weight=0)]
               for number in range(9)]
    parts = prepare(ours, tmp_path, dialogs)
    assert {ours.decode(part % files.START) for part in parts} == {
        ours.decode(ours.encode_dialog(dialog, generation_prompt=False)) for dialog in dialogs}
    for part in parts:
        targets = (part % files.START)[part < files.MASKED]
        assert re.fullmatch(r"the cat \d<\|im_end\|>", ours.decode(targets))
    assert "Not learned" not in capsys.readouterr().out


def test_lost_answers_are_said_and_a_changed_template_is_used(folder, tmp_path, capsys, monkeypatch):
    dialogs = [[user(f"{number}?"), assistant("a"), user("so"), assistant("b")] for number in range(9)]
    last = "{% for m in messages %}{% if loop.last %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    with monkeypatch.context() as patch:
        patch.setattr(tiny_stories, "write_split", lambda *_: 1 / 0)  # interrupted before shards are joined
        with pytest.raises(ZeroDivisionError):
            prepare(folder(SMOLLM2), tmp_path, dialogs)
    for _ in range(2):
        parts = prepare(ours := folder(last), tmp_path, dialogs)
        assert {ours.decode(part % files.START) for part in parts} == {"b<|im_end|>"}
        said = capsys.readouterr().out
        counts = re.findall("Not learned: answers that the chat template drops or tears apart: (\\d)", said)
        assert sum(map(int, counts)) == 9


def test_a_dialog_that_the_template_refuses_is_named(folder, tmp_path):
    ours = folder(TEMPLATES["mistral"][0], bos_token="<s>")
    with pytest.raises(ValueError, match="chat_template.jinja: found messages of user, user, assistant, the "
                                         "first 'Hi', expected a dialog .*roles must alternate"):
        prepare(ours, tmp_path, [[user("Hi"), user(f"Hi{n}"), assistant("a")] for n in range(9)])


def test_a_file_of_dialogs_is_answered_by_the_template(folder, tmp_path, capsys):
    ours = folder(SMOLLM2)
    llama = random_llama(ours)
    (tmp_path / "dialogs.jsonl").write_text(json.dumps({"messages": [user("Hi")]}))
    rows, dialogs = answers.read_dialogs(tmp_path / "dialogs.jsonl")
    answers.print_answers(llama, "dialogs.jsonl", rows, dialogs, 9, (), 1337, temperature=0)
    [row] = llama.generate([ours.encode_dialog([user("Hi")])], 9, temperature=0)
    [answer] = llama.chat_completion([[user("Hi")]], 9, temperature=0)
    printed = json.loads(capsys.readouterr().out)["messages"][-1]
    assert printed == answer["generation"] == assistant(ours.decode(row))


def test_a_row_that_the_template_refuses_is_named_before_any_answer(pairs, capsys):
    ours, _ = pairs("mistral")
    dialogs = [[user("Hi")], [user("Hi"), user("Ho")]]
    rows = [{"messages": dialog} for dialog in dialogs]
    with pytest.raises(ValueError, match="^dialogs.jsonl, dialog 1: .*found messages of user, user, the"):
        answers.print_answers(random_llama(ours), "dialogs.jsonl", rows, dialogs, 9, (), 1337)
    assert not capsys.readouterr().out


def test_a_conversation_reads_what_the_template_writes(pairs, monkeypatch):
    """The model's own tokens stay, except where the template tells an answer otherwise: then all is read."""
    for name, own in [("smollm2", True), ("mistral", True), ("llama31", False), ("deepseek", False)]:
        ours, _ = pairs(name)
        llama = random_llama(ours, max_seq_len=500)
        said = ours.encode(" well</think> so", allowed_special="all")
        said = [i for character in " we" for i in ours.encode(character)] + said[2:]
        given = []

        def steps(self, prompts, *args, start_pos=(0,), said=said, given=given, **settings):
            given.append((prompts[0], start_pos[0]))
            return ((None, [i]) for i in [*said, None])
        monkeypatch.setattr(Llama, "steps", steps)
        conversation = Conversation(llama)
        told, dialog = [], []
        for text in "Hi", "so?", "and":
            conversation.answer(text, lambda piece: None)
            dialog.append(user(text))
            prompt, start = given[-1]
            assert ours.decode(prompt) == ours.decode(ours.encode_dialog(dialog))
            common = len(os.path.commonprefix([told, prompt]))
            assert start == common and (common == len(told) if own else common < len(told) or not told)
            if not own:
                assert prompt == ours.encode_dialog(dialog)
            dialog.append(assistant(ours.decode(said)))
            told = prompt + said


def test_a_template_without_system_prompts_is_named_at_once(pairs):
    ours, _ = pairs("mistral")
    with pytest.raises(ValueError, match="jinja: found messages of system, user.* roles must alternate"):
        Conversation(random_llama(ours, max_seq_len=500), system="be kind")


def test_of_what_a_dialog_does_not_say_all_words_of_the_turn_go(tokenizer):
    dialog = [{"role": "user", "content": "once upon a time"}]
    ids = tokenizer.encode_dialog(dialog)
    begin = ids.index(tokenizer.special_tokens["<|end_header_id|>"]) + 1
    letters = [tokenizer.encode(letter)[0] for letter in "\n\non"]
    assert tokenizer.decode(ids).startswith(tokenizer.decode(ids[:begin] + letters))
    assert tokenizer.encode_dialog(dialog, begun=ids[:begin] + letters + tokenizer.encode("x")) == ids
