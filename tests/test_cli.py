"""The command line: text stays text, nothing runs on a word that does not fit, every flag is explained."""

import errno
import inspect
import os
import runpy
import subprocess
import sys

import fire
import pytest
from tiny import ROOT

from plumbing import cli, streams
from plumbing.prompts import read_prompts


@pytest.fixture
def command():
    calls = []

    def sample(*, prompt: str | None = None, n: int = 3, top: float | None = 0.9, shuffle: bool = False,
               betas: tuple[float, float] = (0.9, 0.95)):
        """Samples."""
        calls.append((prompt, n, top, shuffle, betas))
        return calls.append  # fire would call it
    return sample, calls


@pytest.mark.parametrize("text", [
    "Hello, world", "2024", "True", "None", "{}", "[1]", "-", "-5", "-h", "-x", "", " ", "a=b", "'quoted'",
    '"', "1e3", "two\nlines\n", "\\n", "--help me", "--", "--n=4", "Zoë 🦙", "#hash", "(1, 2)"])
def test_text_flags_stay_text(command, text):
    sample, calls = command
    cli.run({"sample": sample}, "sample", [f"--prompt={text}"])
    if not text.startswith("--"):
        cli.run({"sample": sample}, "sample", ["--prompt", text])
    assert {call[0] for call in calls} == {text}


def test_values_become_what_the_annotations_say(command):
    sample, calls = command
    for words in (["sample", "--n=7", "--top", "1", "--shuffle", "--betas", "0.8,0.9"],
                  ["--n", "-7", "--top=-1.5", "--shuffle", "False", "--betas=-1,1e-3"], []):
        cli.run({"sample": sample}, "sample", words)
    assert calls == [(None, 7, 1.0, True, (0.8, 0.9)), (None, -7, -1.5, False, (-1.0, 0.001)),
                     (None, 3, 0.9, False, (0.9, 0.95))]
    assert [type(value) for value in calls[0][1:]] == [int, float, bool, tuple]


def flags_of(words):
    """What a command gets from these words: a switch, a switch that may have a number, and two lists."""
    calls = []

    def train(*, shuffle: bool = True, fsdp: bool | int = False, input: list[str] | None = None,
              stop: list[str] | None = None, n: int = 3):
        calls.append(dict(shuffle=shuffle, fsdp=fsdp, input=input, stop=stop, n=n))
    cli.run({"train": train}, "train", words)
    [flags] = calls
    return flags


@pytest.mark.parametrize("words, value", [
    (["--fsdp"], True), (["--fsdp", "--n", "4"], True), (["--fsdp", "true"], True), (["--fsdp=True"], True),
    (["--fsdp", "4"], 4), (["--fsdp=4"], 4), (["--fsdp", "1"], 1), (["--fsdp", "0"], 0), (["--fsdp=-1"], -1),
    (["--nofsdp"], False), (["--nofsdp", "--n", "4"], False), (["--fsdp=False"], False), ([], False)])
def test_a_switch_may_have_a_number(words, value):
    found = flags_of(words)["fsdp"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("words, said", [
    (["--fsdp", "four"], "unexpected word 'four'"), (["--fsdp=four"], "--fsdp four: expected bool or int"),
    (["--fsdp", "1.5"], "unexpected word '1.5'"), (["--nofsdp", "4"], "unexpected word '4'"),
    (["--nofsdp=4"], "unknown flag --nofsdp=4"), (["--fsdp", "--nofsdp"], "--fsdp is given twice"),
    (["--shuffle", "4"], "unexpected word '4'"), (["--non", "4"], "unknown flag --non")])
def test_what_no_switch_can_have_is_named(words, said):
    with pytest.raises(SystemExit, match=said):
        flags_of(words)


@pytest.mark.parametrize("words, value", [
    (["--shuffle"], True), (["--noshuffle"], False), (["--shuffle", "false"], False), ([], True)])
def test_a_switch_is_turned_off_by_no(words, value):
    assert flags_of(words)["shuffle"] is value


@pytest.mark.parametrize("words, values", [
    (["a"], ["a"]), (["a b", "c"], ["a b", "c"]), (["a", "--input", "a"], ["a", "a"]),
    (["a", "--stop", "b", "--input", "c", "d"], ["a", "c", "d"]),
    (["a", "--input=b"], ["a", "b"]), (["a", "--input=--b"], ["a", "--b"]),
    (["-a", "-", "b", "-1"], ["-a", "-", "b", "-1"]), (["a=b", "c=d"], ["a=b", "c=d"]),
    (["[1]", "{}", '"', "\\", "zoë\n", ""], ["[1]", "{}", '"', "\\", "zoë\n", ""])])
def test_a_list_takes_several_words_and_may_be_given_twice(words, values):
    found = flags_of(["--input", *words, "--n", "4"])
    assert found["input"] == values and found["n"] == 4


def test_a_list_given_with_equals_takes_that_word_alone():
    flags = flags_of(["--input=a b", "--input=c=d", "--stop=--n"])
    assert flags["input"] == ["a b", "c=d"] and flags["stop"] == ["--n"] and flags["n"] == 3
    with pytest.raises(SystemExit, match="unexpected word 'b'"):
        flags_of(["--input=a", "b"])
    for words in (["--input"], ["--input", "--n", "4"]):
        with pytest.raises(SystemExit, match="--input needs a value"):
            flags_of(words)


def test_a_list_that_is_required_goes_by_position_too():
    calls = []

    def text(input: list[str], n: int = 3):
        calls.append((input, n))
    for words in (["a=b", "c", "--n", "4"], ["--n", "4", "a=b", "c"], ["--input", "a=b", "c", "--n=4"]):
        cli.run({"text": text}, "text", words)
    assert calls == [(["a=b", "c"], 4)] * 3


@pytest.mark.parametrize("words", [["a b", "c=d"], ["--src=a b", "--dst", "c=d"], ["a b", "--dst=c=d"]])
def test_required_values_go_by_position_or_by_flag(words):
    calls = []

    def convert(src: str, dst: str):
        calls.append((src, dst))
    commands = {"convert": convert, "other": lambda: None}
    cli.run(commands, "other", ["convert", *words])
    assert calls == [("a b", "c=d")]
    for wrong, said in ((["a"], "needs --dst"), ([], "needs --src --dst"),
                        (["a", "b", "c"], "unexpected word 'c'"), (["a", "-b"], "unknown flag -b")):
        with pytest.raises(SystemExit, match=said):
            cli.run(commands, "convert", wrong)
    assert len(calls) == 1


@pytest.mark.parametrize("words, said", [
    (["--bad", "3"], "unknown flag --bad"), (["--n", "2", "--pro=x"], "unknown flag --pro"),
    (["-n", "3"], "unknown flag -n"), (["--n", "3", "--", "--trace"], "unknown flag --:"),
    (["--n", "x"], "--n x: expected int"), (["--n=1.0"], "--n 1.0: expected int"),
    (["--n="], "--n : expected int"), (["--n", "None"], "--n None: expected int"),
    (["hello"], "unexpected word 'hello': commands are sample, and sample takes --"),
    (["--n", "3", "4"], "unexpected word '4'"),
    (["--prompt"], "--prompt needs a value"), (["--prompt", "--n", "3"], "--prompt needs a value"),
    (["--n", "1", "--n", "2"], "--n is given twice"), (["--n=1", "--n=1"], "--n is given twice"),
    (["--shuffle=maybe"], "expected bool"), (["--shuffle", "maybe"], "unexpected word 'maybe'"),
    (["--top", "two\nlines"], "expected float"), (["--betas", "1"], "--betas 1: expected tuple"),
    (["--betas", "1,2,3"], "--betas 1,2,3: expected tuple")])
def test_a_word_that_does_not_fit_is_one_line_and_nothing_runs(command, words, said):
    sample, calls = command
    with pytest.raises(SystemExit) as stop:
        cli.run({"sample": sample}, "sample", words)
    assert stop.value.code.startswith("error: ") and said in stop.value.code and "\n" not in stop.value.code
    assert not calls


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["sample", "--help"], ["sample", "-h"],
                                   ["--n", "3", "--help"], ["--bad", "--help"]])
def test_help_lists_every_flag_with_its_default_once_and_runs_nothing(command, words, capsys):
    sample, calls = command
    cli.run({"sample": sample, "train": lambda: None}, "sample", words)
    out, err = capsys.readouterr()
    flags = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert flags == ["--prompt", "--n", "--top", "--shuffle", "--betas"]
    for said in ("Samples.", "default None", "default 3", "default 0.9", "default False",
                 "default (0.9, 0.95)", "sample train"):
        assert out.count(said) == 1
    assert not err and not calls


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_a_users_error_is_one_line(kind):
    def fail():
        raise kind("found 3,\nexpected 4")
    with pytest.raises(SystemExit, match="^error: found 3, expected 4$"):
        cli.run({"fail": fail}, "fail", [])


def test_any_other_error_keeps_its_traceback():
    def fail():
        raise TypeError("ours")
    with pytest.raises(TypeError, match="ours"):
        cli.run({"fail": fail}, "fail", [])


def test_help_without_a_command_names_them_where_there_is_no_default(capsys):
    cli.run({"there": convert_there, "back": convert_there}, default=None, argv=["--help"])
    assert capsys.readouterr().out == "there: Goes there.\nback: Goes there.\n"


def convert_there(src: str):
    """Goes there."""


def test_a_command_has_to_be_named_where_there_is_no_default(capsys):
    with pytest.raises(SystemExit) as error:
        cli.run({"there": print, "back": print}, default=None, argv=["x"])
    assert error.value.code == "error: expected there or back, found x; try --help"


@pytest.mark.parametrize("script", ["llama31", "chat", "reference", "convert", "tiny_stories", "stories",
                                    "bench"])
def test_every_flag_of_every_command_has_a_line_of_help(script, monkeypatch, capsys):
    commands = {}
    monkeypatch.setattr(cli, "run", lambda functions, default, argv=None: commands.update(functions))
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert commands
    for name, function in commands.items():
        docstring = fire.docstrings.parse(inspect.getdoc(function))
        explained = {arg.name: arg.description for arg in docstring.args}
        assert list(explained) == list(inspect.signature(function).parameters)
        cli.print_help(name, function)
        out, _ = capsys.readouterr()
        for flag, meaning in explained.items():
            [line] = [line for line in out.splitlines() if line.startswith(f"  --{flag} ")]
            assert meaning and f" {meaning} (" in line


@pytest.mark.parametrize("text, meant", [
    (r"\n", "\n"), (r"\t", "\t"), (r"\\", "\\"), (r"\\n", r"\n"), (r"\\\n", "\\\n"), ("a\nb", "a\nb"),
    (r"\n\n###\n", "\n\n###\n"), (r"\r \x41 \u00e9 \d", r"\r \x41 \u00e9 \d"), ("\\", "\\"), ("", ""),
    ("é🦙", "é🦙")])
def test_line_breaks_tabs_and_backslashes_are_unescaped_and_nothing_else(text, meant):
    assert cli.unescape(text) == meant


# -----------------------------------------------------------------------------
# Standard streams

SAYS = r"""
import sys
from plumbing import cli
def say(text: str = "Zo\u00eb \U0001f999 \udce9", *, fail: bool = False):
    print(text + sys.stdin.read())
    print(text, file=sys.stderr)
    if fail:
        raise ValueError(text)
cli.run({"say": say}, "say")
"""


def say(redirections="", words=(), **environment):
    """The finished process of a command that copies its input and says a text to both outputs."""
    command = ["bash", "-c", f'exec "$@" {redirections}', "bash", sys.executable, "-c", SAYS, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, input="Zoë\n".encode(),
                          env={**os.environ, **environment})


@pytest.mark.parametrize("encoding, text", [
    ("ascii", r"Zo\xeb \U0001f999 \udce9"), ("latin-1", "Zo\xeb \\U0001f999 \\udce9"),
    ("cp1252:strict", "Zo\xeb \\U0001f999 \\udce9"), ("utf-8", "Zoë 🦙 \\udce9")])
def test_what_a_terminal_can_not_show_is_escaped(encoding, text):
    done = say(words=["--fail"], PYTHONIOENCODING=encoding)
    codec = encoding.partition(":")[0]
    read = "Zoë".encode().decode(codec if codec != "ascii" else "utf-8", "replace")
    assert done.stdout.decode(codec).startswith(text + (r"Zo\xeb" if codec == "ascii" else read))
    assert done.stderr.decode(codec) == f"{text}\nerror: {text}\n" and done.returncode == 1


@pytest.mark.parametrize("redirections", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", [[], ["--help"], ["--fail"]])
def test_a_closed_stream_takes_nothing_and_gives_nothing(redirections, words):
    done = say(redirections, words)
    assert done.returncode == (words == ["--fail"])
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    assert bool(done.stdout) == (">&-" not in redirections.replace("2>&-", ""))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", [[], ["--help"]])
def test_a_full_disk_behind_the_output_is_one_line(words):
    done = say(">/dev/full", words)
    *_, line = done.stderr.decode().splitlines()
    assert line.startswith("error: no space left for standard output") and done.returncode == 1
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_an_error_that_names_its_file_stays_as_it_is():
    def fail():
        raise OSError(errno.ENOSPC, "make room", "train.bin")
    with pytest.raises(SystemExit, match="error: .*make room: 'train.bin'"):
        cli.run({"fail": fail}, "fail", [])


def test_a_stream_without_an_encoding_is_left_alone(monkeypatch, capsys):
    class Notebook:
        write = flush = isatty = print
    monkeypatch.setattr("sys.stdout", Notebook())
    streams.open_streams()


# -----------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("data, prompts", [
    (b"a cat", ["a cat"]), (b"a cat\n", ["a cat"]), (b"a\nb\n", ["a", "b"]), (b"a\r\nb\r\n", ["a", "b"]),
    (b"\xef\xbb\xbfa\nb", ["a", "b"]), (b"\xef\xbb\xbfZo\xc3\xab\r\n", ["Zoë"]), (b" a \n \n", [" a ", " "]),
    (rb"a\nb", [r"a\nb"])])
def test_a_file_has_a_prompt_in_every_line(data, prompts, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(data)
    assert read_prompts(None, tmp_path / "prompts.txt", ["once"]) == prompts


@pytest.mark.parametrize("data, said", [
    (b"", "line 1 is empty; expected a prompt in every line"), (b"\n", "line 1 is empty"),
    (b"a\n\nb\n", "line 2 is empty"), (b"a\n\n", "line 2 is empty"), (b"\xef\xbb\xbf", "line 1 is empty"),
    ("a\nZoë".encode("utf-16"), "line 1: found byte 0xff, perhaps UTF-16; expected UTF-8: iconv -f UTF-16"),
    ("a\nb".encode("utf-16-le"), "line 1: found byte 0x00, perhaps UTF-16LE"),
    ("a\nZoë".encode("latin-1"), "line 2: found byte 0xeb, perhaps WINDOWS-1252; .* iconv -f WINDOWS-1252"),
    (b"\xef\xbb\xbfa\n\xff", "line 2: found byte 0xff")])
def test_what_is_no_prompt_is_named_with_its_line(data, said, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(ValueError, match=f"prompts.txt, {said}"):
        read_prompts(None, tmp_path / "prompts.txt", ["once"])


@pytest.mark.parametrize("name, found", [("absent", "no such file"), (".", "a folder")])
def test_a_prompt_file_that_is_none_is_named(tmp_path, name, found):
    with pytest.raises(FileNotFoundError, match=f"found {found}, expected a text file"):
        read_prompts(None, tmp_path / name, ["once"])


def test_a_prompt_may_have_escapes_and_stands_alone():
    assert read_prompts(r"Q: 1\t2?\nA: \\n", None, ["once"]) == ["Q: 1\t2?\nA: \\n"]
    assert read_prompts(None, None, ("once", "one day")) == ["once", "one day"]
    with pytest.raises(ValueError, match="--prompt is empty; expected a text"):
        read_prompts("", None, ["once"])
    with pytest.raises(ValueError, match="found --prompt and --prompt_file"):
        read_prompts("a", "b", ["once"])
