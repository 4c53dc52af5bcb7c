"""A conversation with an instruct model in the terminal, in Llama 3's chat format.

    python chat.py --ckpt_dir Llama-3.1-8B-Instruct --system "Answer in one sentence."
"""

import contextlib
import sys

from llama31 import Llama, Sampler
from plumbing import cli, fast
from tokenizer import TextStream


class Conversation:
    """A dialog with a model, whose KV caches keep what they read: no token is read twice.

    tokens: the dialog so far, of which the caches hold the first `held`. system: its system prompt, if any.
    settings: as in Llama.steps; turn i = 0, 1, … draws with seed + i. ValueError: max_seq_len is too short
    for the system prompt.
    """

    def __init__(self, llama, system=None, max_gen_len=256, seed=Sampler.seed, **settings):
        self.llama = llama
        self.max_gen_len = max_gen_len
        self.seed = seed
        self.settings = settings
        self.system = [] if system is None else [{"role": "system", "content": system}]
        least = llama.tokenizer.encode_dialog([*self.system, {"role": "user", "content": ""}])
        if len(least) >= llama.max_seq_len:
            raise ValueError(f"max_seq_len is {llama.max_seq_len}; expected more than {len(least)}, as many "
                             "as the system prompt and an empty message take")
        llama.generate([least], min(max_gen_len, 0), seed=seed, **settings)  # names what is out of range
        self.caches = llama.new_caches(1)
        self.held = 0
        self.reset()

    def reset(self):
        """Forgets everything but the system prompt."""
        self.tokens = self.llama.tokenizer.encode_dialog(self.system, generation_prompt=False)
        self.held = min(self.held, len(self.tokens))
        self.turn = 0

    def answer(self, text, write):
        """Reads a user's message and writes the answer piece by piece; returns what cut it short, or "".

        Whatever ends the answer, even an exception, what was said so far stays in the dialog. A message too
        long for what is left of the context changes nothing.
        """
        tokenizer = self.llama.tokenizer
        room = self.llama.max_seq_len
        message = tokenizer.encode_message({"role": "user", "content": text})
        message += tokenizer.encode_header("assistant")
        if len(self.tokens) + len(message) >= room:
            return (f"the context is full: {len(self.tokens)} tokens so far, {len(message)} for this "
                    f"message, {room} in all; /reset starts anew")
        text_stream = TextStream(tokenizer)
        cut = f"stopped at --max_gen_len {self.max_gen_len}"
        self.tokens += message
        try:
            for _, [token] in self.llama.steps([self.tokens.copy()], self.max_gen_len, caches=self.caches,
                                               start_pos=[self.held], seed=self.seed + self.turn,
                                               **self.settings):
                self.held = len(self.tokens)  # all but the new token
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
            self.tokens.append(tokenizer.eot_id)  # read with the next message
            self.turn += 1


def note(text):
    """Tells the user what isn't an answer."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def chat(*, ckpt_dir: str, system: str | None = None, tokenizer_path: str | None = None,
         max_seq_len: int | None = None, max_gen_len: int = 256,
         temperature: float = Sampler.temperature, top_p: float = Sampler.top_p, top_k: int = Sampler.top_k,
         min_p: float = Sampler.min_p, seed: int = Sampler.seed, device: str | None = None,
         dtype: str | None = None, compile: bool = False, quantize: str | None = None):
    """A conversation with the model of a checkpoint directory: every line is a message, answered at once.

    /reset starts anew with the same system prompt, /exit or Ctrl-D leaves, Ctrl-C stops an answer, which
    stays as far as it got. max_seq_len: the tokens a conversation can take; None: as in params.json, but at
    most 8192, as the whole KV cache is made at the start. compile, quantize: see llama31.py.
    """
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size=1, device=device, dtype=dtype,
                        compile=compile, quantize=quantize)
    fast.keep_freed_memory(llama.model.norm.weight.device)
    if max_seq_len is None:
        llama.max_seq_len = min(llama.max_seq_len, 8192)
    if llama.tokenizer is None:
        raise ValueError(f"{ckpt_dir} has no tokenizer.model; put it there or give --tokenizer_path")
    conversation = Conversation(llama, system, max_gen_len, seed, temperature=temperature, top_p=top_p,
                                top_k=top_k, min_p=min_p)
    if sys.stdin is None:  # closed
        return
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (gives input() its line editing)
        sys.stdin.reconfigure(errors="replace")  # a stray byte ends no conversation
        note("/reset starts anew, /exit leaves, Ctrl-C stops an answer")
    while True:
        answering = False
        try:
            line = input("> " if terminal else "")
            command = line.strip()
            if command == "/exit":
                return
            elif command == "/reset":
                conversation.reset()
                note("a new conversation")
            elif line.startswith("/"):
                note(f"no command {command}: /reset or /exit; after a space it is a message")
            elif command:
                answering = True
                if cut := conversation.answer(line, lambda piece: print(piece, end="", flush=True)):
                    note(cut)
        except EOFError:
            if terminal:
                print()  # the shell's prompt gets its own line
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            print(flush=True)
            note("stopped" if answering else "/exit or Ctrl-D leaves")


if __name__ == "__main__":
    cli.run({"chat": chat}, default="chat")
