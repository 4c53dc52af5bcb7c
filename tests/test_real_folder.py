"""SmolLM2-135M-Instruct as a Hugging Face folder: texts, a chat and a finetune, as transformers has them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hugging_face import hugging_face
from tiny import output, read_log, sentences

import llama31
import tiny_stories
from llama31 import DistributedShardedDataLoader, Llama
from plumbing import files

pytestmark = pytest.mark.weights
PROMPTS = ["Water", "The capital of France is", "Im Jahr 1923 fuhr die „Zoë“ über den See. 🚢"]
MESSAGES = ["What is the capital of France?", "And of Italy?"]
T = 256  # more than any of the chats has
CHATS = [[{"role": "user", "content": f"{sentence} Say it again."},
          {"role": "assistant", "content": sentence},
          {"role": "user", "content": "Once more, please."},
          {"role": "assistant", "content": f"{sentence}\n\nNumber {number}."}]
         for number, sentence in enumerate(sentences(100))]


@pytest.fixture(scope="module")
def folder(smollm2_dir, smollm2_tokenizer, tmp_path_factory):
    """The folder as transformers saves it, in bfloat16."""
    folder = tmp_path_factory.mktemp("SmolLM2")
    model = Llama.build(smollm2_dir, device="cpu", dtype="bfloat16", compile=False).model
    saved = hugging_face(model.args, model.state_dict())
    saved.config.eos_token_id = saved.generation_config.eos_token_id = smollm2_tokenizer.eos_token_id
    saved.save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def vocabulary(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    """The folder of the chats' token files."""
    data = tmp_path_factory.mktemp("chats")
    with open(data / "chats.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": chat}) + "\n" for chat in CHATS)
    tiny_stories.text(input=[str(data / "chats.jsonl")], data_dir=str(data), val_fraction=0.1,
                      tokenizer_path=str(folder / "tokenizer.json"))
    return data


def continued(theirs, vocabulary, ids, new=30):
    """The text that transformers finds likeliest after some ids, up to the end of a turn."""
    made = theirs.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids):]
    return vocabulary.decode(made, skip_special_tokens=True)


def learned(vocabulary, ids):
    """Which ids of a chat are targets, told by its marks alone: an answer's words and its <|im_end|>."""
    header = vocabulary.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end = vocabulary.convert_tokens_to_ids("<|im_end|>")
    is_target = np.zeros(len(ids), dtype=bool)
    for i in range(len(ids)):
        if ids[i:i + len(header)] == header:
            begin = i + len(header)
            is_target[begin:ids.index(end, begin) + 1] = True
    return is_target


def windows_by_hand(vocabulary, path):
    """A list of chats for each window: in the file's order, as many as fit into T + 1 tokens."""
    known = {}
    for chat in CHATS:
        ids = vocabulary.apply_chat_template(chat, return_dict=False)
        known[tuple(ids)] = ids
    header = files.read_header(path)
    ids, _, starts = files.split_marks(files.read_tokens(path, 0, header.num_tokens), header.version)
    windows = []
    room = 0
    for document in np.split(ids, np.flatnonzero(starts)[1:]):
        chat = known.pop(tuple(document.tolist()))
        if len(chat) > room:
            windows.append([])
            room = T + 1
        windows[-1].append(chat)
        room -= len(chat)
    return windows, len(known)


def test_texts_are_continued_as_by_transformers(folder, theirs, vocabulary):
    llama = Llama.build(folder, device="cpu", dtype="float32")
    answers = llama.text_completion(PROMPTS, 30, temperature=0)
    expected = [continued(theirs, vocabulary, vocabulary.encode(prompt)) for prompt in PROMPTS]
    assert [answer["generation"] for answer in answers] == expected


def test_a_conversation_is_that_of_transformers(folder, theirs, vocabulary):
    dialog, expected = [], []
    for message in MESSAGES:
        dialog.append({"role": "user", "content": message})
        ids = vocabulary.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        expected.append(continued(theirs, vocabulary, ids))
        dialog.append({"role": "assistant", "content": expected[-1]})
    assert "Paris" in expected[0] and "Rome" in expected[1]
    said = output("chat.py", "--ckpt_dir", folder, "--temperature", 0, "--max_gen_len", 30,
                  "--device", "cpu", "--dtype", "float32", input="\n".join(MESSAGES) + "\n")
    assert said == "".join(f"{answer}\n" for answer in expected)


def test_windows_of_chats_are_those_made_by_hand(vocabulary, data):
    seen = 0
    for split in "train.bin", "val.bin":
        windows, unseen = windows_by_hand(vocabulary, data / split)
        seen += len(CHATS) - unseen
        loader = DistributedShardedDataLoader(str(data / split), 1, T, 0, 1)
        assert loader.ntok_total == sum(len(chat) for window in windows for chat in window)
        for window in windows:
            ids = [i for chat in window for i in chat]
            is_target = np.concatenate([learned(vocabulary, chat) for chat in window])
            begins = np.cumsum([0, *map(len, window[:-1])])
            x, y, starts = (tensor[0].tolist() for tensor in loader.next_batch(starts=True))
            assert x[:len(ids)] == ids[:T]
            expected = [i if target else -100 for i, target in zip(ids, is_target, strict=True)][1:]
            assert y == expected + [-100] * (T - len(expected))
            assert np.flatnonzero(starts[:len(ids)]).tolist() == [i for i in begins if i < T]
    assert seen == len(CHATS)


def test_a_finetune_begins_with_their_loss_and_keeps_the_tokenizer(
        folder, theirs, vocabulary, data, tmp_path):
    llama31.train(ckpt_dir=str(folder), train_data=str(data / "train.bin"), out_dir=str(tmp_path),
                  batch_size=2, seq_len=T, steps=2, lr=1e-5, device="cpu", dtype="float32", compile=False)
    nats, counted = 0.0, 0
    for chat in sum(windows_by_hand(vocabulary, data / "train.bin")[0][:2], []):
        with torch.inference_mode():
            logits = theirs(torch.tensor([chat])).logits[0, :-1]
        is_target = torch.from_numpy(learned(vocabulary, chat))[1:]
        nats += float(F.cross_entropy(logits, torch.tensor(chat[1:]), reduction="none")[is_target].sum())
        counted += int(is_target.sum())
    assert read_log(tmp_path)[0]["loss"] == pytest.approx(nats / counted, rel=1e-5)
    trained = Llama.build(tmp_path / "step_000002", device="cpu")
    assert {p.dtype for p in trained.model.parameters()} == {torch.bfloat16}
    assert trained.tokenizer.encode_dialog(CHATS[0][:3]) == vocabulary.apply_chat_template(
        CHATS[0][:3], add_generation_prompt=True, return_dict=False)
