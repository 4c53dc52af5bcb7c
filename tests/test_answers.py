"""Answers to a file of dialogs: the rows with one message more, in order, whatever the batches."""

import gzip
import json
import os
import signal
import subprocess
import sys

import pytest
from tiny import ROOT, random_llama, random_model, write_checkpoint

from llama31 import Llama, sample
from plumbing import answers
from plumbing.prompts import holds_dialogs

ROWS = [{"id": 7, "messages": [{"role": "user", "content": "a cat Zoë"}]},
        {"conversations": [{"from": "human", "value": "once"}], "k": None},
        {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "a", "name": "Max"},
                      {"role": "assistant", "content": "a time"}, {"role": "user", "content": "🦙"}]}]


@pytest.fixture(scope="module")
def ckpt_dir(tokenizer, tmp_path_factory):
    model = random_model(vocab_size=tokenizer.n_words, max_seq_len=200)
    return write_checkpoint(tmp_path_factory.mktemp("answers") / "ckpt", model, tokenizer=tokenizer)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answered(ckpt_dir, path, capsys, **settings):
    """The rows that sample prints for a file of dialogs, and its standard error."""
    defaults = dict(ckpt_dir=ckpt_dir, prompt_file=path, device="cpu", compile=False, max_gen_len=9)
    sample(**defaults | settings)
    printed = capsys.readouterr()
    return [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_each_row_comes_back_in_order_with_its_answer_in_its_form(ckpt_dir, tmp_path, capsys):
    rows = [ROWS[i % 3] for i in range(2 * answers.BATCH + 3)]
    found, err = answered(ckpt_dir, write(tmp_path / "dialogs.jsonl", rows), capsys, temperature=0.9, seed=5)
    llama = Llama.build(ckpt_dir, device="cpu", compile=False)
    dialogs = [answers.read_dialogs(write(tmp_path / "one.jsonl", [row]))[1][0] for row in rows]
    for i, (row, dialog, result) in enumerate(zip(rows, dialogs, found, strict=True)):
        [text] = llama.chat_completion([dialog], 9, temperature=0.9, seed=5 + i)
        text = text["generation"]["content"]
        key = "messages"
        last = {"role": "assistant", "content": text}
        if "conversations" in row:
            key = "conversations"
            last = {"from": "gpt", "value": text}
        assert result == row | {key: [*row[key], last]}
    assert len({json.dumps(row) for row in found}) == len(rows)  # Equal dialogs draw different answers.
    assert f"{len(rows)}/{len(rows)}" in err


@pytest.mark.slow
def test_what_is_printed_can_be_read_whatever_the_encoding(ckpt_dir, tmp_path, capsys):
    path = write(tmp_path / "dialogs.jsonl", ROWS)
    words = ["llama31.py", "--ckpt_dir", ckpt_dir, "--prompt_file", path, "--nocompile", "--device", "cpu",
             "--max_gen_len", "9", "--temperature", "0"]
    text = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True,
                          env={**os.environ, "PYTHONIOENCODING": "latin-1"}).stdout.decode("latin-1")
    expected, _ = answered(ckpt_dir, path, capsys, temperature=0)
    assert "🦙" in str(expected) and "🦙" not in text
    assert [json.loads(line) for line in text.splitlines()] == expected and len(expected) == 3


def test_lone_surrogates_come_back_as_they_were_written(ckpt_dir, tmp_path, capsys):
    row = {"id": "\udfff", "messages": [{"role": "user", "content": "a \ud800 cat"}]}
    found, _ = answered(ckpt_dir, write(tmp_path / "dialogs.jsonl", [ROWS[0], row]), capsys)
    assert found[1]["id"] == row["id"] and found[1]["messages"][0] == row["messages"][0]


def test_gzipped_dialogs_are_read_too(tmp_path):
    with gzip.open(tmp_path / "dialogs.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROWS[0]))
    assert holds_dialogs(str(tmp_path / "dialogs.jsonl.gz"))
    assert answers.read_dialogs(str(tmp_path / "dialogs.jsonl.gz"))[0] == ROWS[:1]


def test_a_byte_order_mark_before_dialogs_is_no_part_of_them(tmp_path):
    (tmp_path / "dialogs.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8-sig")
    assert answers.read_dialogs(tmp_path / "dialogs.jsonl")[0] == ROWS[:1]


@pytest.mark.parametrize("row, fault", [
    ({"text": "once"}, "found keys text, expected messages or conversations"),
    ({"messages": []}, "found no message"),
    ({"messages": [*ROWS[0]["messages"], {"role": "assistant", "content": "x"}]}, "found an answer as"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "found an answer"),
    ({"messages": [{"role": "user"}]}, "message 0: found message"),
    ({"instruction": "a", "output": "b"}, "found keys instruction, output"),
    ({"messages": [{"role": "user", "content": "a cat " * 200}]}, r"\d+ tokens long; expected fewer than"),
])
def test_a_row_that_cannot_be_answered_is_named_before_any_answer(row, fault, ckpt_dir, tmp_path, capsys):
    path = write(tmp_path / "dialogs.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=f"dialog 1.* {fault}"):
        answered(ckpt_dir, path, capsys)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("text, fault", [
    ("", "is empty"), ("{", "dialog 0: found no JSON"), ("a cat", "dialog 0: found no JSON")])
def test_a_file_without_dialogs_is_named(text, fault, tmp_path):
    path = tmp_path / "dialogs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=fault) as error:
        answers.read_dialogs(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("settings", [dict(prompt="a"), dict(special=True)])
def test_flags_that_don_t_go_with_dialogs_are_refused(settings, ckpt_dir, tmp_path, capsys):
    with pytest.raises(ValueError, match="found --prompt and --prompt_file|special is True"):
        answered(ckpt_dir, write(tmp_path / "dialogs.jsonl", ROWS), capsys, **settings)


def test_a_text_of_all_tokens_asked_for_is_not_cut(tokenizer):
    llama = random_llama(tokenizer)
    rows = [[70] * (llama.max_seq_len - 5)]
    counts = [answers.count_cut(llama, [[70] * 5], rows, len(rows[0]) + more, []) for more in (0, 1)]
    assert counts == [0, 1]


def test_answers_that_the_context_cuts_are_said(ckpt_dir, tmp_path, capsys):
    path = write(tmp_path / "dialogs.jsonl", ROWS[:1] * 2)
    _, err = answered(ckpt_dir, path, capsys, max_gen_len=500, max_seq_len=60)
    assert "texts end because the context of 60 tokens is full" in err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such signal")
def test_ctrl_c_leaves_whole_lines(ckpt_dir, tmp_path):
    path = write(tmp_path / "dialogs.jsonl", ROWS * 200)
    words = ["llama31.py", "--ckpt_dir", ckpt_dir, "--prompt_file", path, "--nocompile", "--device", "cpu"]
    with open(tmp_path / "answers.jsonl", "wb") as out:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=out, stderr=subprocess.PIPE)
        process.stderr.read(100)  # It has begun.
        while not (tmp_path / "answers.jsonl").stat().st_size:
            process.stderr.read(10)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 600 and all(line.endswith("\n") and json.loads(line) for line in lines)


def test_equal_seeds_give_equal_answers_in_batches_of_any_size(tokenizer, tmp_path, monkeypatch, capsys):
    llama = random_llama(tokenizer, max_seq_len=200)
    rows, dialogs = answers.read_dialogs(write(tmp_path / "dialogs.jsonl", ROWS * 3))
    texts = []
    for size in (1, 2, 9):
        monkeypatch.setattr(answers, "BATCH", size)
        answers.print_answers(llama, "dialogs.jsonl", rows, dialogs, 12, (), seed=3, temperature=1.0)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["full disk", "closed pipe"])
def test_a_standard_error_that_cannot_be_written_ends_nothing(stderr, ckpt_dir, tmp_path):
    path = write(tmp_path / "dialogs.jsonl", ROWS)
    words = ["llama31.py", "--ckpt_dir", ckpt_dir, "--prompt_file", path, "--nocompile", "--device", "cpu",
             "--max_gen_len", "5"]
    if stderr == "full disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full")
        error = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, error = os.pipe()
        os.close(reader)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=error)
    os.close(error)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3


def test_seeds_numbers_and_tools_that_cannot_be_had_are_said(ckpt_dir, tmp_path, capsys):
    path = write(tmp_path / "dialogs.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"seed is \d+; expected at most 2\*\*62 - 3"):
        answered(ckpt_dir, path, capsys, seed=2**62 - 3 + 1)
    with pytest.raises(ValueError, match="dialog 1: found a number that JSON has not"):
        answered(ckpt_dir, write(tmp_path / "nan.jsonl", [ROWS[0], ROWS[0] | {"p": float("nan")}]), capsys)
    answered(ckpt_dir, write(tmp_path / "tools.jsonl", [ROWS[0] | {"tools": [{}]}]), capsys)
    _, err = answered(ckpt_dir, write(tmp_path / "tools.jsonl", [ROWS[0] | {"tools": [{}]}]), capsys)
    assert "1 dialogs define tools, which are not read" in err
