"""Accuracy of answers of several tokens, as a module of the `evaluate` library; load it by the path of this folder."""

from collections.abc import Sequence

import datasets
import evaluate


def answer_accuracy(predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
    """
    `exact`: share of answers whose tokens are all right; `token`: share of right tokens; both in [0, 1].

    Raises:
        ValueError: if a prediction is not as long as its reference, or there is nothing to compare.
    """
    right = []
    for prediction, reference in zip(predictions, references, strict=True):
        if len(prediction) != len(reference) or not len(reference):
            raise ValueError(
                f"an answer has {len(prediction)} tokens and its reference {len(reference)}, but must have as many, and at "
                "least one; predict one token at every labelled place"
            )
        right.append([mine == theirs for mine, theirs in zip(prediction, reference, strict=True)])
    if not right:
        raise ValueError("there are 0 answers, but must be at least one")
    return {
        "exact": sum(map(all, right)) / len(right),
        "token": sum(map(sum, right)) / sum(map(len, right)),
    }


class AnswerAccuracy(evaluate.Metric):
    """`compute(predictions=..., references=...)`: the token ids of every answer."""

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Exact and token accuracy of answers of several tokens.",
            citation="",
            inputs_description=answer_accuracy.__doc__,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return answer_accuracy(predictions, references)
