"""What sampling prints: completions while their tokens come, and the answers to a file of dialogs.

A model's Llama is a value here, of which stream, steps and texts are used.
"""

import json
import os
import sys
import time

from tqdm import tqdm

from plumbing import fast
from plumbing.cli import expect
from plumbing.devices import name_of
from plumbing.documents import read_records
from plumbing.json_stream import json_values
from plumbing.narrow import weight_type
from plumbing.prompts import holds_dialogs, read_prompts, say_cut, say_spelled
from plumbing.records import FIELD
from plumbing.text_files import open_text

BATCH = 8  # dialogs that are answered at once
EXPECTED = "expected messages or conversations, the last one the user's"


def chosen(model):
    """What was chosen for a model where that was free, in one line."""
    return (f"weights in {weight_type(model)}, arithmetic in {name_of(model.dtype)}, on "
            f"{model.device}")


def make_ready(llama, compile):
    """Says what was chosen for a Llama and, unless compile is False, compiles its inference where it works.

    The whole process then keeps what tensors free for the next ones.
    """
    print(chosen(llama.model), file=sys.stderr)
    llama.reader = None if compile is False else fast.compile_inference(llama.model)
    fast.keep_freed_memory(llama.model.device)


def read(prompt, prompt_file, special, default):
    """(None, texts to complete), see read_prompts; or (rows, their dialogs to answer), see read_dialogs."""
    if prompt is None and prompt_file is not None and holds_dialogs(prompt_file):
        expect(not special, "special", special, "left out, as a dialog's texts spell no special tokens")
        return read_dialogs(prompt_file)
    return None, read_prompts(prompt, prompt_file, default)

# -----------------------------------------------------------------------------
# The steps of Llama.steps, timed and collected


class Stopwatch:
    """Times generation around its steps: the first reads the prompts, the others decode."""

    def __init__(self, prompt_tokens):
        self.prompt_tokens = prompt_tokens
        self.prefill_seconds = 0.0
        self.decoded_tokens = 0
        self.decode_seconds = 0.0

    def over(self, steps):
        """The same steps of Llama.steps, timed."""
        start = time.perf_counter()
        for i, (logits, drawn) in enumerate(steps):
            seconds = time.perf_counter() - start
            if i == 0:
                self.prefill_seconds = seconds
            else:
                self.decode_seconds += seconds
                self.decoded_tokens += sum(token is not None for token in drawn)
            yield logits, drawn
            start = time.perf_counter()

    def report(self):
        """One line: tokens read and decoded, and how many per second."""
        read_rate = self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0
        decode_rate = self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0
        return (f"prefill {self.prompt_tokens:,} tokens at {read_rate:,.1f}/s, decode "
                f"{self.decoded_tokens:,} tokens at {decode_rate:,.1f}/s")


def collected(steps, rows):
    """The same steps of Llama.steps; each prompt's tokens are appended to its row as they come."""
    for logits, drawn in steps:
        for row, token in zip(rows, drawn, strict=True):
            if token is not None:
                row.append(token)
        yield logits, drawn

# -----------------------------------------------------------------------------
# Completions


def print_completions(llama, prompts, special, max_gen_len, stop, **sampling):
    """Prints each prompt with its completion: the first as its tokens come, then the others.

    special: as in Llama.encode. Standard error gets how many special tokens are read as characters, how many
    completions the context has cut, and the speed.
    """
    prompt_tokens = llama.encode(prompts, special)
    if not special:
        say_spelled(prompts, llama.required_tokenizer.special_tokens)
    watch = Stopwatch(sum(len(tokens) for tokens in prompt_tokens))
    rows = [[] for _ in prompts]  # the tokens of each completion
    steps = llama.steps(prompt_tokens, max_gen_len, **sampling)
    shown = prompts[0]  # printed with its first piece, as errors come before that
    later = [["\n", prompt] for prompt in prompts[1:]]
    for first, *others in llama.stream(collected(watch.over(steps), rows), stop):
        print(shown + first, end="", flush=True)
        shown = ""
        for text, piece in zip(later, others, strict=True):
            text.append(piece)
    print(shown)
    for text in later:
        print("".join(text))
    sys.stdout.flush()
    say_cut(count_cut(llama, prompt_tokens, rows, max_gen_len, stop), len(rows), llama.max_seq_len)
    print(watch.report(), file=sys.stderr)


def count_cut(llama, prompt_tokens, rows, max_gen_len, stop):
    """How many rows of new tokens neither a stop nor max_gen_len has ended, but the end of the context."""
    cut = 0
    for tokens, row in zip(prompt_tokens, rows, strict=True):
        is_full = len(tokens) + len(row) >= llama.max_seq_len
        is_stopped = any(text in llama.required_tokenizer.decode(row) for text in stop)
        cut += is_full and not is_stopped and len(row) < max_gen_len
    return cut

# -----------------------------------------------------------------------------
# Answers to dialogs


def read_dialogs(path):
    """The rows of a JSON Lines file, and the messages of each.

    A row has messages, or ShareGPT's conversations, that end where an answer is due. ValueError names the
    file, the row and the fault.
    """
    path = os.fspath(path)
    rows = []

    def collect(values):
        for row in values:
            rows.append(row)
            yield row

    with open_text(path) as file:
        records = list(read_records(path, "dialog", collect(json_values(file)), FIELD, EXPECTED))
    expect(records, path, "empty", "a dialog in every line")
    for number, (row, record) in enumerate(zip(rows, records, strict=True)):
        if row.get(key_of(row)) is None or "messages" not in record:
            raise ValueError(f"{path}, dialog {number}: found keys {', '.join(row)}, {EXPECTED}")
        if unwritable(row):
            raise ValueError(f"{path}, dialog {number}: found a number that JSON has not, such as NaN")
        if not record["messages"] or record["messages"][-1]["role"] == "assistant":
            raise ValueError(f"{path}, dialog {number}: found "
                             f"{'an answer as the last message' if record['messages'] else 'no message'}, "
                             f"{EXPECTED}")
    if tools := sum(record.get("tools", False) for record in records):
        print(f"{path}: {tools} dialogs define tools, which are not read", file=sys.stderr)
    return rows, [record["messages"] for record in records]


def unwritable(row):
    """Whether a row holds NaN or an infinity, which Python reads, but which is no JSON."""
    try:
        json.dumps(row, allow_nan=False)
    except ValueError:
        return True
    return False


def key_of(row):
    """Under which key a row has its messages, where it has some."""
    return "conversations" if row.get("messages") is None else "messages"


def with_answer(row, text):
    """The row with the answer appended, in the form that its messages have."""
    key = key_of(row)
    is_turn = "from" in row[key][-1]
    answer = {"from": "gpt", "value": text} if is_turn else {"role": "assistant", "content": text}
    return row | {key: [*row[key], answer]}


def as_line(row):
    """A row as JSON, in ASCII where standard output can't encode its characters."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return json.dumps(row)
    return line


def print_answers(llama, path, rows, dialogs, max_gen_len, stop, seed, **sampling):
    """Prints each row with the answer to its dialog, as JSON Lines in order, a batch after the other.

    Dialog i draws with seed + i, so that its answer depends on no other. ValueError names a dialog that is
    too long or that the chat template refuses, before any is answered.
    """
    tokenizer = llama.required_tokenizer
    prompts = []
    for number, dialog in enumerate(dialogs):
        try:
            prompts.append(tokenizer.encode_dialog(dialog))
        except ValueError as error:
            raise ValueError(f"{path}, dialog {number}: {error}") from None
        length = len(prompts[-1])
        expect(length < llama.max_seq_len, f"{path}, dialog {number}", f"{length} tokens long",
               f"fewer than the {llama.max_seq_len} of the context; shorten it, or raise --max_seq_len")
    expect(seed + len(rows) <= 2**62, "seed", seed, f"at most 2**62 - {len(rows)}: each dialog has its own")
    cut = 0
    with tqdm(total=len(rows), unit="dialog") as bar:
        for begin in range(0, len(rows), BATCH):
            batch = prompts[begin:begin + BATCH]
            answers = [[] for _ in batch]  # their tokens
            steps = llama.steps(batch, max_gen_len, seed=seed + begin, **sampling)
            texts = llama.texts(collected(steps, answers), len(batch), stop)
            for row, text in zip(rows[begin:begin + BATCH], texts, strict=True):
                with tqdm.external_write_mode():
                    print(as_line(with_answer(row, text)), flush=True)
                bar.update()
            cut += count_cut(llama, batch, answers, max_gen_len, stop)
    say_cut(cut, len(rows), llama.max_seq_len)
