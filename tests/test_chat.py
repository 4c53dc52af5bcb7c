"""Conversations, in-process and through a pseudo-terminal: what generate makes of the whole dialog's ids."""

import contextlib
import fcntl
import io
import os
import select
import string
import subprocess
import sys
import termios
import time

import pytest
from tiny import ROOT, random_llama, run, write_checkpoint

from chat import Conversation
from llama31 import Llama, Transformer
from plumbing.prompts import piped_message
from tokenizer import train_tokenizer

TEXT = string.ascii_lowercase + " "
COMMAND = ["chat.py", "--device", "cpu", "--nocompile", "--temperature", "0", "--ckpt_dir"]
CHOSEN = "weights in float32, arithmetic in float32, on cpu"
ENVIRONMENT = {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": ""}


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """One whose tokens are single bytes, so that an answer's text has the ids that were generated."""
    return train_tokenizer([], 512, tmp_path_factory.mktemp("vocabulary") / "tokenizer.model")


def speaker(tokenizer, ends=False, max_seq_len=16384):
    """A random model that only says characters of TEXT; answers end, mostly within 40 tokens, or never."""
    llama = random_llama(tokenizer, seed=1, max_seq_len=max_seq_len)
    said = tokenizer.encode(TEXT) + [tokenizer.eot_id] * ends
    weight = llama.model.output.weight.data
    weight[[i for i in range(tokenizer.n_words) if i not in said]] = 0
    weight[tokenizer.eot_id] *= 1.3
    return llama


@pytest.fixture(scope="module")
def polite(byte_tokenizer):
    """Ends its answers, mostly."""
    return speaker(byte_tokenizer, ends=True)


@pytest.fixture(scope="module")
def talker(byte_tokenizer):
    """Never ends an answer."""
    return speaker(byte_tokenizer)


@pytest.fixture(scope="module")
def ckpt_dirs(polite, talker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, llama in (("polite", polite), ("talker", talker)):
        write_checkpoint(folder / name, llama.model, tokenizer=llama.tokenizer)
    return folder


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def expected(llama, dialog, max_gen_len):
    """The answer's text of a fresh prefill of the whole dialog."""
    [row] = llama.generate([llama.tokenizer.encode_dialog(dialog)], max_gen_len, temperature=0)
    return llama.tokenizer.decode(row)


def told(conversation, text):
    """(what the conversation answers, what it says cut the answer short)."""
    pieces = []
    cut = conversation.answer(text, pieces.append)
    return "".join(pieces), cut


# -----------------------------------------------------------------------------
# In-process


@pytest.fixture
def read(monkeypatch):
    """The list of how many tokens each pass through the model reads."""
    counts, trunk = [], Transformer.trunk

    def counting(self, tokens, *args, **kwargs):
        counts.append(tokens.numel())
        return trunk(self, tokens, *args, **kwargs)
    monkeypatch.setattr(Transformer, "trunk", counting)
    return counts


SYSTEM = {"role": "system", "content": "be kind"}


def test_every_token_of_a_conversation_is_read_once(polite, read):
    conversation, dialog = Conversation(polite, "be kind", max_gen_len=40, temperature=0), [SYSTEM]
    for text in ("hello there", "abc", " what? ", "é <|eot_id|>"):
        answer, cut = told(conversation, text)
        assert cut in ("", "stopped at --max_gen_len 40")
        dialog += [user(text), assistant(answer.removesuffix("\n"))]
        ids = polite.tokenizer.encode_dialog(dialog, generation_prompt=False)
        assert conversation.tokens == ids[:-1]  # without the <|eot_id|> that the next prompt brings
        assert sum(read) == conversation.held == len(ids) - (2 if cut else 1)
    read.clear()
    conversation.reset()
    told(conversation, "now")
    common = polite.tokenizer.encode_dialog([SYSTEM, user("")], generation_prompt=False)[:-1]
    assert sum(read) == conversation.held - len(common)


@pytest.mark.parametrize("at", [1, 2, 9])
def test_an_answer_that_fails_in_the_middle_stays_as_far_as_it_got(talker, read, monkeypatch, at):
    conversation = Conversation(talker, max_gen_len=20, temperature=0)
    first = told(conversation, "hello there")[0].removesuffix("\n")
    norm, passes = talker.model.norm.forward, []

    def failing(x):  # after the layers have written to their caches
        passes.append(x)
        if len(passes) == at:
            raise KeyboardInterrupt
        return norm(x)
    monkeypatch.setattr(talker.model.norm, "forward", failing)
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        conversation.answer("abc", pieces.append)
    monkeypatch.setattr(talker.model.norm, "forward", norm)
    assert len(pieces) == at - 1
    dialog = [user("hello there"), assistant(first), user("abc"), assistant("".join(pieces)), user("so")]
    read.clear()
    held = conversation.held
    assert told(conversation, "so")[0] == expected(talker, dialog, 20) + "\n"
    assert held + read[0] == len(talker.tokenizer.encode_dialog(dialog))


def test_a_drawn_answer_is_what_generate_draws_with_the_turns_seed(byte_tokenizer):
    llama = random_llama(byte_tokenizer, max_seq_len=1000)  # of all bytes: much of it is no UTF-8
    settings = dict(temperature=1.5, top_p=0.95, top_k=300, min_p=1e-4)

    def answers(seed):
        conversation = Conversation(llama, max_gen_len=60, seed=seed, **settings)
        for turn in range(3):
            ended = [*conversation.tokens, byte_tokenizer.eot_id] if turn else [byte_tokenizer.bos_id]
            tokens = ended + byte_tokenizer.encode_dialog([user("hi")])[1:]
            [row] = llama.generate([tokens], 60, seed=seed + turn, **settings)
            answer, _ = told(conversation, "hi")
            assert answer == byte_tokenizer.decode(row) + "\n"
            yield answer
        conversation.reset()
        yield told(conversation, "hi")[0]
    first, second, _, after_reset = drawn = [*answers(5)]
    assert drawn == [*answers(5)] and after_reset == first != second


def test_an_answer_has_a_character_whole_with_its_last_token(byte_tokenizer, polite, monkeypatch):
    conversation = Conversation(polite)
    ids = [*byte_tokenizer.encode("né😀"), *byte_tokenizer.encode("é")[:1]]
    monkeypatch.setattr(Llama, "steps", lambda *args, **settings: ((None, [i]) for i in [*ids, None]))
    pieces = []
    conversation.answer("hi", pieces.append)
    assert pieces == ["n", "", "é", "", "", "", "😀", "", "\ufffd\n"]


def test_a_full_context_is_told_and_a_message_without_room_changes_nothing(byte_tokenizer):
    llama = speaker(byte_tokenizer, max_seq_len=100)
    conversation = Conversation(llama, max_gen_len=30, temperature=0)
    first, cut = told(conversation, "hi")
    assert cut == "stopped at --max_gen_len 30"
    before = conversation.tokens.copy(), conversation.held
    assert told(conversation, "x" * 22) == (
        "", "the context is full: 100 tokens with this message, 100 in all; /reset starts anew")
    assert (conversation.tokens, conversation.held) == before
    dialog = [user("hi"), assistant(first.removesuffix("\n")), user("abc")]
    full = "the context of 100 tokens is full; /reset starts anew"
    assert told(conversation, "abc") == (expected(llama, dialog, 100) + "\n", full)
    assert told(conversation, "")[1].startswith("the context is full: 123 tokens with this message")
    conversation.reset()
    assert told(conversation, "hi") == (first, "stopped at --max_gen_len 30")
    answer, cut = told(conversation, "x" * 21)
    assert len(answer) == len("x\n") and cut == full


@pytest.mark.parametrize("settings, said", [
    (dict(temperature=-1), "temperature is -1"), (dict(top_p=1.1), "top_p is 1.1"),
    (dict(seed=-1), "seed is -1"), (dict(max_gen_len=-1), "max_gen_len is -1"),
    (dict(system="x" * 16384), "max_seq_len is 16384; expected more")])
def test_what_does_not_fit_is_named_before_the_conversation_begins(polite, settings, said):
    with pytest.raises(ValueError, match=said):
        Conversation(polite, **settings)


# -----------------------------------------------------------------------------
# At a terminal


class Terminal:
    """chat.py on a pseudo-terminal."""

    def __init__(self, *words, **environment):
        self.heard = b""
        self.master, slave = os.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST   # line feeds come as they were written
        attributes[3] |= termios.NOFLSH   # what was written before Ctrl-C comes, too
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        self.process = subprocess.Popen(
            [sys.executable, *COMMAND, *words], cwd=ROOT, env=ENVIRONMENT | environment, stdin=slave,
            stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)

    def __enter__(self):
        self.until("> ")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def until(self, end):
        """What it writes until this comes."""
        deadline = time.monotonic() + 60
        while end.encode() not in self.heard:
            ready, *_ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, f"no {end!r} after {self.heard!r}"
            self.heard += os.read(self.master, 2**16)
        heard, _, self.heard = self.heard.partition(end.encode())
        return heard.decode()

    def type(self, keys):
        os.write(self.master, keys.encode())

    def paste(self, keys):
        """Types faster than the other side reads, as much at a time as there is room for."""
        os.set_blocking(self.master, False)
        rest = keys.encode()
        while rest:
            select.select([], [self.master], [], 60)
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self.master, rest):]
            with contextlib.suppress(BlockingIOError):
                self.heard += os.read(self.master, 2**16)
        os.set_blocking(self.master, True)

    def say(self, line):
        """What it writes between a line typed and the next prompt."""
        self.type(line + "\n")
        return self.until("\n> ").partition("\n")[2]


def test_a_conversation_at_a_terminal(polite, ckpt_dirs):
    dialog = [{"role": "system", "content": "be\nkind"}]
    with Terminal(ckpt_dirs / "polite", "--system", r"be\nkind", "--max_gen_len", "40") as terminal:

        def exchange(typed, message):
            dialog.append(user(message))
            answer = expected(polite, dialog, 40)
            note = "\n[stopped at --max_gen_len 40]" if len(answer) == 40 else ""
            assert terminal.say(typed) == answer + note
            dialog.append(assistant(answer))
        exchange("hello there", "hello there")
        exchange("bc\x01a", "abc")  # Ctrl-A: to the line's begin
        terminal.type("\n  \n")
        assert terminal.until("\n> ") == "\n  "
        unknown = "[no command /what now: /reset or /exit; after a space it is a message]"
        assert terminal.say("/what now") == unknown
        exchange(" /what", " /what")
        exchange("<|eot_id|><|start_header_id|>", "<|eot_id|><|start_header_id|>")
        for _ in range(9):
            terminal.type("half")
            terminal.until("half")
            time.sleep(0.05)  # as fingers do: input() misses a Ctrl-C just before it waits for keys
            terminal.type("\x03")
            assert terminal.until("\n> ").endswith("\n[/exit or Ctrl-D leaves]")
        exchange("zoë", "zoë")
        assert terminal.say("/reset") == "[a new conversation]"
        del dialog[1:]
        exchange("hello there", "hello there")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_what_was_said_stays(talker, ckpt_dirs):
    dialog = []
    with Terminal(ckpt_dirs / "talker", "--max_gen_len", "100000") as terminal:
        for text in ("hello there", "abc", "so"):
            dialog.append(user(text))
            terminal.type(text + "\n")
            terminal.until(text + "\n")
            heard = terminal.until("k")
            terminal.type("\x03")
            heard += "k" + terminal.until("\n[stopped]\n> ").replace("^C", "")
            assert 0 < len(heard) < 8000  # which a buffer would hold back
            assert heard == expected(talker, dialog, len(heard))
            dialog.append(assistant(heard))
        terminal.type("/exit\n")
        assert terminal.process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("pastes", [
    ["one\ntwo", "/exit\n\n\tthree\n/reset", "/a\n/b"],
    ["a" * 5000 + "\n" + "b" * 6000 + "\n" + "c" * 4500]],
    ids=["lines", "long"])
def test_what_is_pasted_at_once_is_one_message(talker, ckpt_dirs, pastes, marked):
    """Whether the terminal marks what is pasted, as most do, or types it like keys; then comes Enter."""
    words = ["--max_gen_len", "9", "--max_seq_len", "16384"]
    with Terminal(ckpt_dirs / "talker", *words, TERM="xterm" if marked else "dumb") as terminal:
        for paste in pastes:
            keys = paste.replace("\n", "\r")
            terminal.paste(f"\x1b[200~{keys}\x1b[201~\r" if marked else f"{keys}\r")
            terminal.until(expected(talker, [user(paste)], 9) + "\n[stopped at --max_gen_len 9]\n")
            terminal.until("> ")
            terminal.type("/reset\r")
            terminal.until("[a new conversation]\n")
            terminal.until("> ")
        terminal.type("/exit\r")
        assert terminal.process.wait(30) == 0


# -----------------------------------------------------------------------------
# Without a terminal


def test_piped_lines_are_answered_and_only_answers_go_to_the_output(byte_tokenizer, ckpt_dirs):
    result = run(*COMMAND, ckpt_dirs / "talker", "--max_seq_len", "100", env=ENVIRONMENT,
                 input="hi\n\nabc\n/reset\nabc")
    llama = speaker(byte_tokenizer, max_seq_len=100)
    assert result.stdout == "".join(expected(llama, [user(text)], 100) + "\n" for text in ("hi", "abc"))
    full = "[the context of 100 tokens is full; /reset starts anew]"
    refused = "[the context is full: 126 tokens with this message, 100 in all; /reset starts anew]"
    assert result.stderr.splitlines() == [CHOSEN, full, refused, "[a new conversation]", full]
    assert result.returncode == 0


@pytest.fixture
def pipe(monkeypatch):
    """Makes bytes standard input, as a process that reads a pipe has it."""
    def make(data, encoding="utf-8"):
        text = io.TextIOWrapper(io.BytesIO(data), encoding, errors="surrogateescape", newline="\n")
        monkeypatch.setattr("sys.stdin", text)
    return make


def test_piped_lines_lose_their_ends_and_the_mark_before_them(pipe):
    pipe(b"\xef\xbb\xbfhi\r\nZo\xc3\xab\n\n a")
    assert [piped_message(number) for number in range(1, 5)] == ["hi", "Zoë", "", " a"]
    with pytest.raises(EOFError):
        piped_message(5)
    pipe(b"Zo\xeb\n", "latin-1")  # as PYTHONIOENCODING may say
    assert piped_message(1) == "Zoë"


@pytest.mark.parametrize("data, said", [
    (b"Zo\xeb\n", "line 7: found byte 0xeb"),
    ("\ufeffhi\n".encode("utf-16-le"), "line 7: found byte 0xff, perhaps UTF-16;"),
    ("hi\n".encode("utf-16-le"), "line 7: found byte 0x00, perhaps UTF-16LE")])
def test_piped_lines_in_another_encoding_are_named(pipe, data, said):
    pipe(data)
    with pytest.raises(ValueError, match=f"standard input, {said}.*iconv"):
        piped_message(7)


@pytest.mark.slow
def test_an_output_that_is_closed_ends_it_quietly(ckpt_dirs):
    with subprocess.Popen(
            [sys.executable, *COMMAND, ckpt_dirs / "talker", "--max_gen_len", "16000"],
            cwd=ROOT, env=ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"hi\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(30) == 0 and process.stderr.read() == f"{CHOSEN}\n".encode()
