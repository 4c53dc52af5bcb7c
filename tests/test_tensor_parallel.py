"""A model that several processes split: the text, the scores and the files that each reads."""

import json
import sys

import pytest
import torch
from tiny import (
    ROOT,
    fake_group,
    forked,
    output,
    random_llama,
    random_model,
    run,
    torchrun,
    write_checkpoint,
)

import convert
from llama31 import Llama, load_checkpoint
from plumbing import streams

SHAPE = dict(n_heads=8, n_kv_heads=4, head_dim=8)
PROMPTS = "once upon a time\nthe little cat Zoë sat\nMax\n"


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """name -> a folder with the same model; its tied twin; the number of words divides by 4."""
    folder = tmp_path_factory.mktemp("split")
    model = random_llama(tokenizer, **SHAPE).model
    tied = random_llama(tokenizer, tie_word_embeddings=True, **SHAPE).model
    found = {f"meta{n}": write_checkpoint(folder / f"meta{n}", model, n, tokenizer=tokenizer)
             for n in (1, 2, 4)}
    found["tied"] = write_checkpoint(folder / "tied", tied, 1, tokenizer=tokenizer)
    convert.to_hf(folder / "meta1", folder / "hf")
    return found | {"hf": folder / "hf"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


def sampled(folder, prompts, processes, *flags):
    words = ["llama31.py", "sample", "--ckpt_dir", folder, "--prompt_file", prompts, "--max_gen_len", 12,
             "--device", "cpu", "--dtype", "float32", "--nocompile", *flags]
    return output(*(forked(processes, *words) if processes > 1 else words))


@pytest.mark.slow
@pytest.mark.parametrize("name, processes", [("meta1", 4), ("meta4", 2), ("hf", 2), ("tied", 4)])
def test_processes_that_split_a_model_print_what_one_does(folders, prompts, name, processes):
    for flags in (["--temperature", 0], ["--temperature", 1, "--seed", 3]):
        expected = sampled(folders[name], prompts, 1, *flags)
        assert expected.count("\n") >= 3
        assert sampled(folders[name], prompts, processes, *flags) == expected


def evaluated(command, folder, input, processes, *flags):
    words = ["evaluate.py", command, "--ckpt_dir", folder, "--input", input, "--device", "cpu", "--dtype",
             "float32", "--nocompile", "--json", *flags]
    return json.loads(output(*(forked(processes, *words) if processes > 1 else words)).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("processes, number", [(2, 2), (4, 2), (4, 4)])
def test_a_split_model_scores_as_a_whole_one(folders, tmp_path, processes, number):
    rows = [{"text": text} for text in ("once upon a time there was the little cat", "a mat",
                                        "Max, it's 2024 and the cat saw")]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": row["text"], "choices": ["a cat", "the red dog"],
                                             "answer": i % 2}) + "\n" for i, row in enumerate(rows)))
    flags = ["--tensor_parallel", number]
    one = evaluated("text", folders["meta2"], texts, 1)
    split = evaluated("text", folders["meta2"], texts, processes, *flags)
    assert split == {name: pytest.approx(value, rel=1e-6) for name, value in one.items()}
    assert (split["documents"], split["tokens"]) == (one["documents"], one["tokens"])
    assert evaluated("choices", folders["meta2"], questions, processes, *flags) == \
        evaluated("choices", folders["meta2"], questions, 1)


@pytest.mark.slow
def test_from_python_all_processes_split_it_and_get_the_same(folders, tmp_path):
    code = tmp_path / "ours.py"
    code.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from llama31 import Llama
from plumbing import parallel
llama = Llama.build({str(folders["hf"])!r}, device="cpu", dtype="float32")
tokens, logprobs = llama.generate([[1, 2, 3], [4, 5, 6, 7]], 8, temperature=0.8, stop_tokens=[],
                                  logprobs=True)
logprobs = [[round(x, 4) for x in row] for row in logprobs]
sys.stdout.write(f"{{llama.model.tensor_parallel}} {{llama.reader}} {{tokens}} {{logprobs}}\\n")
parallel.leave_process_group()
""")
    process = run(*torchrun(2, code))
    assert process.returncode == 0, process.stderr
    llama = Llama.build(folders["hf"], device="cpu", dtype="float32", compile=False)
    tokens, logprobs = llama.generate([[1, 2, 3], [4, 5, 6, 7]], 8, temperature=0.8, stop_tokens=[],
                                      logprobs=True)
    line = f"2 None {tokens} {[[round(x, 4) for x in row] for row in logprobs]}"
    assert process.stdout.splitlines() == [line] * 2
    assert "2 processes split the model; nothing is compiled" in process.stderr


@pytest.mark.slow
def test_each_process_reads_its_part_of_the_files(folders, tmp_path):
    code = tmp_path / "ours.py"
    code.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from llama31 import load_checkpoint
from plumbing import mapped, parallel
read = []
real = mapped.Pieces.part
def part(self, offsets, sizes):
    result = real(self, offsets, sizes)
    read.append(result.numel())
    return result
mapped.Pieces.part = part
rank, processes, device = parallel.join_process_group("cpu")
for folder in {[str(folder) for folder in folders.values()]}:
    whole = load_checkpoint(folder, dtype=torch.float32).state_dict()
    read.clear()
    model = load_checkpoint(folder, dtype=torch.float32, tensor_parallel=processes)
    ours = {{name: p.to_local() if parallel.is_sharded(p) else p for name, p in model.named_parameters()}}
    for name, p in ours.items():
        dim = mapped.split_dim(name)
        assert torch.equal(p, whole[name] if dim is None else whole[name].chunk(processes, dim)[rank])
    assert sum(read) == sum(p.numel() for p in ours.values())
    matrices = [whole[name].numel() for name, p in ours.items() if p.dim() > 1]
    assert sum(p.numel() for p in ours.values() if p.dim() > 1) == sum(matrices) / processes
print("read", len(ours))
parallel.leave_process_group()
""")
    assert output(*forked(4, code)).count("read") == 4


@pytest.mark.parametrize("number, changes, message", [
    (4, dict(n_kv_heads=2), "processes that split the model is 4; expected one that divides n_kv_heads, 2"),
    (4, dict(n_kv_heads=4, vocab_size=102),
     "processes that split the model is 4; expected one that divides vocab_size, 102"),
    (3, {}, "tensor_parallel is 3; expected a number that divides that of the processes, 4")])
def test_a_model_that_does_not_divide_is_refused_by_name(tmp_path, number, changes, message):
    shape = dict(n_heads=4, n_kv_heads=4, vocab_size=104) | changes
    folder = write_checkpoint(tmp_path, random_model(**shape))
    with fake_group(4), pytest.raises(ValueError, match=message):
        load_checkpoint(folder, tensor_parallel=number)


def test_what_a_split_model_does_not_do_is_refused_or_said(folders, capsys, monkeypatch):
    with pytest.raises(ValueError, match="quantize is int8; expected None where 2 processes split a model"):
        load_checkpoint(folders["meta1"], quantize="int8", tensor_parallel=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    import chat
    with pytest.raises(ValueError, match="torchrun's number of processes is 2; expected 1, as a terminal"):
        chat.chat(ckpt_dir=str(folders["meta1"]))


def test_caches_have_the_heads_of_this_process(folders):
    with fake_group(2):
        model = load_checkpoint(folders["meta1"], dtype=torch.float32, tensor_parallel=2)
        [cache, _] = Llama(model, None).new_caches(3, 5)
    assert cache.k.shape == cache.v.shape == (3, 5, 2, 8)


def test_only_the_first_process_prints(capsys, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with streams.only_first_prints():
            print(f"out {rank}")
            print(f"err {rank}", file=sys.stderr)
    assert capsys.readouterr() == ("out 0\n", "err 0\n")
