"""A conversation with an instruct model in the terminal, by its chat template or in Llama 3's format.

    python chat.py --ckpt_dir Llama-3.1-8B-Instruct --system "Answer in one sentence."
"""

import contextlib
import itertools
import os
import sys

from llama31 import Llama, Sampler
from plumbing import cli, parallel
from plumbing.answers import make_ready
from plumbing.prompts import piped_message, typed_message
from tokenizer import TextStream


class Conversation:
    """A dialog with a model. The KV caches stay from turn to turn, so that no token is read twice.

    Where a chat template rewrites earlier turns, as those do that drop an earlier answer's reasoning, the
    dialog is read again from the first token that changes. settings: as in Llama.steps; turn i = 0, 1, …
    draws with seed + i. ValueError: max_seq_len is too short for the system prompt, or a chat template
    refuses it.
    """

    def __init__(self, llama, system=None, max_gen_len=256, seed=Sampler.seed, **settings):
        self.llama = llama
        self.max_gen_len = max_gen_len
        self.seed = seed
        self.settings = settings
        self.system = [] if system is None else [{"role": "system", "content": system}]
        least = llama.required_tokenizer.encode_dialog([*self.system, {"role": "user", "content": ""}])
        cli.expect(len(least) < llama.max_seq_len, "max_seq_len", llama.max_seq_len,
                   f"more than {len(least)}, as many as the system prompt and an empty message take")
        # Nothing is generated here, but a setting that is out of range is named before the first message.
        llama.generate([least], min(max_gen_len, 0), seed=seed, **settings)
        self.caches = llama.new_caches(1)
        self.tokens = []  # The last prompt and its answer.
        self.held = 0  # The caches hold the first so many of self.tokens.
        self.reset()

    def reset(self):
        """Forgets everything but the system prompt."""
        self.dialog = list(self.system)
        self.turn = 0

    def answer(self, text, write):
        """Reads a user's message and writes the answer piece by piece; returns what cut it short, or "".

        Whatever ends the answer, even an exception, the dialog keeps the part that was written. A message
        that is too long for the rest of the context changes nothing.
        """
        tokenizer = self.llama.tokenizer
        room = self.llama.max_seq_len
        message = {"role": "user", "content": text}
        prompt = tokenizer.encode_dialog([*self.dialog, message], begun=self.tokens)
        if len(prompt) >= room:
            return (f"the context is full: {len(prompt)} tokens with this message, {room} in all; /reset "
                    "starts anew")
        unchanged = len(os.path.commonprefix([self.tokens, prompt]))
        self.held = min(self.held, unchanged, len(prompt) - 1)  # The last one is read for what follows it.
        self.tokens = prompt.copy()
        text_stream = TextStream(tokenizer)
        cut = f"stopped at --max_gen_len {self.max_gen_len}"
        try:
            for _, [token] in self.llama.steps([prompt], self.max_gen_len, caches=self.caches,
                                               start_pos=[self.held], seed=self.seed + self.turn,
                                               **self.settings):
                self.held = len(self.tokens)  # the model has read everything but the token it just drew
                if token is None:
                    cut = ""
                    break
                self.tokens.append(token)
                write(text_stream.push(token))
            if len(self.tokens) >= room:
                cut = f"the context of {room} tokens is full; /reset starts anew"
            write(text_stream.push(None) + "\n")
            return cut
        finally:
            answer = tokenizer.decode(self.tokens[len(prompt):])
            self.dialog += [message, {"role": "assistant", "content": answer}]
            self.turn += 1


def note(text):
    """Prints to standard error, so that standard output has nothing but answers."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def chat(*, ckpt_dir: str, system: str | None = None, tokenizer_path: str | None = None,
         max_seq_len: int | None = None, max_gen_len: int = 256,
         temperature: float = Sampler.temperature, top_p: float = Sampler.top_p, top_k: int = Sampler.top_k,
         min_p: float = Sampler.min_p, repetition_penalty: float = Sampler.repetition_penalty,
         seed: int = Sampler.seed, device: str | None = None,
         dtype: str | None = None, compile: bool | None = None, quantize: str | None = None):
    """A conversation with the model of a checkpoint directory: every line is a message, answered at once.

    At a terminal, lines that are pasted together are one message. /reset starts anew with the same system
    prompt, /exit or Ctrl-D leaves, and Ctrl-C stops an answer, of which the dialog keeps the part that was
    written.

    Args:
        ckpt_dir: checkpoint directory of an instruct model
        system: system prompt, in which \\n, \\t and \\\\ are a line break, a tab and a backslash; None: none
        tokenizer_path: tokenizer.model or tokenizer.json to use; None: the checkpoint's own
        max_seq_len: most tokens of a conversation; None: the model's own, but at most 8192, to save memory
        max_gen_len: most tokens of an answer
        temperature: below 1 makes likely tokens likelier; 0 always takes the likeliest
        top_p: draw only from the fewest tokens that together have this probability
        top_k: draw only from so many of the likeliest tokens; 0: all
        min_p: draw only from tokens at least this fraction as likely as the likeliest
        repetition_penalty: above 1 makes tokens that the dialog has so far less likely
        seed: the same seed and messages give the same answers
        device: cuda, cuda:1, mps or cpu; None: the first of these that is there
        dtype: float32, bfloat16 or float16; None: what the device multiplies fast, with weights as stored
        compile: run faster; None: where it works, the first time after some seconds; --nocompile: never
        quantize: int8, in half of bfloat16's memory; None: weights stay as they are
    """
    _, processes = parallel.launched()
    cli.expect(processes == 1, "torchrun's number of processes", processes,
               "1, as a terminal talks to one; `llama31.py sample --prompt_file` answers by several")
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size=1, device=device, dtype=dtype,
                        compile=False, quantize=quantize)
    make_ready(llama, compile)
    if max_seq_len is None:  # The KV cache for the whole context is allocated at the start.
        llama.max_seq_len = min(llama.max_seq_len, 8192)
    system = None if system is None else cli.unescape(system)
    conversation = Conversation(llama, system, max_gen_len, seed, temperature=temperature, top_p=top_p,
                                top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty)
    if sys.stdin is None:  # Whoever started this process has closed it.
        return
    terminal = sys.stdin.isatty()
    # At a terminal, a byte that isn't UTF-8 must not end the conversation; in a file it is an error.
    sys.stdin.reconfigure(errors="replace" if terminal else "surrogateescape")
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has no readline.
            import readline  # noqa: F401  (its import alone gives input() line editing)
        note("/reset starts anew, /exit leaves, Ctrl-C stops an answer")
    for number in itertools.count(1):
        answering = False
        try:
            message = typed_message() if terminal else piped_message(number)
            command = "" if "\n" in message else message.strip()
            if command == "/exit":
                return
            elif command == "/reset":
                conversation.reset()
                note("a new conversation")
            elif command and message.startswith("/"):
                note(f"no command {command}: /reset or /exit; after a space it is a message")
            elif message.strip():
                answering = True
                cut = conversation.answer(message, lambda piece: print(piece, end="", flush=True))
                if cut:
                    note(cut)
        except EOFError:
            if terminal:
                print()  # so that the shell's prompt gets a line of its own
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(flush=True)
            note("stopped" if answering else "/exit or Ctrl-D leaves")


if __name__ == "__main__":
    cli.run({"chat": chat}, default="chat")
