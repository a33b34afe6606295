"""Teach the memory of a converted model what to keep: fit its salience heads, and write them as a small memory adapter.

The weights of the source stay as they are. The model reads the texts once, with facts hidden in them that do not belong there; in
every layer, what tells the two apart becomes salience, by logistic regression (modeling_bwr_dnc/retrofit/salience.py). Then one number
per layer, how much more attention a salient slot gets, is fitted with gradients through questions and prose
(modeling_bwr_dnc/retrofit/boost.py), and, if asked for, the compressors through prose
(modeling_bwr_dnc/retrofit/compressor.py). The settings go into the adapter, and with it into the models that it is put into.

With --repeats a second head, in the same way, for what a text will say again: it lifts such tokens above others, but never above a
salience of 0, where facts begin. With --contents it lifts tables of contents, too (modeling_bwr_dnc/retrofit/contents.py).

After each of these the adapter is written, as far as it is taught. Compressors go on from those that the model has. With
--compressors-only nothing else is taught, but for --contents, which adds to what the second heads are: so a training can be continued.

Examples:
  python -m scripts.train_memory --model DIR --output memory.safetensors       (DIR: converted without an adapter)
  python -m scripts.train_memory --model DIR --output memory.safetensors --memory-slots 512 160 96 --compressor-steps 300
  python -m scripts.train_memory --model TAUGHT --output more.safetensors --compressor-steps 300 --compressors-only
  python -m scripts.convert --source smollm2 --output DIR --memory-adapter memory.safetensors
"""

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_bwr_dnc.conversion.memory_adapter import save_memory_adapter
from modeling_bwr_dnc.memory_parameters import memory_in_float32
from modeling_bwr_dnc.retrofit import fit_attention_boost, fit_compressor, fit_contents, fit_salience
from modeling_bwr_dnc.retrofit.boost import checked_lengths
from modeling_bwr_dnc.retrofit.compressor import checked_room
from modeling_bwr_dnc.texts import python_manual, read_text_file
from scripts.command_line import add_budget, add_device, check_least, check_output, load_model, run, use_budget

# Steps of training compressors after which the adapter is written, whole as it is.
SAVE_EVERY = 25


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.train_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of a converted model")
    parser.add_argument("--output", required=True, help="file to write, .safetensors")
    parser.add_argument(
        "--text", nargs="+", default=[], help="UTF-8 files to read; by default the Python language reference"
    )
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens to read of each text, at most (40000)")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        help="texts of about the same length to read side by side for the salience; more on a GPU (1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the facts and their places (0)")
    parser.add_argument(
        "--scale",
        type=float,
        default=0.001,
        help="of salience: twice its standard deviation over ordinary text, averaged (0.001)",
    )
    parser.add_argument(
        "--salience-scale",
        type=float,
        default=0.0006,
        help="salience at which a slot stands out in full, and gains all the attention that such slots gain (0.0006)",
    )
    parser.add_argument(
        "--repeats",
        type=float,
        default=0.0,
        help="standard deviation of a second head, for what a text says again word for word, in times of --scale; 0: none (0)",
    )
    parser.add_argument(
        "--repeats-layers", nargs=2, type=int, metavar="N", help="first and last layer in which that counts (all)"
    )
    parser.add_argument(
        "--contents",
        type=float,
        default=0.0,
        help="the same for tables of contents, made from the headings of the texts, in these layers; 0: none (0)",
    )
    parser.add_argument(
        "--pooling", type=int, default=17, help="tokens over which salience is averaged when slots are retained (17)"
    )
    parser.add_argument(
        "--boost", type=float, default=100.0, help="how often salience above 0 counts beside once (100)"
    )
    parser.add_argument(
        "--boost-steps",
        type=int,
        default=64,
        help="steps of fitting the attention that salient slots gain; 0: none (64)",
    )
    parser.add_argument(
        "--prose-weight",
        type=float,
        default=4.0,
        help="of the loss of prose beside that of answers, in these steps (4)",
    )
    parser.add_argument(
        "--compressor-steps",
        type=int,
        default=0,
        help="steps of training the compressors, for a budget with compressed levels (0)",
    )
    parser.add_argument(
        "--compressors-only",
        action="store_true",
        help="leave all but the compressors, and what --contents adds, as the model, converted with an adapter, has it",
    )
    parser.add_argument(
        "--stretch",
        type=int,
        default=1100,
        help="tokens of the stretch, from a random text and place, that a step of the compressors reads (1100)",
    )
    parser.add_argument(
        "--stretch-memory",
        nargs=4,
        type=int,
        metavar="N",
        default=[64, 96, 64, 32],
        help="what they are read with: segment and slots, so small that they fill the memory (64 96 64 32)",
    )
    parser.add_argument(
        "--copy-weight",
        type=float,
        default=1.0,
        help="of the loss of what a text says again word for word, beside that of all else, in these steps (1)",
    )
    parser.add_argument(
        "--fact-share",
        type=float,
        default=0.0,
        help="of these steps, in which facts are hidden and asked for (0); the shipped compressors: 0.3",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="of the way from the compressors as they were to the trained ones that is gone in the end (1); 0.5: their mean",
    )
    parser.add_argument("--learning-rate", type=float, default=0.001, help="of the compressors, at its height (0.001)")
    parser.add_argument(
        "--recency",
        type=float,
        default=0.0004,
        help="retention of a slot over one that is 1,024 tokens older (0.0004)",
    )
    add_budget(parser)
    add_device(parser)
    return parser


def train_memory(arguments: argparse.Namespace) -> None:
    # Small gradients decay into denormal numbers, which CPUs compute with many times slower.
    torch.set_flush_denormal(True)
    check(arguments)
    model, tokenizer = load_model(arguments.model, arguments.device)
    memory_in_float32(model)
    if not arguments.compressors_only:
        model.config.salience_pooling = arguments.pooling
        model.config.salience_boost, model.config.recency_weight = arguments.boost, arguments.recency
        model.config.attention_boost, model.config.salience_scale = 0.0, arguments.salience_scale
    use_budget(model, arguments)
    if not any(model.config.memory_slots):
        raise ValueError(
            f"the slots are {model.config.memory_slots}, so there is nothing to keep; give the budget that the memory will have "
            "(--memory-slots 512 160 96)"
        )
    if arguments.compressors_only and not (arguments.compressor_steps or arguments.contents):
        raise ValueError("--compressors-only leaves nothing to teach; say for how many --compressor-steps")
    if arguments.compressor_steps and not model.config.memory_slots[1]:
        raise ValueError(
            f"--compressor-steps is {arguments.compressor_steps}, but the slots are {model.config.memory_slots}, none of them "
            "compressed; give the budget that the memory will have (--memory-slots 512 160 96), or leave it out"
        )
    if arguments.repeats_layers is not None:
        first, last = arguments.repeats_layers
        if not 0 <= first <= last < model.config.num_hidden_layers:
            raise ValueError(
                f"--repeats-layers is {first} to {last}, but the layers are 0 to {model.config.num_hidden_layers - 1}"
            )
    texts = [read_text_file(path) for path in arguments.text] or [python_manual()]
    tokens = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    check_texts(model, tokens, arguments)
    begin = time.monotonic()
    if not arguments.compressors_only:
        teach_salience(model, tokenizer, tokens, arguments)
        # What has been learned so far outlives an interruption of what follows.
        save_memory_adapter(model, arguments.output)
    if arguments.contents:
        teach_contents(model, tokenizer, texts, arguments)
        save_memory_adapter(model, arguments.output)
    if arguments.boost_steps and not arguments.compressors_only:
        teach_boosts(model, tokenizer, tokens, arguments)
        save_memory_adapter(model, arguments.output)
    if arguments.compressor_steps:
        teach_compressors(model, tokenizer, tokens, arguments)
    names = save_memory_adapter(model, arguments.output)
    size = Path(arguments.output).stat().st_size
    print(f"wrote {arguments.output}: {len(names)} tensors, {size:,} bytes, in {time.monotonic() - begin:.0f} seconds")


def check(arguments: argparse.Namespace) -> None:
    """Raises `ValueError` for what is wrong whatever the model."""
    if Path(arguments.output).exists():
        raise ValueError(f"{arguments.output} exists already; choose another file, or remove it")
    check_least(arguments, tokens=1, batch_size=1, boost_steps=0, compressor_steps=0, repeats=0, contents=0, stretch=2)
    check_output(Path(arguments.output).parent)
    for name in ("scale", "salience_scale", "learning_rate", "copy_weight"):
        value = getattr(arguments, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be a number above 0")
    if not 0 <= arguments.prose_weight < float("inf"):
        raise ValueError(f"--prose-weight is {arguments.prose_weight}, but must be a number of at least 0")
    if not 0 < arguments.share <= 1 or not 0 <= arguments.fact_share <= 1:
        raise ValueError(
            f"--share is {arguments.share} and --fact-share {arguments.fact_share}, but both must be at most 1, and --share above 0"
        )


def check_texts(model, texts: list[list[int]], arguments: argparse.Namespace) -> None:
    """Raises `ValueError` for what only a later part of the teaching would find too short."""
    if arguments.boost_steps and not arguments.compressors_only:
        checked_lengths(model, texts)
    if arguments.compressor_steps:
        segment_length, *memory_slots = arguments.stretch_memory
        checked_room(model, texts, arguments.stretch, segment_length, memory_slots)


def second_head_layers(arguments: argparse.Namespace) -> range | None:
    """Layers in which second heads count; None: all."""
    layers = arguments.repeats_layers
    return None if layers is None else range(layers[0], layers[1] + 1)


def teach_salience(model, tokenizer, texts: list[list[int]], arguments: argparse.Namespace) -> None:
    with tqdm(
        total=sum(min(len(token_ids), arguments.tokens) for token_ids in texts), unit="tok", desc="reading", delay=1
    ) as progress:

        def on_progress(num_tokens: int) -> None:
            # The hidden facts come on top of the texts.
            progress.total = max(progress.total, progress.n + num_tokens)
            progress.update(num_tokens)

        gaps = fit_salience(
            model,
            tokenizer,
            texts,
            seed=arguments.seed,
            scale=arguments.scale,
            repeats=arguments.repeats,
            repeat_layers=second_head_layers(arguments),
            num_tokens=arguments.tokens,
            batch_size=arguments.batch_size,
            on_progress=on_progress,
        )
    show_by_layer("how far facts stand out, in standard deviations of ordinary text", gaps.items(), digits=1)


def teach_contents(model, tokenizer, texts: list[str], arguments: argparse.Namespace) -> None:
    with tqdm(unit="tok", desc="reading tables of contents", delay=1) as progress:
        gaps = fit_contents(
            model,
            tokenizer,
            texts,
            strength=arguments.contents * arguments.scale,
            layers=second_head_layers(arguments),
            seed=arguments.seed,
            on_progress=progress.update,
        )
    show_by_layer("how far tables of contents stand out, in standard deviations of other text", gaps.items(), digits=1)


def show_by_layer(what: str, numbers: Iterable[tuple[int, float]], digits: int) -> None:
    print(f"{what}, by layer:")
    print("  " + "  ".join(f"{layer}: {number:.{digits}f}" for layer, number in numbers), flush=True)


def show_step(progress: tqdm, **losses: float) -> None:
    progress.set_postfix({name: f"{loss:.2f}" for name, loss in losses.items()})
    progress.update()


def teach_boosts(model, tokenizer, texts: list[list[int]], arguments: argparse.Namespace) -> None:
    with (
        tqdm(unit="tok", desc="reading what is asked about", delay=1) as reading,
        tqdm(total=arguments.boost_steps, unit="step", desc="fitting the boosts", delay=1) as progress,
    ):
        boosts = fit_attention_boost(
            model,
            tokenizer,
            texts,
            seed=arguments.seed,
            num_steps=arguments.boost_steps,
            prose_weight=arguments.prose_weight,
            on_read=reading.update,
            on_step=lambda step, answers, prose: show_step(progress, answers=answers, prose=prose),
        )
    show_by_layer("attention that salient slots gain, in logits", enumerate(boosts), digits=2)


def teach_compressors(model, tokenizer, texts: list[list[int]], arguments: argparse.Namespace) -> None:
    segment_length, *memory_slots = arguments.stretch_memory
    with tqdm(total=arguments.compressor_steps, unit="step", desc="training the compressors", delay=1) as progress:

        def on_step(step: int, loss: float) -> None:
            show_step(progress, loss=loss)
            if (step + 1) % SAVE_EVERY == 0:
                # What an interrupted training has learned.
                save_memory_adapter(model, arguments.output)

        fit_compressor(
            model,
            texts,
            seed=arguments.seed,
            num_steps=arguments.compressor_steps,
            length=arguments.stretch,
            segment_length=segment_length,
            memory_slots=memory_slots,
            learning_rate=arguments.learning_rate,
            copy_weight=arguments.copy_weight,
            fact_share=arguments.fact_share,
            share=arguments.share,
            tokenizer=tokenizer,
            on_step=on_step,
        )


if __name__ == "__main__":
    run(build_parser(), train_memory)
