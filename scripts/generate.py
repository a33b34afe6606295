"""Continue a text, or answer as a chat model, with a memory that can be kept for the next time.

Examples:
  python -m scripts.generate --model smollm2-bwr-dnc --prompt "The sea was" --max-new-tokens 40
  python -m scripts.generate --model smollm2-bwr-dnc --chat --prompt "What is the capital of France?"
  python -m scripts.generate --model smollm2-bwr-dnc --prompt-file book.txt --state memory     (reads it, keeps the memory)
  python -m scripts.generate --model smollm2-bwr-dnc --prompt "In short," --state memory       (goes on, new tokens only)
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TextStreamer

from modeling_bwr_dnc import StateBankCache
from modeling_bwr_dnc.evaluation.reading import chat_turn, close_chat_turn, continue_text, read_tokens
from scripts.command_line import add_device, check_least, check_output, gather_prompt, load_model, load_state, run


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of a BWR-DNC model")
    parser.add_argument("--prompt", help="text to continue, or the message with --chat")
    parser.add_argument("--prompt-file", help="UTF-8 text file to read first; with neither, standard input is read")
    parser.add_argument(
        "--chat", action="store_true", help="wrap the text as a user's message (needs a chat template)"
    )
    parser.add_argument("--state", help="folder of a memory: resumed if it exists, and saved there at the end")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens to write at most (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="share of the likeliest tokens to sample from (0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--no-memory", action="store_true", help="sinks and window only, for comparison")
    add_device(parser)
    return parser


def generate(arguments: argparse.Namespace) -> None:
    check_least(arguments, max_new_tokens=1, temperature=0)
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top-p is {arguments.top_p}, but must be above 0 and at most 1")
    if not -(2**63) <= arguments.seed < 2**63:
        raise ValueError(f"--seed is {arguments.seed}, but must fit into 64 bits")
    if arguments.state is not None:
        check_output(arguments.state)
    text = gather_prompt(arguments.prompt, arguments.prompt_file)
    model, tokenizer = load_model(arguments.model, arguments.device)
    # A folder is left empty when its first memory could not be saved.
    is_first = arguments.state is None or not Path(arguments.state).exists() or not os.listdir(arguments.state)
    cache = StateBankCache(config=model.config) if is_first else load_state(arguments.state, model)
    if arguments.no_memory and any(any(state.settings.memory_slots) for state in cache.states):
        raise ValueError(
            f"the memory at {arguments.state} has slots, which --no-memory would empty for good; leave --no-memory away, name another "
            "folder, or leave --state away to compare"
        )
    if arguments.chat:
        token_ids = chat_turn(tokenizer, text, is_first)
    else:
        token_ids = tokenizer(text, return_tensors="pt", add_special_tokens=is_first, verbose=False).input_ids

    torch.manual_seed(arguments.seed)
    reading = {"use_memory": False} if arguments.no_memory else {}
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    quick = token_ids.shape[1] <= 4 * model.config.segment_length
    with tqdm(total=token_ids.shape[1] - 1, unit="tok", desc="reading", file=sys.stderr, disable=quick) as progress:
        written = continue_text(
            model,
            tokenizer,
            token_ids,
            cache,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            on_progress=progress.update,
            max_new_tokens=arguments.max_new_tokens,
            **reading,
            **sampling,
        )
    if arguments.state is not None:
        if arguments.chat:
            read_tokens(model, close_chat_turn(tokenizer, written), cache, **reading)
        cache.save_pretrained(arguments.state)
        began = "a new memory" if is_first else "resumed"
        print(
            f"[{began}: {token_ids.shape[1]:,} tokens read, {written.shape[1]:,} written; {cache.get_seq_length():,} in all, "
            f"kept in {cache.nbytes / 2**20:.1f} MiB at {arguments.state}]",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(build_parser(), generate)
