"""A checkpoint directory as a model of EleutherAI's lm-eval, which has the tasks that evaluate.py has not.

    pip install lm-eval
    python tests/lm_eval_adapter.py --model llama31 --model_args ckpt_dir=DIR --tasks hellaswag

On a CPU --device cpu is needed, too, as lm-eval takes cuda for granted.
"""

import sys
from pathlib import Path

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # at the end, as lm-eval's tasks import another package of the name evaluate
from llama31 import Llama  # noqa: E402
from plumbing.scoring import score_endings  # noqa: E402


@register_model("llama31")
class Adapter(TemplateLM):
    def __init__(self, ckpt_dir, device=None, dtype=None, quantize=None, **_):
        super().__init__()
        self.llama = Llama.build(ckpt_dir, device=device, dtype=dtype, quantize=quantize)
        self.vocabulary = self.llama.required_tokenizer

    @property
    def eot_token_id(self):
        return self.vocabulary.eos_id

    @property
    def prefix_token_id(self):
        return self.eot_token_id if self.vocabulary.bos_id is None else self.vocabulary.bos_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.vocabulary.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        found = []
        for _, context, continuation in tqdm(requests, disable=disable_tqdm):
            [nats] = score_endings(self.llama, [(context + continuation, len(context))])
            found.append((-nats, False))  # Whether it is what greedy decoding gives is not found out.
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError("evaluate.py text scores whole texts")

    def generate_until(self, requests, disable_tqdm=False):
        def answer(context, settings):
            return self.llama.text_completion([context], settings.get("max_gen_toks", 256), temperature=0,
                                              stop=settings.get("until", ()))[0]["generation"]
        return [answer(*request.args) for request in tqdm(requests, disable=disable_tqdm)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate
    cli_evaluate()
