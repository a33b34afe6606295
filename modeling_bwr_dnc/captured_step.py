"""
A training step as one CUDA graph. A segment takes a hundred small operations per layer, and a GPU that gets them one after the other waits
for the host most of the time; shapes depend on positions alone and nothing is read back, so they can be recorded once and
launched together.
"""

import torch
from transformers import PreTrainedModel

# Runs before recording: libraries allocate what they need, and gradients come into being.
WARM_UPS = 2


class CapturedStep:
    """
    Forward and backward pass of one training step, recorded once: every call is a single launch.

    After a call each parameter's `.grad` holds the gradients of that call alone; they must not be set to None
    (`zero_grad(set_to_none=True)`). An optimizer works on them as ever. With a module in the model that reads values back, or
    whose shapes depend on them, recording fails with torch's error.

    Args:
        model: a language model on a CUDA device; it is left in training mode.
        inputs: what `model` is called with, tensors on that device, `labels` among them. Later ones have these shapes and types; their
            values do not count. Masks and `position_ids` are read by the host, so rows must be full.
        autocast: type of mixed precision, or None.

    Raises:
        ValueError: if the model is not on a CUDA device, or the inputs hold more than ids and labels.
    """

    def __init__(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], autocast: torch.dtype | None = None):
        if model.device.type != "cuda":
            raise ValueError(
                f"the model is on {model.device.type!r}, but CUDA graphs need a CUDA device; train without"
            )
        if set(inputs) != {"input_ids", "labels"}:
            raise ValueError(
                f"the inputs are {', '.join(sorted(inputs))}, but a recorded step takes input_ids and labels: what the host reads, "
                "such as masks, would stay as it was; leave the others out"
            )
        self.model = model.train()
        self.autocast = autocast
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.seed = torch.zeros((), dtype=torch.int64, device=model.device)
        self.takes_seed = "state_bank_attention" in (getattr(model.config, "layer_types", None) or ())
        current, side = torch.cuda.current_stream(model.device), torch.cuda.Stream(model.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._run()
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, which load data, may go on allocating.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = self._run()

    def _run(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)
        options = {"retention_noise_seed": self.seed} if self.takes_seed else {}
        # Casts of weights must be recorded, too, not remembered.
        with torch.autocast("cuda", dtype=self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            loss = self.model(**self.inputs, use_cache=False, **options).loss
        loss.backward()
        return loss.detach()

    def __call__(self, inputs: dict[str, torch.Tensor], noise_seed: int = 0) -> torch.Tensor:
        """
        The loss [] of a batch, which the next call overwrites; gradients are in the parameters.

        Args:
            noise_seed: of the noise on what a state bank keeps; pass the number of the step.

        Raises:
            ValueError: for inputs of other names or shapes than those recorded.
        """
        shapes, recorded = ({name: tuple(t.shape) for name, t in each.items()} for each in (inputs, self.inputs))
        if shapes != recorded:
            raise ValueError(
                f"the inputs have the shapes {shapes}, but those recorded have {recorded}; record another step for them"
            )
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.seed.fill_(noise_seed)
        self.graph.replay()
        return self.loss
