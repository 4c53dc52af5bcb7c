"""Real weights: SmolLM2-135M-Instruct here and in transformers, the same numbers; and who is up first."""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import smollm2
import torch
import torch.nn.functional as F
from test_parity import assert_close
from test_peers import hugging_face, one_thread  # noqa: F401, a fixture

import llama31

pytestmark = pytest.mark.weights
ROOT = Path(llama31.__file__).parent
NEW = 64
PROMPTS = [  # the likeliest token leads by 0.01 or more at every step, so that rounding does not choose it
    "Water",
    "The capital of France is",
    "<|im_start|>user\nWrite a short story about a cat and a dog.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    \"\"\"The n-th Fibonacci number.\"\"\"\n    if n < 2:\n        return n\n",
    "Im Jahr 1923 fuhr ein kleines Schiff – die „Zoë“ – von Zürich aus über den See. 🚢\n\n" * 6]


@pytest.fixture(scope="module")
def folder():
    """SmolLM2's Meta folder."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    try:
        return smollm2.meta_folder()
    except smollm2.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return smollm2.tokenizer()


@pytest.fixture(scope="module")
def llama(folder):
    return llama31.Llama.build(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(llama):
    return hugging_face(llama.model.args, llama.model.state_dict(), "sdpa")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert len({len(row) for row in ids}) == len(ids)
    return ids


@pytest.fixture(scope="module")
def greedy(theirs, prompts):
    """What transformers continues each prompt with, alone."""
    return [theirs.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False)[0, len(row):].tolist()
            for row in prompts]


@pytest.fixture(scope="module")
def windows(tokenizer):
    """Some thousand ids of real text, (4, T): stories where they are, else README."""
    if sample := os.environ.get("TINYSTORIES_SAMPLE"):
        shard = json.loads(Path(sample, "data00.json").read_text(encoding="utf-8"))
        text = "\n\n".join(story["story"].strip() for story in shard[:30])
    else:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = tokenizer(text).input_ids
    return torch.tensor(ids[:len(ids) // 4 * 4][:2560]).view(4, -1)


def test_real_text_has_the_same_logits_and_perplexity(llama, theirs, windows):
    inputs, targets = windows[:, :-1], windows[:, 1:]
    assert targets.numel() >= 2000
    with torch.inference_mode():
        logits = theirs(inputs).logits
        assert_close(llama.model(inputs[:2]), logits[:2])
        ours = math.exp(llama.model(inputs, targets))
        expected = math.exp(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert ours == pytest.approx(expected, rel=1e-5)
    assert expected < 40  # it knows English, so the weights are in their places


def test_greedy_tokens_are_the_same_alone_and_in_a_ragged_batch(llama, prompts, greedy):
    assert [len(row) for row in greedy] == [NEW] * len(prompts)
    assert [llama.generate([row], NEW, temperature=0)[0] for row in prompts] == greedy
    assert llama.generate(prompts, NEW, temperature=0) == greedy


def test_the_stored_dtype_has_float32s_perplexity_but_for_its_rounding(folder, llama, windows):
    rounded = llama31.Llama.build(folder, device="cpu").model
    assert rounded.tok_embeddings.weight.dtype is torch.bfloat16
    inputs, targets = windows[:1, :-1], windows[:1, 1:]
    with torch.inference_mode():
        ours, expected = (math.exp(model(inputs, targets)) for model in (rounded, llama.model))
    assert ours == pytest.approx(expected, rel=0.02)


PROMPT = [1, 4093, 198, 19556, 2]  # <|im_start|> user \n Hello <|im_end|>
OURS = f"""
import sys
import llama31
llama = llama31.Llama.build(sys.argv[1], device="cpu")
print(llama.generate([{PROMPT}], 1, temperature=0)[0][0], flush=True)
"""
THEIRS = f"""
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(model.generate(torch.tensor([{PROMPT}]), max_new_tokens=1, do_sample=False)[0, -1].item(), flush=True)
"""
PEAK = "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"  # in KiB


def first_token(program, folder):
    """(first token, seconds from the start of the process to it, peak memory in MB)."""
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", program + PEAK, folder], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as process:
        token = int(process.stdout.readline())
        seconds = time.perf_counter() - start
        peak = int(process.stdout.readline()) * 1024 / 1e6
    return token, seconds, peak


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_the_first_token_comes_before_transformers_and_takes_less_memory(folder, tmp_path):
    stored = llama31.Llama.build(folder, device="cpu").model
    hugging_face(stored.args, stored.state_dict()).save_pretrained(tmp_path)
    pairs = [(first_token(OURS, folder), first_token(THEIRS, tmp_path)) for _ in range(5)]
    (our_tokens, our_s, our_mb), (their_tokens, their_s, their_mb) = (zip(*runs, strict=True)
                                                                     for runs in zip(*pairs, strict=True))
    print(f"first token after {statistics.median(our_s):.2f} s, {max(our_mb):.0f} MB; "
          f"transformers {statistics.median(their_s):.2f} s, {min(their_mb):.0f} MB")
    assert our_tokens == their_tokens
    assert statistics.median(our_s) <= statistics.median(their_s)
    assert max(our_mb) < min(their_mb)
