"""A first run: convert SmolLM2-135M-Instruct, read a text much longer than its memory, and see what it keeps.

Everything goes to demo_output/: the model (ready for the Hub), the memory, and pictures of it. Run it again and the finished
conversion is reused.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import pipeline

import modeling_bwr_dnc
from modeling_bwr_dnc import StateBankCache
from modeling_bwr_dnc.conversion import convert_checkpoint, obtain_smollm2
from modeling_bwr_dnc.conversion.checkpoint import RECORD_FILE
from modeling_bwr_dnc.conversion.hub_folder import check_model_folder
from modeling_bwr_dnc.evaluation.inspection import draw_held_text, draw_memory, report_table
from modeling_bwr_dnc.evaluation.reading import continue_text, read_tokens
from modeling_bwr_dnc.retrofit import Fact, hide_facts, sentence_ends
from modeling_bwr_dnc.texts import python_manual
from scripts.command_line import check_least, check_output, load_model, run

PACKAGE = Path(modeling_bwr_dnc.__file__).parent
CARDS = Path(__file__).parent.parent / "model_cards"
CARD = CARDS / "smollm2-135m-instruct-bwr-dnc.md"
ADAPTER = CARDS / "smollm2-135m-instruct-memory.safetensors"
# Two processes are compared, here and by the reader: a CPU says the same twice.
DEVICE = "cpu"
GREEDY: dict = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
QUESTION = "What is the capital of France?"
# Hidden in the text that is read, far from its end, and asked for there.
FACT = Fact(
    sentence="To open the vault, type 7F29B4 on the keypad.",
    question="What must one type to open the vault?",
    stem="To open the vault, type",
    answer="7F29B4",
)
FACT_PLACE = 1500
RESUMED_PROMPT = "\n\nIn Python, a list"

# Runs in a process that cannot import the package, from another directory: only the saved folder can make it work.
STRANGER = """
import sys
sys.modules["modeling_bwr_dnc"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_grad_enabled(False)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
sample = load_file(sys.argv[2])
difference = (model(sample["ids"]).logits - sample["logits"]).abs().max().item()
print(f"{type(model).__name__} from {type(model).__module__.split('.')[0]}: largest logit difference {difference:.1e}")
sys.exit(difference > 1e-4)
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="demo_output", help="folder for everything the demo makes (demo_output)")
    parser.add_argument("--num-tokens", type=int, default=8192, help="length of the text to read, in tokens (8192)")
    return parser


def demo(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    # More than a layer of the converted model holds.
    check_least(arguments, num_tokens=2048)
    check_output(arguments.output)
    output = Path(arguments.output)
    folder, state = output / "model", output / "state"

    heading("1. A pretrained model, converted")
    prepare_model(folder)
    model, tokenizer = load_model(str(folder), DEVICE)

    heading("2. Reading a text much longer than its memory")
    ids, place = text_with_fact(tokenizer, arguments.num_tokens)
    cache = StateBankCache(config=model.config)
    room = f"{model.config.max_keys:,} keys and values"
    print(
        f"Python's manual, {ids.shape[1]:,} tokens; window, sinks and slots of a layer have room for {room} at most."
    )
    sizes = []
    with tqdm(total=ids.shape[1], unit="tok", desc="reading") as progress:

        def on_progress(num_tokens: int) -> None:
            progress.update(num_tokens)
            sizes.append(f"{cache.nbytes / 2**20:.1f} MiB after {cache.get_seq_length():,}")

        read_tokens(model, ids[:, :-1], cache, on_progress)
        progress.update(1)
    print(f"Size of the memory: {sizes[len(sizes) // 2]} tokens, {sizes[-1]} tokens.")
    written = continue_text(model, tokenizer, ids[:, -1:], cache, max_new_tokens=48, **GREEDY)
    print(f"\n... {tokenizer.decode(ids[0, -40:])}>>>{tokenizer.decode(written[0])}")

    heading("3. A fact from far outside the window")
    print(f'Hidden at token {place:,} of the text: "{FACT.sentence}"')
    ask_for_fact(model, tokenizer, ids, cache)

    heading("4. A chat question, through the ordinary pipeline")
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device=DEVICE)
    turns = generator([{"role": "user", "content": QUESTION}], max_new_tokens=40, do_sample=False)[0]["generated_text"]
    print("\n".join(f"{turn['role']}: {turn['content']}" for turn in turns))

    heading("5. What the memory holds")
    print(report_table(cache))
    draw_memory(cache, output / "memory.png")
    draw_held_text(cache, tokenizer, output / "held_text.png")
    print(f"\npictures: {output / 'memory.png'} and {output / 'held_text.png'}")

    heading("6. Saved, and resumed in a new process with only the new tokens")
    cache.save_pretrained(state)
    resume_elsewhere(model, tokenizer, cache, folder, state)

    heading("7. A folder that loads anywhere, without this package")
    check_model_folder(folder)
    print("\n".join(f"{path.stat().st_size:>14,}  {path}" for path in sorted(folder.iterdir())))
    load_as_stranger(model, ids[:, :64], folder)

    print(f"\nDone in {time.perf_counter() - began:.0f} seconds. Go on with:")
    print(f'  python -m scripts.generate --model {folder} --state {state} --chat --prompt "What have you read?"')
    print(f"  python -m scripts.push_to_hub --model {folder} --repo owner/name --dry-run {output / 'hub'}")


def text_with_fact(tokenizer, num_tokens: int) -> tuple[torch.Tensor, int]:
    """The first `num_tokens` of Python's manual, with the fact between two of its sentences, [1, T], and the token it begins at."""
    ids = tokenizer(python_manual(), verbose=False).input_ids[:num_tokens]
    place = min(sentence_ends(tokenizer, ids), key=lambda end: abs(end - min(FACT_PLACE, num_tokens // 4)))
    return torch.tensor([hide_facts(tokenizer, ids, {place: FACT})[0][:num_tokens]]), place


def ask_for_fact(model, tokenizer, ids: torch.Tensor, cache: StateBankCache) -> None:
    """Ask for the fact: a copy of the memory, and one that has seen only the last window of the text `ids` [1, T]."""
    window = 2 * model.config.segment_length
    recent = StateBankCache(config=model.config)
    read_tokens(model, ids[:, -window:], recent)
    question = tokenizer(FACT.prompt, return_tensors="pt", add_special_tokens=False).input_ids
    for name, memory in (("with the memory", cache.clone()), (f"last {window} tokens only", recent)):
        said = continue_text(model, tokenizer, question, memory, max_new_tokens=8, **GREEDY)
        print(f"{name:>21}: {FACT.stem}>>>{(tokenizer.decode(said[0]).splitlines() or [''])[0]}")


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}\n{'-' * len(text)}", flush=True)


def prepare_model(folder: Path) -> None:
    """Convert SmolLM2 into `folder`, unless this version of code, card and adapter has done so before."""
    code, record_file = {path.name: path.read_bytes() for path in folder.glob("*.py")}, folder / RECORD_FILE
    is_current = record_file.is_file() and code == {
        path.name: path.read_bytes() for path in PACKAGE.glob("*.py") if path.name in code
    }
    if is_current and code and not any(is_newer(path, record_file) for path in (CARD, ADAPTER)):
        record = json.loads(record_file.read_text(encoding="utf-8"))
        print(f"{folder} was converted before, from {record['source']}; reusing it.")
        return
    source = obtain_smollm2()
    print(f"SmolLM2-135M-Instruct from {source}", flush=True)
    result = convert_checkpoint(source, folder, card=CARD, memory_adapter=ADAPTER, overwrite=folder.exists())
    print(f"{result.num_parameters:,} parameters, {result.num_memory_parameters:,} of them new, for the memory.")
    print(f"Proof: {result.proof}")


def is_newer(path: Path, other: Path) -> bool:
    return path.stat().st_mtime > other.stat().st_mtime


def resume_elsewhere(model, tokenizer, cache, folder: Path, state: Path) -> None:
    """Continue the saved memory in a new process, and compare with continuing here."""
    command = [sys.executable, "-m", "scripts.generate", "--prompt", RESUMED_PROMPT, "--max-new-tokens", "32"]
    command += ["--model", str(folder.resolve()), "--state", str(state.resolve()), "--device", DEVICE]
    there = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if there.returncode != 0:
        raise ValueError(f"the new process failed: {there.stderr.strip().splitlines()[-1]}")
    ids = tokenizer(RESUMED_PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    here = tokenizer.decode(continue_text(model, tokenizer, ids, cache.clone(), max_new_tokens=32, **GREEDY)[0])
    print(f"{RESUMED_PROMPT.strip()}>>>{there.stdout.rstrip()}")
    print(there.stderr.strip())
    is_same = there.stdout.strip() == here.strip()
    print(f"the same text as going on without stopping: {'yes' if is_same else 'NO'}")


def load_as_stranger(model, ids: torch.Tensor, folder: Path) -> None:
    """Load the folder with `trust_remote_code=True` in a process that cannot import the package; compare logits."""
    with tempfile.TemporaryDirectory() as elsewhere, torch.no_grad():
        sample = Path(elsewhere, "sample.safetensors")
        save_file({"ids": ids.contiguous(), "logits": model(ids).logits.contiguous()}, sample)
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(elsewhere, "modules")), "TQDM_DISABLE": "1"}
        command = [sys.executable, "-I", "-c", STRANGER, str(folder.resolve()), str(sample)]
        loaded = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment)
    if loaded.returncode != 0:
        raise ValueError(
            f"the folder did not load elsewhere: {(loaded.stderr.strip().splitlines() or [loaded.stdout])[-1]}"
        )
    print(f"loaded in {elsewhere}: {loaded.stdout.strip()}")


if __name__ == "__main__":
    run(build_parser(), demo)
