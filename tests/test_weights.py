"""Real weights: SmolLM2-135M-Instruct here and in transformers, the same numbers, in less memory."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from hugging_face import hugging_face
from tiny import assert_close, output

import llama31

pytestmark = pytest.mark.weights
NEW = 64
PROMPTS = [  # the likeliest token leads by 0.01 or more at every step, so that rounding does not choose it
    "Water",
    "The capital of France is",
    "<|im_start|>user\nWrite a short story about a cat and a dog.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    \"\"\"The n-th Fibonacci number.\"\"\"\n    if n < 2:\n        return n\n",
    "Im Jahr 1923 fuhr ein kleines Schiff – die „Zoë“ – von Zürich aus über den See. 🚢\n\n" * 6]


@pytest.fixture(scope="module")
def llama(smollm2_dir):
    return llama31.Llama.build(smollm2_dir, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(llama):
    return hugging_face(llama.model.args, llama.model.state_dict(), "sdpa")


@pytest.fixture(scope="module")
def prompts(smollm2_tokenizer):
    ids = [smollm2_tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert len({len(row) for row in ids}) == len(ids)
    return ids


@pytest.fixture(scope="module")
def greedy(theirs, prompts):
    """What transformers continues each prompt with, alone."""
    return [theirs.generate(torch.tensor([row]), max_new_tokens=NEW, do_sample=False)[0, len(row):].tolist()
            for row in prompts]


def test_real_text_has_the_same_logits_and_perplexity(llama, theirs, real_windows):
    inputs, targets = real_windows[:, :-1], real_windows[:, 1:]
    assert targets.numel() >= 2000
    with torch.inference_mode():
        logits = theirs(inputs).logits
        assert_close(llama.model(inputs[:2]), logits[:2])
        ours = math.exp(llama.model(inputs, targets))
        expected = math.exp(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert ours == pytest.approx(expected, rel=1e-5)
    assert expected < 100  # it knows README's English, so the weights are in their places


def test_greedy_tokens_are_the_same_alone_and_in_a_ragged_batch(llama, prompts, greedy):
    assert [len(row) for row in greedy] == [NEW] * len(prompts)
    assert [llama.generate([row], NEW, temperature=0)[0] for row in prompts] == greedy
    assert llama.generate(prompts, NEW, temperature=0) == greedy


def test_the_stored_dtype_has_float32s_perplexity_but_for_its_rounding(smollm2_dir, llama, real_windows):
    rounded = llama31.Llama.build(smollm2_dir, device="cpu").model
    assert rounded.tok_embeddings.weight.dtype is torch.bfloat16
    inputs, targets = real_windows[:1, :-1], real_windows[:1, 1:]
    with torch.inference_mode():
        ours, expected = (math.exp(model(inputs, targets)) for model in (rounded, llama.model))
    assert ours == pytest.approx(expected, rel=0.02)


PROMPT = [1, 4093, 198, 19556, 2]  # <|im_start|> user \n Hello <|im_end|>
OURS = f"""
import sys
import llama31
llama = llama31.Llama.build(sys.argv[1], device="cpu")
print(llama.generate([{PROMPT}], 1, temperature=0)[0][0])
"""
THEIRS = f"""
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(model.generate(torch.tensor([{PROMPT}]), max_new_tokens=1, do_sample=False)[0, -1].item())
"""
PEAK = "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"  # in KiB


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_the_first_token_takes_less_memory_than_transformers(smollm2_dir, tmp_path):
    stored = llama31.Llama.build(smollm2_dir, device="cpu").model
    hugging_face(stored.args, stored.state_dict()).save_pretrained(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ours, theirs = ([output("-c", program + PEAK, folder, env=environment).split() for _ in range(3)]
                    for program, folder in ((OURS, smollm2_dir), (THEIRS, tmp_path)))
    assert {token for token, _ in ours} == {token for token, _ in theirs}
    assert max(int(peak) for _, peak in ours) < min(int(peak) for _, peak in theirs)
