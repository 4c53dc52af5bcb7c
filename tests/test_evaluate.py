"""evaluate.py: every token once, the figures of transformers and lm-eval, ranks, what is refused."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hugging_face import hugging_face
from hypothesis import given
from hypothesis import strategies as st
from tiny import forked, output, random_llama, random_model, sentences, write_checkpoint

import convert
import evaluate
from llama31 import Llama
from plumbing import cli, questions, scoring
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Text


@pytest.fixture(scope="module")
def ckpt_dir(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "ckpt"
    return write_checkpoint(folder, random_llama(tokenizer, max_seq_len=64).model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def texts():
    return [" ".join(sentences(20)), "a cat 🦙", "b", *sentences(30, seed=3)]


@pytest.fixture(scope="module")
def corpus_file(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def run_text(capsys, ckpt_dir, path, **settings):
    settings = dict(device="cpu", dtype="float32", compile=False) | settings
    evaluate.text(ckpt_dir=str(ckpt_dir), input=[str(path)], json=True, **settings)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@given(length=st.integers(1, 60), size=st.integers(2, 20), stride=st.integers(1, 19),
       skipped=st.sets(st.integers(0, 59)))
def test_windows_score_each_token_once_behind_all_the_context_there_is(length, size, stride, skipped):
    stride = min(stride, size - 1)
    wanted = np.array([i not in skipped for i in range(length)])
    seen = []
    for window in scoring.windows_of(np.arange(length), wanted, size, stride):
        assert 1 <= len(window.ids) <= size and not window.is_scored[0]
        assert (np.diff(window.ids) == 1).all()
        scored = window.ids[window.is_scored]
        assert len(window.ids) == min(size, window.ids[-1] + 1)  # as much context as fits
        assert window.ids[0] == 0 or len(scored) <= stride
        seen += scored.tolist()
    assert seen == [i for i in range(1, length) if wanted[i]]


def plain_nats(model, tokenizer, texts, size, stride):
    """(nats, tokens) by transformers, a window after the other, as its own documentation scores texts."""
    theirs = hugging_face(model.args, model.state_dict())
    nats = count = 0
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text, bos=True))
        done = 1
        for end in (min(size, len(ids)), *range(size + stride, len(ids) + stride, stride)):
            end = min(end, len(ids))
            begin = max(0, end - size)
            with torch.no_grad():
                logits = theirs(ids[None, begin:end]).logits[0].double()
            each = F.cross_entropy(logits[:-1], ids[begin + 1:end], reduction="none")
            nats += float(each[done - begin - 1:].sum())
            count += end - done
            done = end
    return nats, count


@pytest.mark.parametrize("size, stride", [
    (64, 32), (40, 9), (17, 16), *(pytest.param(size, 1, marks=pytest.mark.slow) for size in (40, 2))])
def test_figures_are_those_of_transformers(size, stride, ckpt_dir, corpus_file, texts, tokenizer, capsys):
    found = run_text(capsys, ckpt_dir, corpus_file, max_seq_len=size, stride=stride)
    model = Llama.build(ckpt_dir, device="cpu", compile=False).model
    nats, count = plain_nats(model, tokenizer, texts, size, stride)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (found["documents"], found["tokens"], found["bytes"]) == (len(texts), count, num_bytes)
    assert found["nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_without_a_bos_the_first_token_is_neither_scored_nor_counted(tokenizer, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "ckpt", random_llama(tokenizer).model, tokenizer=tokenizer)
    convert.to_hf(str(folder), str(tmp_path / "hf"))
    data = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    data["post_processor"] = None
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "a.txt").write_text("a cat sat")
    bare = Tokenizer(tmp_path / "hf" / "tokenizer.json")
    ids = bare.encode("a cat sat")
    found = run_text(capsys, tmp_path / "hf", tmp_path / "a.txt")
    assert bare.bos_id is None and found["tokens"] == len(ids) - 1
    assert found["bytes"] == len("a cat sat") - len(bare.decode(ids[:1]))


def test_of_chats_the_answers_are_scored(ckpt_dir, tokenizer, tmp_path, capsys):
    chat = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "the big red dog"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}))
    found = run_text(capsys, ckpt_dir, tmp_path / "chats.jsonl")
    assert found["tokens"] == len(tokenizer.encode("the big red dog"))
    assert found["bytes"] == len("the big red dog")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_share_the_work_and_find_the_same(processes, ckpt_dir, corpus_file, tmp_path):
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    for words in (["text", "--input", corpus_file], ["choices", "--input", tmp_path / "q.jsonl"]):
        words = [*words, "--ckpt_dir", ckpt_dir, "--dtype", "float32", "--device", "cpu", "--json"]
        alone = json.loads(output("evaluate.py", *words).splitlines()[-1])
        shared = output(*forked(processes, "evaluate.py", *words))
        assert json.loads(shared.splitlines()[-1]) == pytest.approx(alone, rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("settings, bound", [(dict(), 1e-6), (dict(quantize="int8"), 0.01)])
def test_compiled_and_int8_models_find_the_same(settings, bound, ckpt_dir, corpus_file, capsys):
    exact = run_text(capsys, ckpt_dir, corpus_file)
    found = run_text(capsys, ckpt_dir, corpus_file, compile=None, **settings)
    assert found == pytest.approx(exact, rel=bound)

# -----------------------------------------------------------------------------
# Multiple choice

ROWS = [
    {"question": "Who sat on a mat?", "choices": ["a cat", "  the big red dog ", "Max"], "answer": 0},
    {"question": "Who?", "choices": {"text": ["a cat", "Zoë"], "label": ["A", "B"]}, "answerKey": "B"},
    {"question": {"stem": "Who?", "choices": [{"text": "a cat", "label": "1"},
                                              {"text": "Max", "label": "2"}]}, "answerKey": "2"},
    {"goal": "to sit", "sol1": "once upon a mat", "sol2": "there was the little", "label": 1},
    {"sentence": "the dog saw the cat and _ sat on a mat", "option1": "dog", "option2": "Zoë",
     "answer": "1"},
    {"ctx_a": "once upon a time.", "ctx_b": "there", "ctx": "once upon a time. there", "label": "2",
     "activity_label": "Sitting",
     "endings": ["was", "was the little cat", "[step] sat on a mat [title] and"]},
    {"question": " it's 2024? ", "subject": "time", "choices": ["a", "b", "c", "d"], "answer": 3}]


def test_published_rows_are_asked_as_lm_eval_asks_them():
    found = [questions.question_of(row) for row in ROWS]
    assert [question.answer for question in found] == [0, 1, 1, 1, 0, 2, 3]
    assert [(q.contexts[0], q.endings) for q in found] == [
        ("Question: Who sat on a mat?\nAnswer:", [" a cat", "   the big red dog ", " Max"]),
        ("Question: Who?\nAnswer:", [" a cat", " Zoë"]), ("Question: Who?\nAnswer:", [" a cat", " Max"]),
        ("Question: to sit\nAnswer:", [" once upon a mat", " there was the little"]),
        ("the dog saw the cat and dog", [" sat on a mat"] * 2),
        ("Sitting: once upon a time. There", [" was", " was the little cat", "  sat on a mat. and"]),
        ("it's 2024?\nA. a\nB. b\nC. c\nD. d\nAnswer:", [" A", " B", " C", " D"])]
    assert found[4].contexts == ["the dog saw the cat and dog", "the dog saw the cat and Zoë"]


def plain_scores(llama, question, before=""):
    """(log-likelihood, bytes, tokens) of each ending, by one pass over the whole text each."""
    found = []
    for context, ending in zip(question.contexts, question.endings, strict=True):
        whole = llama.tokenizer.encode(before + context + ending, bos=True)
        begin = len(llama.tokenizer.encode(before + context, bos=True))
        with torch.no_grad():
            logprobs = llama.model(torch.tensor([whole]))[0].double().log_softmax(-1)
        ids = torch.tensor(whole[begin:])
        score = float(logprobs[begin - 1:-1].gather(1, ids[:, None]).sum())
        found.append((score, len(ending.removeprefix(" ").encode()), len(ids)))
    return found


@pytest.mark.parametrize("shots", [0, 2])
def test_endings_behind_a_shared_context_score_as_texts_of_their_own(shots, tokenizer):
    llama = random_llama(tokenizer, max_seq_len=512)
    asked = [questions.question_of(row) for row in ROWS]
    for number, question in enumerate(asked):
        before = questions.shots_before(asked, number, shots, 1)
        assert before.count("\n\n") == shots and question.contexts[0] not in before
        pairs = [scoring.pair_of(tokenizer, before + context, ending)
                 for context, ending in zip(question.contexts, question.endings, strict=True)]
        expected = [-nats for nats, *_ in plain_scores(llama, question, before)]
        assert scoring.score_endings(llama, pairs) == pytest.approx(expected, rel=1e-5)


def test_accuracies_are_those_of_the_three_lengths(tokenizer, tmp_path, capsys):
    llama = random_llama(tokenizer, max_seq_len=512)
    folder = write_checkpoint(tmp_path / "ckpt", llama.model, tokenizer=tokenizer)
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    evaluate.choices(ckpt_dir=str(folder), input=str(tmp_path / "q.jsonl"), device="cpu", dtype="float32",
                     compile=False, json=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    right = np.zeros(3)
    for row in ROWS:
        question = questions.question_of(row)
        scores = np.array(plain_scores(llama, question))
        by = np.stack([scores[:, 0], scores[:, 0] / scores[:, 1], scores[:, 0] / scores[:, 2]])
        right += by.argmax(1) == question.answer
    n = len(ROWS)
    accuracy = right[0] / n
    assert found == pytest.approx(dict(
        questions=n, accuracy=accuracy, accuracy_per_byte=right[1] / n, accuracy_per_token=right[2] / n,
        stderr=(accuracy * (1 - accuracy) / (n - 1)) ** 0.5))


def test_log_likelihoods_are_those_of_lm_eval(tokenizer, tmp_path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval_adapter import Adapter
    folder = write_checkpoint(tmp_path / "ckpt", random_llama(tokenizer, max_seq_len=64).model,
                              tokenizer=tokenizer)
    convert.to_hf(str(folder), str(tmp_path / "hf"))
    theirs = huggingface.HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=1)
    ours = Adapter(str(folder), device="cpu", dtype="float32")
    pairs = [("once upon a", " time"), ("once upon a ", "time"), ("it's 20", "24 cats"), ("", "a cat"),
             (" ".join(sentences(12)), " the end")]  # too long: it loses its beginning
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    expected = [logprob for logprob, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    assert [logprob for logprob, _ in ours.loglikelihood(requests, disable_tqdm=True)] == pytest.approx(
        expected, abs=1e-4)
    for pair, logprob in zip(pairs, expected, strict=True):
        [nats] = scoring.score_endings(ours.llama, [scoring.pair_of(tokenizer, *pair)])
        assert nats == pytest.approx(-logprob, abs=1e-4)

# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("row, said", [
    ([], r"found \[\]"), ({"a": 1}, "found the fields a; expected a row of HellaSwag"),
    ({"question": "Who?", "choices": ["a"], "answer": 0}, r'found the choices \["a"\]'),
    ({"question": "Who?", "choices": ["a", ""], "answer": 0}, "found the choices"),
    ({"question": "Who?", "choices": ["a", "b"], "answer": 2}, "found the answer 2 to 2 choices"),
    ({"question": "Who?", "choices": ["a", "b"], "answer": "C"}, "found the answer 'C' to 2 choices"),
    ({"question": 3, "choices": ["a", "b"], "answer": 0}, "found the choices"),
    ({"sentence": "a b c", "option1": "a", "option2": "b", "answer": "1"}, ".*without a gap _")])
def test_a_row_that_is_no_question_is_named(row, said, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=f"q.jsonl, row 2: {said}"):
        questions.read_questions(path)


@pytest.mark.parametrize("content, said", [(b"", "found nothing"), (b"{", "row 1: "), (b"\xff", "no UTF-8")])
def test_a_file_without_questions_is_named(content, said, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"q.jsonl.*{said}"):
        questions.read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize("words, said", [
    (["text", "--input", "none.txt"], "none.txt: found no such file"),
    (["text", "--input", "README.md", "--stride", "0"], "stride is 0; expected 1 to 63"),
    (["text", "--input", "README.md", "--stride", "64"], "stride is 64; expected 1 to 63"),
    (["choices", "--input", "none.jsonl"], "none.jsonl: found no such file, expected a .jsonl file"),
    (["choices", "--input", "README.md", "--shots", "-1"], "shots is -1; expected at least 0")])
def test_a_wrong_flag_is_one_line(words, said, ckpt_dir):
    words = [*words, "--ckpt_dir", str(ckpt_dir), "--nocompile"]
    with pytest.raises(SystemExit, match="^error: [^\n]*" + re.escape(said)):
        cli.run({"text": evaluate.text, "choices": evaluate.choices}, None, words)


def test_a_text_of_nothing_to_score_is_refused(ckpt_dir, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl: found 0 documents and no token to score"):
        run_text(capsys, ckpt_dir, tmp_path / "empty.jsonl")


def test_weights_that_are_not_finite_are_refused(tokenizer, tmp_path, capsys):
    model = random_model(vocab_size=tokenizer.n_words)
    model.norm.weight.data[0] = math.nan
    folder = write_checkpoint(tmp_path / "ckpt", model, tokenizer=tokenizer)
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(ValueError, match="logits are not all finite"):
        run_text(capsys, folder, tmp_path / "a.txt")
