"""Check BWR-DNC on a CUDA device, in a minute: equality with the CPU, no synchronisation, fused attention, bfloat16, training, CUDA graphs.

Example:
  python -m scripts.cuda_smoke
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling_bwr_dnc import BwrDncConfig, BwrDncForCausalLM, StateBankCache
from modeling_bwr_dnc.training import CapturedStep
from scripts.command_line import run

# Sixteen segments: every level overflows.
NUM_TOKENS = 512
LAYERS = ["sink_window_attention", "state_bank_attention"]


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        "scripts.cuda_smoke", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def cuda_smoke(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device, and this checks nothing else; the test suite covers the CPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = [check.__name__ for check in CHECKS if not passes(check)]
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


def passes(check: Callable[[], str]) -> bool:
    passed = False
    try:
        outcome, passed = check(), True
    except Exception as error:
        outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"{'ok    ' if passed else 'FAILED'} {check.__name__}: {outcome}")
    return passed


def small_model(dtype: torch.dtype = torch.float32, device: str = "cuda") -> BwrDncForCausalLM:
    torch.manual_seed(0)
    config = BwrDncConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, segment_length=32, memory_slots=[64, 32, 16], layer_types=LAYERS * 2,
    )  # fmt: skip
    return BwrDncForCausalLM(config).to(device, dtype).eval()


def token_ids(batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch_size, NUM_TOKENS), generator=generator).cuda()


def gradients_of(model: BwrDncForCausalLM) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any operation that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def same_logits_as_on_the_cpu() -> str:
    """In float64, where rounding cannot move a cut."""
    model, ids = small_model(torch.float64), token_ids()
    found = model(ids).logits.cpu()
    difference = (model.cpu()(ids.cpu()).logits - found).abs().max().item()
    assert difference < 1e-9, f"largest difference {difference:.1e}"
    return f"largest difference {difference:.1e} in float64"


@torch.no_grad()
def no_synchronisation_while_reading_and_decoding() -> str:
    model, ids = small_model(), token_ids()
    with no_synchronisation():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        for _ in range(2 * model.config.segment_length):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    return f"{NUM_TOKENS} tokens read and {2 * model.config.segment_length} decoded"


@torch.no_grad()
def no_synchronisation_while_decoding_rows_at_different_positions() -> str:
    """Between two consolidations, which sort the rows."""
    model, ids = small_model(), token_ids()
    long = ids.view(1, -1)
    caches = [model(long[:, :length], use_cache=True).past_key_values for length in (NUM_TOKENS + 3, NUM_TOKENS + 9)]
    cache = StateBankCache.stack(caches)
    with no_synchronisation():
        for _ in range(model.config.segment_length // 2):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    return f"{model.config.segment_length // 2} tokens decoded"


def no_synchronisation_while_training() -> str:
    model, ids = small_model().train(), token_ids()
    with no_synchronisation():
        model(ids, labels=ids, use_cache=False).loss.backward()
    return f"forward and backward of {NUM_TOKENS} tokens"


def fused_attention_in_bfloat16() -> str:
    """Without the math backend, attention that no fused kernel takes raises."""
    model, ids = small_model(torch.bfloat16).train(), token_ids()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        with torch.no_grad():
            model.eval()(ids)
    gradients = gradients_of(model)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients), "not finite"
    return f"loss {loss.item():.3f}, {len(gradients)} finite gradients"


@torch.no_grad()
def bounded_memory() -> str:
    """What the allocator hands out for eight times the length grows by the ids and their hidden states at most."""
    model, peaks = small_model(torch.bfloat16), []
    for repeats in (2, 16):
        ids = token_ids(1).repeat(1, repeats)
        model(ids, logits_to_keep=1, use_cache=True, read_block_length=256)
        torch.cuda.reset_peak_memory_stats()
        cache = model(ids, logits_to_keep=1, use_cache=True, read_block_length=256).past_key_values
        peaks.append(torch.cuda.max_memory_allocated() - ids.nbytes)
        del cache
    assert peaks[1] <= 1.1 * peaks[0], f"{peaks[0]:,} bytes, then {peaks[1]:,}"
    return f"{peaks[0]:,} bytes at {2 * NUM_TOKENS} tokens, {peaks[1]:,} at {16 * NUM_TOKENS}"


def captured_training_step() -> str:
    """Loss and gradients of new batches and seeds are those of an ordinary step."""
    model, ids = small_model(), token_ids()
    batches = [(ids.roll(shift, 1), shift) for shift in (0, 5, 9)]
    step = CapturedStep(model, {"input_ids": ids, "labels": ids})
    worst = 0.0
    for batch, seed in batches:
        found = step({"input_ids": batch, "labels": batch}, noise_seed=seed).clone()
        gradients = [gradient.clone() for gradient in gradients_of(model)]
        for gradient in gradients_of(model):
            gradient.zero_()
        loss = model(batch, labels=batch, use_cache=False, retention_noise_seed=seed).loss
        loss.backward()
        differences = [(a - b).abs().max().item() for a, b in zip(gradients, gradients_of(model), strict=True)]
        worst = max(worst, *differences, (found - loss).abs().item())
    assert worst < 1e-4, f"largest difference {worst:.1e}"
    return f"loss and {len(gradients)} gradients of three batches: largest difference {worst:.1e}"


def generate() -> str:
    model, ids = small_model(torch.bfloat16), token_ids()[:, :100]
    tokens = model.generate(ids, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens.shape == (2, 200), tuple(tokens.shape)
    return f"{tokens.shape[1] - 100} tokens for each of {len(tokens)} rows"


CHECKS = (
    same_logits_as_on_the_cpu,
    no_synchronisation_while_reading_and_decoding,
    no_synchronisation_while_decoding_rows_at_different_positions,
    no_synchronisation_while_training,
    captured_training_step,
    fused_attention_in_bfloat16,
    bounded_memory,
    generate,
)


if __name__ == "__main__":
    run(build_parser(), cuda_smoke)
