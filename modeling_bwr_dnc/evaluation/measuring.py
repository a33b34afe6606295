"""
Measuring a language model on long input, in blocks, so that memory does not grow with the length if the model's state does not.

Shapes: `B` rows, `T` tokens, `V` ids.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..blocks import BLOCK_LENGTH, read_blocks
from ..settings import settings_changed
from ..tasks import IGNORED, Task
from .metrics.answer_accuracy.answer_accuracy import answer_accuracy
from .metrics.loss_by_position.loss_by_position import loss_by_position
from .policies import policy_settings

# Tokens whose logits exist at the same time.
LOGITS_AT_ONCE = 256


@torch.no_grad()
def read_losses(
    model: PreTrainedModel, input_ids: torch.Tensor, block_length: int = BLOCK_LENGTH
) -> Iterator[tuple[torch.Tensor, object]]:
    """
    Read `input_ids` [B, T] block by block; gives the negative log-likelihood in nats of the token after each one in the block,
    [B, block], on the CPU (one less in the last block), and the cache after it.
    """
    head = model.get_output_embeddings()
    for start, hidden_states, cache in read_blocks(model, input_ids, block_length):
        targets = input_ids[:, start + 1 : start + 1 + block_length].to(hidden_states.device)
        losses = [
            F.cross_entropy(head(part).float().transpose(1, 2), target, reduction="none").cpu()
            for part, target in zip(
                hidden_states[:, : targets.shape[1]].split(LOGITS_AT_ONCE, 1), targets.split(LOGITS_AT_ONCE, 1)
            )
        ]
        yield torch.cat(losses, dim=1), cache


def token_losses(model: PreTrainedModel, input_ids: torch.Tensor, block_length: int = BLOCK_LENGTH) -> torch.Tensor:
    """Negative log-likelihood in nats of every token but the first, [B, T - 1], on the CPU."""
    return torch.cat([losses for losses, _ in read_losses(model, input_ids, block_length)], dim=1)


@torch.no_grad()
def predicted_answers(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, block_length: int = BLOCK_LENGTH
) -> list[list[int]]:
    """
    Most likely ids at the labelled places of every row [B, T], given the true ones before: all are right exactly if greedy
    decoding writes the answer.
    """
    head = model.get_output_embeddings()
    answers: list[list[int]] = [[] for _ in input_ids]
    for start, hidden_states, _ in read_blocks(model, input_ids, block_length):
        wanted = labels[:, start + 1 : start + 1 + hidden_states.shape[1]] != IGNORED
        for row, mask in enumerate(wanted):
            places = mask.nonzero().squeeze(1).to(hidden_states.device)
            if len(places):
                answers[row] += head(hidden_states[row, places]).argmax(-1).tolist()
    return answers


def task_accuracy(model: PreTrainedModel, task: Task, num_rows: int, batch_size: int = 8) -> dict[str, float]:
    """
    `exact` and `token` accuracy, in [0, 1], and the number of `answers`, on rows 0 to `num_rows` of a task.

    Labels without a gap are one answer; `exact` is the share of answers whose tokens are all right.
    """
    predictions: list[list[int]] = []
    references: list[list[int]] = []
    for first in range(0, num_rows, batch_size):
        input_ids, labels = map(torch.from_numpy, task.batch(range(first, min(first + batch_size, num_rows))))
        for said, row in zip(predicted_answers(model, input_ids, labels), labels):
            places = (row != IGNORED).nonzero().squeeze(1)
            starts = ((places.diff() > 1).nonzero().squeeze(1) + 1).tolist()
            bounds = list(zip([0, *starts], [*starts, len(places)]))
            predictions += [said[start:stop] for start, stop in bounds]
            references += [row[places[start:stop]].tolist() for start, stop in bounds]
    return answer_accuracy(predictions, references) | {"answers": len(references)}


# ---------------------------------------------------------------------------------------------------------------------
# Measurements: flat records, one per point, each as soon as it is known; a point that cannot be is refused before the first
# ---------------------------------------------------------------------------------------------------------------------


def points(policies: Sequence[str], lengths: Sequence[int], full_limit: int | None = None) -> list[tuple[str, int]]:
    """Every policy with every length, but `full` only with those up to a limit, if there is one."""
    return [
        (policy, length)
        for policy in policies
        for length in lengths
        if policy != "full" or full_limit is None or length <= full_limit
    ]


def measure_loss(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    policies: Sequence[str],
    edges: Sequence[int],
    full_limit: int | None = None,
) -> Iterator[dict]:
    """
    Loss by position, under each policy.

    Args:
        input_ids [B, T]: text that the model was not trained on.
        edges: bounds of the buckets of positions, ascending.
        full_limit: the longest text that the policy `full` is run on; it gets the beginning of longer ones.
    """
    for policy in policies:
        length = input_ids.shape[1]
        if policy == "full" and full_limit is not None:
            length = min(length, full_limit)
        if length < 2:
            continue
        with settings_changed(model, **policy_settings(model, policy, length)):
            losses = token_losses(model, input_ids[:, :length])
        for bucket in loss_by_position(losses.tolist(), edges):
            yield {"policy": policy, **bucket}


def measure_depths(
    model: PreTrainedModel,
    task: Task,
    policies: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    num_rows: int,
    full_limit: int | None = None,
) -> Iterator[dict]:
    """Accuracy of a task with a `depth`, by length and depth, under each policy."""
    tasks = [
        ({"policy": policy, "length": length, "depth": depth}, replace(task, length=length, depth=depth))  # type: ignore[call-arg]
        for policy, length in points(policies, lengths, full_limit)
        for depth in depths
    ]
    return _accuracies(model, tasks, num_rows)


def measure_lengths(
    model: PreTrainedModel,
    task: Task,
    policies: Sequence[str],
    lengths: Sequence[int],
    num_rows: int,
    full_limit: int | None = None,
) -> Iterator[dict]:
    """Accuracy of a task by length, under each policy."""
    tasks = [
        ({"policy": policy, "length": length}, replace(task, length=length))
        for policy, length in points(policies, lengths, full_limit)
    ]
    return _accuracies(model, tasks, num_rows)


def measure_pairs_and_slots(
    model: PreTrainedModel,
    task: Task,
    policies: Sequence[str],
    pairs: Sequence[int],
    slots: Sequence[int],
    num_rows: int,
) -> Iterator[dict]:
    """Accuracy of a task with `num_pairs` by the pairs of a row and the raw slots of the model, compressed levels off."""
    tasks = [
        ({"policy": policy, "slots": num_slots, "pairs": num_pairs}, replace(task, num_pairs=num_pairs))  # type: ignore[call-arg]
        for num_slots in slots
        for policy in policies
        for num_pairs in pairs
    ]
    return _accuracies(model, tasks, num_rows)


def _accuracies(model: PreTrainedModel, tasks: Sequence[tuple[dict, Task]], num_rows: int) -> Iterator[dict]:
    """Accuracy of each task, under the policy, and with the raw slots, if any, of the point that it stands for."""
    for point, task in tasks:
        policy_settings(model, point["policy"], task.length)
        # Texts say only then that a length has no room for them.
        task.row(0)
    for point, task in tasks:
        budget = {"memory_slots": [point["slots"], 0, 0]} if "slots" in point else {}
        with (
            settings_changed(model, **budget),
            settings_changed(model, **policy_settings(model, point["policy"], task.length)),
        ):
            found = task_accuracy(model, task, num_rows)
        yield point | found
