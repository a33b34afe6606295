"""Loss and perplexity by position in the text, as a module of the `evaluate` library; load it by the path of this folder."""

import math
from collections.abc import Sequence

import datasets
import evaluate


def loss_by_position(losses: Sequence[Sequence[float]], edges: Sequence[int]) -> list[dict[str, float]]:
    """
    Mean loss in nats, and its exponential, of the positions from `start` to `stop` (exclusive), per bucket that holds tokens.

    Args:
        losses: per row, the negative log-likelihood of its tokens from position 1 on (the first is predicted by nothing).
        edges: bounds of the buckets, ascending; the last bucket goes on to the end.

    Raises:
        ValueError: if the bounds do not ascend.
    """
    if not len(edges) or any(first >= second for first, second in zip(edges, edges[1:])):
        raise ValueError(
            f"`edges` is {list(edges)}, but must ascend and hold at least one bound, such as [0, 1024, 2048]"
        )
    buckets = []
    longest = max((len(row) for row in losses), default=0) + 1
    for start, stop in zip(edges, [*edges[1:], longest]):
        inside = [loss for row in losses for loss in row[max(start - 1, 0) : max(stop - 1, 0)]]
        if inside:
            mean = sum(inside) / len(inside)
            buckets.append(
                {
                    "start": start,
                    "stop": min(stop, longest),
                    "loss": mean,
                    "perplexity": math.exp(mean),
                    "tokens": len(inside),
                }
            )
    return buckets


class LossByPosition(evaluate.Metric):
    """`compute(predictions=..., edges=...)`: per row, the losses of its tokens from position 1 on."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Loss and perplexity by position in the text.",
            citation="",
            inputs_description=loss_by_position.__doc__,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, edges) -> dict[str, list]:
        buckets = loss_by_position(predictions, edges)
        return {
            name: [bucket[name] for bucket in buckets] for name in ("start", "stop", "loss", "perplexity", "tokens")
        }
