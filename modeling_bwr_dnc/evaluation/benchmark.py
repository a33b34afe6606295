"""
BWR-DNC beside other models of its shape: time of training, prefill, decoding and starting, and the memory they take.

Timings are taken in one process, the models in turns (A B A B), after a warm-up; memory in a fresh process for each figure. A
measurement is a plain dictionary; `benchmark_report` turns them into ratios, tables and pictures.

    what      seconds                                           beside it
    train     one step: forward, backward, optimizer            gemm_share
    prefill   a prompt until its first new token                gemm_share, state_bytes
    decode    one token, mean over `decode_tokens` of them      bandwidth_share, longest_token_seconds
    memory    one training step, or reading, in a new process   peak_bytes
    cold      a new process until its first token               import_seconds, load_seconds, token_seconds
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel

from modeling_bwr_dnc import BwrDncConfig
from modeling_bwr_dnc.allocator import trim_freed_memory
from modeling_bwr_dnc.blocks import cache_name
from modeling_bwr_dnc.captured_step import CapturedStep
from modeling_bwr_dnc.evaluation import machine
from modeling_bwr_dnc.evaluation.machine import REPOSITORY, in_fresh_process, middle, timed
from modeling_bwr_dnc.evaluation.peers import (
    DEFAULT_PEERS,
    FULL,
    OURS,
    PEERS,
    READ_BLOCK_LENGTH,
    Peer,
    cache_nbytes,
    decoded_token_bytes,
    forward_flops,
)
from modeling_bwr_dnc.head_loss import head_gives_loss

# Lengths measured by default.
TRAINING_LENGTHS = (512, 2048, 8192)
PREFILL_LENGTHS = (512, 2048, 8192, 32768)
DECODE_LENGTHS = (512, 8192, 32768)
TRAINING_MEMORY_LENGTHS = (8192,)
READING_MEMORY_LENGTHS = (2048, 16384, 131072)
WARM_UP_LENGTH = 512
WARM_UP_TOKENS = 2
COLD_START_TOKENS = 8
# Of the rounds of one measurement, and of one model in one round.
POINT_SECONDS = 150.0

# Runs in a new process and imports nothing but what it measures.
COLD_START = """
import json, sys, time
began = time.perf_counter()
import torch
torch.set_num_threads(int(sys.argv[2]))
from {module} import {model}
imported = time.perf_counter()
model = {model}.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
with torch.no_grad():
    model(torch.arange({num_tokens})[None], logits_to_keep=1, use_cache=True).logits.argmax().item()
seconds = time.perf_counter()
print(json.dumps([imported - began, loaded - imported, seconds - loaded]))
"""
MODULES = {OURS: "modeling_bwr_dnc"}


# One turn of a model; gives its seconds.
Task = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """What all measurements of a run have in common."""

    config: BwrDncConfig
    models: tuple[str, ...] = DEFAULT_PEERS
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 5
    decode_tokens: int = 256
    optimizer: str = "adamw"
    seed: int = 0
    clock: str = "wall"
    cuda_graphs: bool = False

    def apply(self) -> None:
        """Process settings, the same for all models."""
        torch.set_num_threads(self.threads)
        torch.set_flush_denormal(True)
        transformers.logging.set_verbosity_error()

    def model(self, name: str) -> PreTrainedModel:
        torch.manual_seed(self.seed)
        return PEERS[name].build(self.config).to(self.device, getattr(torch, self.dtype))

    def timed(self, function: Callable[[], object]) -> float:
        return timed(function, self.device, self.clock)

    def token_ids(self, batch_size: int, length: int) -> torch.Tensor:
        """Random ids [batch_size, length]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.config.vocab_size, (batch_size, length), generator=generator).to(self.device)


# ---------------------------------------------------------------------------------------------------------------------
# What is timed
# ---------------------------------------------------------------------------------------------------------------------


def new_optimizer(model: PreTrainedModel, name: str) -> torch.optim.Optimizer | None:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if name == "adamw" else None


def training_step(
    model: PreTrainedModel, ids: torch.Tensor, loss_kind: str, optimizer: torch.optim.Optimizer | None
) -> None:
    """
    Forward, backward and, if there is an optimizer, its step; gradients are gone afterwards.

    Args:
        loss_kind: "plain": the model's own loss, over the logits of the whole input; "chunked": that of this package.
    """
    model.train()
    if loss_kind == "chunked":
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        with head_gives_loss(model.get_output_embeddings(), labels, chunk_length=256):
            loss = model(ids, use_cache=False).logits / labels.numel()
    else:
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def read(peer: Peer, model: PreTrainedModel, ids: torch.Tensor, cache=None) -> tuple[torch.Tensor, object]:
    """The most likely next token [B, 1] after `ids` [B, T], and the cache that holds them."""
    if model.training:
        # Asked first: this is timed, for every token, and a model has many modules.
        model.eval()
    name = cache_name(model)
    for block in ids.split(peer.read_block_length or ids.shape[1], dim=1):
        outputs = model(block, **{name: cache}, use_cache=True, logits_to_keep=1)
        cache = getattr(outputs, name)
    return outputs.logits[:, -1:].argmax(-1), cache


def decode(
    settings: Settings, peer: Peer, model: PreTrainedModel, token: torch.Tensor, cache, num_tokens: int
) -> list[float]:
    """Seconds of each of `num_tokens` greedy steps that continue `cache` with `token` [B, 1]."""
    seconds = []
    for _ in range(num_tokens):

        def step() -> None:
            nonlocal token
            token, _ = read(peer, model, token, cache)

        seconds.append(settings.timed(step))
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# What runs in a fresh process
# ---------------------------------------------------------------------------------------------------------------------


def memory_of_training(settings: Settings, name: str, length: int, loss_kind: str, uses_checkpointing: bool) -> dict:
    settings.apply()
    model = settings.model(name)
    if uses_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, optimizer = settings.token_ids(1, length), new_optimizer(model, settings.optimizer)
    # A step on a few tokens first: an optimizer makes its state in its first step, after what would have been the peak.
    training_step(model, ids[:, :WARM_UP_LENGTH], loss_kind, optimizer)
    return memory_while(settings, lambda: training_step(model, ids, loss_kind, optimizer))


def memory_of_reading(settings: Settings, name: str, length: int) -> dict:
    settings.apply()
    model, peer = settings.model(name), PEERS[name]
    if name != OURS:
        # Ours divides a prompt by itself; no other is charged with what its layers hold of a whole prompt for a moment.
        peer = replace(peer, read_block_length=READ_BLOCK_LENGTH)
    ids, caches = settings.token_ids(1, length), []
    read(peer, model, ids[:, :WARM_UP_LENGTH])
    found = memory_while(settings, lambda: caches.append(read(peer, model, ids)[1]))
    return found | {"state_bytes": cache_nbytes(caches[0])}


def memory_while(settings: Settings, function: Callable[[], object]) -> dict:
    """
    The peak of this process while `function` runs, and not while its model was built, where that can be told apart.

    Seconds are by the clock of `settings`, which are reported, and by the wall, by which the time limit goes.
    """
    includes_building = not machine.reset_peak_memory(settings.device)
    began = time.perf_counter()
    return {
        "seconds": settings.timed(function),
        "wall_seconds": time.perf_counter() - began,
        "peak_bytes": machine.peak_memory(settings.device),
        "peak_includes_building": includes_building,
    }


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


class Benchmark:
    """Measures within a time limit; what it cannot reach is named in `skipped`."""

    def __init__(self, settings: Settings, minutes: float, say: Callable[[str], None] = print):
        """
        Args:
            minutes: no measurement is begun that would probably end later than this; a fresh process is stopped then.
            say: told of every measurement when it is done.
        """
        settings.apply()
        self.settings, self.say = settings, say
        self.began, self.deadline = time.perf_counter(), time.perf_counter() + 60 * minutes
        self.load = machine.OtherLoad()
        # By what, model, length, batch size and variant: a point measured again takes the place of the earlier one.
        self.measurements: dict[tuple, dict] = {}
        self.skipped: dict[tuple, dict] = {}
        # Seconds that passed in the last turn, reported or not, by what was done, model, length and batch size.
        self.passed: dict[tuple[str, str, int, int], float] = {}
        self.models: dict[str, PreTrainedModel] = {}
        self.shapes: dict[str, PreTrainedModel] = {}
        self.parameters: dict[str, int] = {}
        self.warm: set[tuple] = set()
        dtype = getattr(torch, settings.dtype)
        self.limits = {
            "gemm_flops": machine.gemm_rate(settings.device, dtype, clock=settings.clock),
            "bandwidth_bytes": machine.memory_bandwidth(settings.device, clock=settings.clock),
        }

    def minutes_left(self) -> float:
        return (self.deadline - time.perf_counter()) / 60

    def model(self, name: str) -> PreTrainedModel:
        if name not in self.models:
            self.models[name] = self.settings.model(name)
            self.parameters[name] = self.models[name].num_parameters()
        return self.models[name]

    def results(self, command: str) -> dict:
        """Everything measured, with all that is needed to measure it again."""
        settings = {item.name: getattr(self.settings, item.name) for item in fields(self.settings)}
        names = {*self.settings.models, *(entry["model"] for entry in self.measurements.values())}
        settings |= {"config": self.settings.config.to_dict(), "models": [name for name in PEERS if name in names]}
        return {
            "command": command,
            "machine": machine.describe_machine(self.settings.device),
            "share_of_processors_used_by_others": self.load.share(),
            "minutes": (time.perf_counter() - self.began) / 60,
            "settings": settings,
            "parameters": self.parameters,
            "limits": self.limits,
            "measurements": list(self.measurements.values()),
            "skipped": [row for point, row in self.skipped.items() if point not in self.measurements],
        }

    # ------------------------------------------------------------------------------------------------------ bookkeeping

    def _is_done(self, what: str, length: int, batch_size: int) -> bool:
        """Whether there is nothing left to measure here: every model has its point, or was skipped."""
        points = [(what, name, length, batch_size, None) for name in self.settings.models]
        return all(point in self.measurements or point in self.skipped for point in points)

    def _note(self, what: str, model: str, length: int, batch_size: int, rounds: list[float], **more) -> None:
        seconds = middle(rounds)
        entry = {"what": what, "model": model, "length": length, "batch_size": batch_size, "seconds": seconds}
        self.measurements[what, model, length, batch_size, more.get("variant")] = entry | {"rounds": rounds} | more
        details = ", ".join(f"{key} {_shown(value)}" for key, value in more.items() if value is not None)
        self.say(f"{what} {model} {length:,} x {batch_size}: {seconds:.4g} s ({len(rounds)} rounds) {details}")

    def _expected(self, what: str, name: str, length: int, batch_size: int) -> float:
        """Seconds that will probably pass in a measurement, from the nearest shorter one; 0 if there is none."""
        known = [at for kind, model, *at in self.passed if (kind, model) == (what, name) and at[0] <= length]
        if not known:
            return 0.0
        tokens, rows = max(known)
        peer, model, config = PEERS[name], self._without_weights(name), self.settings.config
        now, then = (forward_flops(peer, model, config, count, num_logits=0) for count in (length, tokens))
        return self.passed[what, name, tokens, rows] * now / then * batch_size / rows

    def _without_weights(self, name: str) -> PreTrainedModel:
        if name not in self.shapes:
            with torch.device("meta"):
                self.shapes[name] = PEERS[name].build(self.settings.config)
        return self.shapes[name]

    def _seconds_left(self, what: str, name: str) -> float:
        """How long a measurement may take."""
        left = self.deadline - time.perf_counter()
        return left if what == "memory" and name == OURS else min(POINT_SECONDS, left)

    def _affordable(
        self, what: str, like: str, length: int, batch_size: int = 1, variant: str | None = None
    ) -> Iterator[str]:
        """Models for which there is time, judged by what was done `like` this; the others are noted as skipped."""
        for name in self.settings.models:
            expected, left = self._expected(like, name, length, batch_size), self._seconds_left(what, name)
            longest = PEERS[name].longest_training if like == "train" else None
            if left < 0:
                reason = "the time limit was reached"
            elif expected > left:
                reason = f"would take about {expected:.0f} s"
            elif longest is not None and length > longest:
                reason = "would take too much memory"
            else:
                yield name
                continue
            self._skip(what, name, length, batch_size, reason, variant)

    def _skip(
        self, what: str, name: str, length: int, batch_size: int, reason: str, variant: str | None = None
    ) -> None:
        skipped = {"what": what, "model": name, "length": length, "batch_size": batch_size, "reason": reason}
        self.skipped[what, name, length, batch_size, variant] = skipped | ({"note": variant} if variant else {})
        self.say(f"{what} {name} {length:,} x {batch_size} {variant or ''}: skipped, {reason}")

    def _in_turns(
        self,
        what: str,
        length: int,
        batch_size: int,
        names: Iterable[str],
        prepare: Callable[[str], Task],
        rounds: int,
    ) -> dict[str, list[float]]:
        """
        Values of every model's task, taken A B A B; one round at least, and no further one that would take too long.

        A model that does not fit in memory is skipped.

        Args:
            prepare: makes the task of a model, and does what goes before its first turn.
        """
        end = min(time.perf_counter() + POINT_SECONDS, self.deadline)
        tasks: dict[str, Task] = {}
        values: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            round_began = time.perf_counter()
            for name in list(values):
                try:
                    if name not in tasks:
                        tasks[name] = prepare(name)
                    began = time.perf_counter()
                    values[name].append(tasks[name]())
                    self.passed[what, name, length, batch_size] = time.perf_counter() - began
                except RuntimeError as error:
                    if not machine.is_out_of_memory(error):
                        raise
                    self._skip(what, name, length, batch_size, "does not fit in memory")
                    # With the model goes what was left of the step, such as gradients.
                    for held in (values, tasks, self.models):
                        held.pop(name, None)
            if time.perf_counter() - round_began > end - time.perf_counter():
                break
        return values

    # ----------------------------------------------------------------------------------------------------------- timing

    def training(self, length: int, batch_size: int = 1) -> None:
        """Training steps of every model, with its own loss, unless they are measured already."""
        if self._is_done("train", length, batch_size):
            return
        settings = self.settings
        ids, names = settings.token_ids(batch_size, length), self._affordable("train", "train", length, batch_size)
        inputs = {"input_ids": ids, "labels": ids}

        def prepare(name: str) -> Task:
            model = self.model(name)
            optimizer = new_optimizer(model, settings.optimizer)

            def step(ids: torch.Tensor) -> None:
                training_step(model, ids, "plain", optimizer)

            self._warm_up(("train", name, length), partial(step, ids[:1, :WARM_UP_LENGTH]))
            if not settings.cuda_graphs:
                return partial(settings.timed, partial(step, ids))
            captured = CapturedStep(model, inputs)

            def captured_step() -> None:
                captured(inputs)
                if optimizer is not None:
                    optimizer.step()

            return partial(settings.timed, captured_step)

        for name, rounds in self._in_turns("train", length, batch_size, names, prepare, settings.rounds).items():
            flops = 3 * batch_size * forward_flops(PEERS[name], self.model(name), settings.config, length, length)
            self._note(
                "train", name, length, batch_size, rounds, loss="plain", gemm_share=self._gemm_share(flops, rounds)
            )

    def reading(
        self, length: int, batch_size: int = 1, prefill_rounds: int | None = None, decodes: bool = True
    ) -> None:
        """Prefill (0 rounds: read once, not reported) and decoding after it, unless they are measured already."""
        prefills = prefill_rounds != 0 and not self._is_done("prefill", length, batch_size)
        decodes = decodes and not self._is_done("decode", length, batch_size)
        if not prefills and not decodes:
            return
        settings = self.settings
        ids = settings.token_ids(batch_size, length)
        names = self._affordable("prefill", "prefill", length, batch_size)
        num_rounds = (prefill_rounds or settings.rounds) if prefills else 1
        after: dict[str, tuple[torch.Tensor, object]] = {}

        def prepare(name: str) -> Task:
            peer, model = PEERS[name], self.model(name)
            self._warm_up(("read", name), partial(read, peer, model, ids[:1, :WARM_UP_LENGTH]))

            def task() -> float:
                # The cache of the round before goes first.
                after.pop(name, None)
                return settings.timed(lambda: after.update({name: read(peer, model, ids)}))

            return task

        read_rounds = self._in_turns("prefill", length, batch_size, names, prepare, num_rounds)
        for name in read_rounds if prefills else []:
            rounds, model, peer = read_rounds[name], self.model(name), PEERS[name]
            flops = batch_size * forward_flops(peer, model, settings.config, length, num_logits=1)
            self._note(
                "prefill", name, length, batch_size, rounds,
                gemm_share=self._gemm_share(flops, rounds), state_bytes=cache_nbytes(after[name][1]),
            )  # fmt: skip
        if decodes:
            self._decoding(length, batch_size, after)

    def _decoding(self, length: int, batch_size: int, after: dict[str, tuple[torch.Tensor, object]]) -> None:
        settings = self.settings
        tokens: dict[str, list[float]] = {name: [] for name in after}

        def decode_with(name: str, num_tokens: int) -> float:
            token, cache = after[name]
            seconds = decode(settings, PEERS[name], self.model(name), token, cache, num_tokens)
            tokens[name] += seconds
            return sum(seconds) / num_tokens

        def prepare(name: str) -> Task:
            # The first token after a full window consolidates it: the warm-up takes that on itself, so that as many
            # tokens as a segment is long hold one consolidation.
            decode_with(name, WARM_UP_TOKENS)
            tokens[name].clear()
            return partial(decode_with, name, per_round)

        per_round = -(-settings.decode_tokens // settings.rounds)
        for name, rounds in self._in_turns("decode", length, batch_size, after, prepare, settings.rounds).items():
            mean = sum(rounds) / len(rounds)
            state_bytes = cache_nbytes(after[name][1])
            nbytes = decoded_token_bytes(
                PEERS[name], self.model(name), settings.config, length, batch_size, state_bytes
            )
            self._note(
                "decode", name, length, batch_size, rounds,
                mean_seconds=mean, median_token_seconds=middle(tokens[name]), longest_token_seconds=max(tokens[name]),
                tokens=len(tokens[name]), bandwidth_share=nbytes / middle(tokens[name]) / self.limits["bandwidth_bytes"],
                state_bytes=state_bytes,
            )  # fmt: skip

    def _warm_up(self, key: tuple, function: Callable[[], object]) -> None:
        if key not in self.warm:
            self.warm.add(key)
            function()

    def _gemm_share(self, flops: float, rounds: list[float]) -> float:
        return flops / middle(rounds) / self.limits["gemm_flops"]

    # ----------------------------------------------------------------------------------------------------------- memory

    def training_memory(self, length: int, variants: Sequence[tuple[str, bool]]) -> None:
        """
        Peak memory of one training step of BWR-DNC and Llama, for `variants` of loss and of checkpointing.

        The loss "own" is what each is trained with: BWR-DNC, by this package, with the chunked one, Llama with the plain one.
        """
        for kind, uses_checkpointing in variants:
            label = f"{kind} loss, checkpointing {'on' if uses_checkpointing else 'off'}"
            for name in self._affordable("memory", "train", length, variant=label):
                if name not in (OURS, FULL):
                    continue
                loss_kind = kind if kind != "own" else "chunked" if name == OURS else "plain"
                self._in_child(memory_of_training, "train", name, length, (loss_kind, uses_checkpointing), label)

    def reading_memory(self, length: int) -> None:
        """Peak memory of reading a prompt, its time, and the bytes of state after it."""
        for name in self._affordable("memory", "prefill", length, variant="reading"):
            self._in_child(memory_of_reading, "prefill", name, length, (), "reading")

    def _in_child(self, function: Callable, like: str, name: str, length: int, arguments: tuple, variant: str) -> None:
        if ("memory", name, length, 1, variant) in self.measurements:
            return
        # What this process holds, or has freed and kept, would be missing there.
        self.models.clear()
        trim_freed_memory()
        try:
            found = in_fresh_process(
                function, self.settings, name, length, *arguments, timeout=self._seconds_left("memory", name)
            )
        except ValueError as error:
            self._skip("memory", name, length, 1, str(error), variant)
            return
        self.passed[like, name, length, 1] = found.pop("wall_seconds")
        self._note("memory", name, length, 1, [found.pop("seconds")], variant=variant, **found)

    # ------------------------------------------------------------------------------------------------------- cold start

    def cold_start(self) -> None:
        """Import, load and first token of BWR-DNC and Llama, each in a new process, on the CPU."""
        names = [name for name in (OURS, FULL) if name in self.settings.models]
        if time.perf_counter() > self.deadline:
            for name in names:
                self._skip("cold", name, COLD_START_TOKENS, 1, "the time limit was reached")
            return
        phases: dict[str, list[list[float]]] = {name: [] for name in names}
        with tempfile.TemporaryDirectory() as folder:

            def prepare(name: str) -> Task:
                self.settings.model(name).save_pretrained(Path(folder, name))
                return partial(start, name)

            def start(name: str) -> float:
                began = time.perf_counter()
                phases[name].append(start_cold(name, Path(folder, name), self.settings.threads))
                return time.perf_counter() - began

            # The first round brings the files into the system's cache.
            started = self._in_turns("cold", COLD_START_TOKENS, 1, names, prepare, 1 + self.settings.rounds)
        for name, rounds in started.items():
            warm = slice(1 if len(rounds) > 1 else 0, None)
            import_seconds, load_seconds, token_seconds = (middle(list(part)) for part in zip(*phases[name][warm]))
            self._note(
                "cold", name, COLD_START_TOKENS, 1, rounds[warm],
                import_seconds=import_seconds, load_seconds=load_seconds, token_seconds=token_seconds,
            )  # fmt: skip


def start_cold(name: str, folder: Path, threads: int) -> list[float]:
    """Seconds of import, load and first token of a saved model in a new process."""
    model_class = json.loads((folder / "config.json").read_text())["architectures"][0]
    program = COLD_START.format(
        module=MODULES.get(name, "transformers"), model=model_class, num_tokens=COLD_START_TOKENS
    )
    command = [sys.executable, "-c", program, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode != 0:
        raise ValueError(f"{model_class} did not start: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _shown(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
