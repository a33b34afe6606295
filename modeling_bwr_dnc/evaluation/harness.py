"""
BWR-DNC for lm-evaluation-harness (`pip install lm-eval`): long input is read in blocks into a StateBank, in bounded memory, and
a context that several requests share is read once.

    python -m modeling_bwr_dnc.evaluation.harness run --model bwr_dnc --model_args pretrained=DIR --tasks lambada_openai
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm
from transformers import AutoTokenizer

from ..blocks import BLOCK_LENGTH
from ..modeling_bwr_dnc import BwrDncForCausalLM
from ..state_bank import StateBankCache
from .measuring import token_losses


@register_model("bwr_dnc")
class BwrDncHarness(TemplateLM):
    """
    Args:
        pretrained: folder or Hub name of a model with its tokenizer.
        block_length: tokens read at a time.
        max_gen_toks: tokens to generate where a task does not say.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        dtype: str = "float32",
        block_length: int = BLOCK_LENGTH,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if device.startswith("cuda") and not torch.cuda.is_available():
            # The harness asks for a GPU unless told otherwise.
            device = "cpu"
        model = BwrDncForCausalLM.from_pretrained(pretrained, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.block_length, self.max_gen_toks = int(block_length), int(max_gen_toks)
        self._device = torch.device(device)

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        return self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False).input_ids

    @torch.no_grad()
    def read(
        self, token_ids: Sequence[int], cache: StateBankCache | None = None
    ) -> tuple[torch.Tensor, StateBankCache]:
        """Logits [V] after `token_ids`, and the memory of all read so far."""
        if cache is None:
            cache = StateBankCache(config=self.model.config)
        ids = torch.tensor([list(token_ids)], device=self.device)
        for block in ids.split(self.block_length, dim=1):
            logits = self.model(block, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1].float(), cache

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        read: tuple[list[int], torch.Tensor, StateBankCache] | None = None
        for (context, continuation), context_ids, continuation_ids in tqdm(requests, disable=disable_tqdm):
            context_ids = list(context_ids) or [self.prefix_token_id]
            if read is None or read[0] != context_ids:
                read = (context_ids, *self.read(context_ids))
            _, logits, memory = read
            logits = logits[None]
            if len(continuation_ids) > 1:
                ids = torch.tensor([continuation_ids[:-1]], device=self.device)
                rest = self.model(ids, past_key_values=memory.clone(), use_cache=True).logits[0]
                logits = torch.cat((logits, rest.float()))
            target = torch.tensor(continuation_ids, device=self.device)
            log_probability = -F.cross_entropy(logits, target, reduction="sum").item()
            is_greedy = bool((logits.argmax(-1) == target).all())
            results.append((log_probability, is_greedy))
            self.cache_hook.add_partial("loglikelihood", (context, continuation), results[-1])
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each read once from its beginning, however long."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm):
            (text,) = request.args
            ids = torch.tensor([[self.prefix_token_id, *self.tok_encode(text)]])
            results.append(-token_losses(self.model, ids, self.block_length).double().sum().item())
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        results = []
        for request in tqdm(requests, disable=disable_tqdm):
            context, options = request.args
            results.append(self._generate(self.tok_encode(context) or [self.prefix_token_id], dict(options)))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def _generate(self, context_ids: list[int], options: dict) -> str:
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        max_new_tokens = int(options.pop("max_gen_toks", self.max_gen_toks))
        if not options.get("do_sample", False):
            options = {"do_sample": False}
        memory = StateBankCache(config=self.model.config)
        if len(context_ids) > 1:
            _, memory = self.read(context_ids[:-1], memory)
        last = torch.tensor([context_ids[-1:]], device=self.device)
        written = self.model.generate(
            last,
            attention_mask=torch.ones_like(last),
            past_key_values=memory,
            max_new_tokens=max_new_tokens,
            stop_strings=until or None,
            tokenizer=self.tokenizer,
            pad_token_id=self.eot_token_id,
            **options,
        )
        text = self.tokenizer.decode(written[0, 1:], skip_special_tokens=True)
        for stop in until:
            text = text.split(stop)[0]
        return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
