"""A Hugging Face folder with a vocabulary of its own: trained, sampled, converted, and trained again."""

import json
import os

import pytest
import torch
from hugging_face import hugging_face
from safetensors.torch import load_file, save_file
from tiny import (
    WIDE,
    assert_close,
    output,
    random_model,
    random_tokens,
    read_log,
    read_weights,
    sentences,
    write_checkpoint,
)

import convert
import llama31
import reference
import tiny_stories
from llama31 import Llama
from plumbing import huggingface
from tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
DIALOG = [dict(role="user", content="who sat on the mat?"), dict(role="assistant", content="Zoë sat.")]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def vocabulary():
    """transformers' tokenizer of a small vocabulary, with ChatML's names and template."""
    from tokenizers import Tokenizer as BPE
    from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(sentences(300), trainers.BpeTrainer(
        vocab_size=384, special_tokens=NAMES, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=NAMES[0], eos_token=NAMES[2], chat_template=TEMPLATE)


def write_folder(folder, vocabulary, dtype=torch.float32):
    """A folder as transformers saves it, of a model whose rows are padded and whose heads are wide."""
    model = random_model(vocab_size=400, **{**WIDE, "dim": 64})
    theirs = hugging_face(model.args, model.state_dict()).to(dtype)
    theirs.generation_config.eos_token_id = [0, 2]
    theirs.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    return folder


def write_data(folder, vocabulary_folder):
    """Token files of that vocabulary; returns train.bin's path."""
    folder.mkdir()
    (folder / "texts.txt").write_text("\n\n".join(sentences(40)))
    tiny_stories.text(input=[str(folder / "texts.txt")], data_dir=str(folder / "data"), num_workers=1,
                      separator="\\n\\n", tokenizer_path=str(vocabulary_folder / "tokenizer.json"))
    return str(folder / "data" / "train.bin")


def train(folder, data, out_dir):
    """One step, without a tokenizer_path; returns its checkpoint and the record of it."""
    llama31.train(train_data=data, ckpt_dir=str(folder), out_dir=str(out_dir), batch_size=2, seq_len=32,
                  steps=1, lr=1e-3, device="cpu", dtype="float32")
    return out_dir / "step_000001", read_log(out_dir)[0]


def weights(folder):
    """Name -> tensor, Meta's, of a folder of either format."""
    _, pieces = llama31.open_checkpoint(folder)
    return {name: parts.whole() for name, parts in pieces.items()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def assert_same_tokenizer(folder, source):
    for name in TOKENIZER_FILES:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    a, b = (Tokenizer(path / "tokenizer.json") for path in (folder, source))
    assert (a.bos_id, a.stop_tokens) == (b.bos_id, b.stop_tokens) and b.stop_tokens == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_what_is_trained_is_converted_both_ways_and_trained_again(vocabulary, dtype, tmp_path, capsys):
    source = write_folder(tmp_path / "source", vocabulary, dtype)
    data = write_data(tmp_path / "texts", source)
    trained, _ = train(source, data, tmp_path / "out")
    assert {tensor.dtype for tensor in read_weights(trained).values()} == {dtype}
    convert.to_hf(trained, tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "meta")
    for folder in trained, tmp_path / "hf", tmp_path / "meta":
        assert_same_weights(folder, trained)
        assert_same_tokenizer(folder, source)
    again = [train(folder, data, tmp_path / f"again{i}")
             for i, folder in enumerate((trained, tmp_path / "hf", tmp_path / "meta"))]
    losses = [record["loss"] for _, record in again]
    assert losses[0] == losses[1] == losses[2]
    for folder, _ in again:
        assert_same_weights(folder, again[0][0])
        assert_same_tokenizer(folder, source)
    assert "only weights" not in capsys.readouterr().err


def test_transformers_reads_what_was_trained_with_its_tokenizer(vocabulary, tmp_path):
    source = write_folder(tmp_path / "source", vocabulary)
    trained, _ = train(source, write_data(tmp_path / "texts", source), tmp_path / "out")
    convert.to_hf(trained, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Llama.build(trained, device="cpu", compile=False)
    tokens = random_tokens(2, 30, high=384)
    with torch.no_grad():
        assert_close(ours.model(tokens), theirs(tokens).logits)
    assert theirs.generation_config.eos_token_id == ours.tokenizer.stop_tokens == [0, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (NAMES[0], NAMES[2])
    assert tokenizer.apply_chat_template(DIALOG) == vocabulary.apply_chat_template(DIALOG)
    prompts = ["the cat sat", "Zoë saw 🦙 and"]
    padding = [*range(len(vocabulary), 400)]  # rows that are no tokens
    made = [tokenizer.decode(theirs.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=20,
                                             do_sample=False, suppress_tokens=padding)[0])
            for prompt in prompts]
    texts = [c["generation"] for c in ours.text_completion(prompts, 20, temperature=0, echo=True)]
    assert texts == [text.removesuffix(NAMES[0]).removesuffix(NAMES[2]) for text in made]
    slow = reference.Llama.build(tmp_path / "hf").text_completion(prompts, 20)
    assert [prompt + c["generation"] for prompt, c in zip(prompts, slow, strict=True)] == texts


MIXED = [  # (types of matrices, in turn; type of norms; type that training saves)
    ([torch.bfloat16], torch.float32, torch.bfloat16), ([torch.float32], torch.bfloat16, torch.float32),
    ([torch.bfloat16, torch.float16], torch.float16, torch.float32),
    ([torch.bfloat16, torch.float32], torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("matrices, norms, saved", MIXED, ids=str)
def test_of_several_types_training_saves_one_that_holds_all_matrices(vocabulary, matrices, norms, saved,
                                                                     tmp_path):
    source = write_folder(tmp_path / "source", vocabulary)
    path = source / huggingface.SINGLE
    tensors = load_file(path)
    for i, (name, tensor) in enumerate(tensors.items()):
        tensors[name] = tensor.to(norms if tensor.dim() == 1 else matrices[i % len(matrices)])
    save_file(tensors, path, metadata={"format": "pt"})
    trained, _ = train(source, write_data(tmp_path / "texts", source), tmp_path / "out")
    assert {tensor.dtype for tensor in read_weights(trained).values()} == {saved}


@pytest.mark.parametrize("size", [convert.to_hf.__kwdefaults__["max_file_bytes"], 150_000])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_convert_gives_weights_the_type_that_is_asked_for(vocabulary, dtype, size, tmp_path):
    source = write_folder(tmp_path / "source", vocabulary)
    name = str(dtype).removeprefix("torch.")
    convert.from_hf(source, tmp_path / "meta", dtype=name)
    convert.to_hf(tmp_path / "meta", tmp_path / "same", max_file_bytes=size)
    convert.from_hf(source, tmp_path / "whole")
    convert.to_hf(tmp_path / "whole", tmp_path / "hf", dtype=name, max_file_bytes=size)
    expected = {key: tensor.to(dtype) for key, tensor in weights(source).items()}
    for folder in tmp_path / "meta", tmp_path / "same", tmp_path / "hf":
        found = weights(folder)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert {tensor.dtype for tensor in found.values()} == {dtype}
    for folder in tmp_path / "same", tmp_path / "hf":
        assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype
        assert all(path.stat().st_size <= size for path in folder.glob("*.safetensors"))


def test_a_type_that_is_none_is_named(vocabulary, tmp_path):
    with pytest.raises(ValueError, match="dtype is int4; expected float32, bfloat16 or float16"):
        convert.from_hf(tmp_path, tmp_path / "meta", dtype="torch.int4")


@pytest.mark.slow
def test_the_commands_go_the_whole_way_on_texts(vocabulary, tmp_path):
    source = write_folder(tmp_path / "source", vocabulary, torch.bfloat16)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences(60)))
    output("tiny_stories.py", "text", "--input", tmp_path / "texts.jsonl", "--data_dir", tmp_path / "data",
           "--tokenizer_path", source / "tokenizer.json", "--num_workers", "1")
    flags = ["--train_data", tmp_path / "data" / "train.bin", "--batch_size", "2", "--seq_len", "32",
             "--steps", "2", "--device", "cpu", "--compile=False"]
    output("llama31.py", "train", "--ckpt_dir", source, "--out_dir", tmp_path / "out", *flags)
    trained = tmp_path / "out" / "step_000002"
    words = ["--prompt", "the cat", "--max_gen_len", "8", "--temperature", "0"]
    text = output("llama31.py", "--ckpt_dir", trained, *words, "--device", "cpu", "--dtype", "float32")
    assert text == output("reference.py", "--ckpt_dir", trained, *words)
    output("convert.py", "to_hf", trained, tmp_path / "hf")
    output("convert.py", "from_hf", tmp_path / "hf", tmp_path / "meta")
    output("llama31.py", "train", "--ckpt_dir", tmp_path / "hf", "--out_dir", tmp_path / "more", *flags)
    for folder in trained, tmp_path / "hf", tmp_path / "meta", tmp_path / "more" / "step_000002":
        assert_same_tokenizer(folder, source)
        assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}


def write_chats(path, *answer):
    rows = [{"messages": [dict(role="user", content=text), *answer]} for text in sentences(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_the_commands_go_the_whole_way_on_chats_of_llama_3s_format(tokenizer, tmp_path):
    write_checkpoint(tmp_path / "meta", random_model(vocab_size=560, **WIDE).half(), tokenizer=tokenizer)
    output("convert.py", "to_hf", tmp_path / "meta", tmp_path / "source")
    output("tiny_stories.py", "text", "--input", write_chats(tmp_path / "chats.jsonl", DIALOG[-1]),
           "--data_dir", tmp_path / "data", "--tokenizer_path", tmp_path / "source" / "tokenizer.json",
           "--num_workers", "1")
    output("llama31.py", "train", "--ckpt_dir", tmp_path / "source", "--out_dir", tmp_path / "out",
           "--train_data", tmp_path / "data" / "train.bin", "--batch_size", "2", "--seq_len", "128",
           "--steps", "1", "--device", "cpu", "--compile=False")
    trained = tmp_path / "out" / "step_000001"
    answers = output("llama31.py", "--ckpt_dir", trained, "--max_gen_len", "4", "--device", "cpu",
                     "--prompt_file", write_chats(tmp_path / "questions.jsonl"), "--nocompile")
    assert answers.count('"assistant"') == 30
    output("convert.py", "to_hf", trained, tmp_path / "hf")
    output("convert.py", "from_hf", tmp_path / "hf", tmp_path / "again")
    for name in "tokenizer.json", "tokenizer_config.json":
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == open(tokenizer.model_path, "rb").read()
    assert {tensor.dtype for tensor in weights(tmp_path / "again").values()} == {torch.float16}
    assert_same_weights(tmp_path / "again", trained)
