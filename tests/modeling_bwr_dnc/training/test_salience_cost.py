"""A cost of being salient pushes down what nothing needs, and with a margin nothing else."""

import torch
from torch import nn

from modeling_bwr_dnc.training.salience_cost import SalienceCost


class Layer(nn.Module):
    """Whatever has a memory whose salience logits are what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Module()
        self.layer.memory = nn.Module()
        self.layer.memory.salience = nn.Identity()

    def forward(self, salience):
        return self.layer.memory.salience(salience)


def gradients(margin: float) -> torch.Tensor:
    """Of a loss that wants the first of three salience logits greater, the second less, and does not know the third; and its cost."""
    model, logits = Layer(), torch.tensor([-4.0, -4.0, -4.0], requires_grad=True)
    cost = SalienceCost(model, margin)
    with cost.listening():
        salience = model(logits)
    (0.01 * (salience[1] - salience[0]) + 3 * cost.take()).backward()
    assert model(logits) is logits and cost.take() == 0.0  # it listens no more
    return logits.grad


def test_without_a_margin_everything_is_pushed_the_less_the_lower_it_is():
    low = torch.tensor(-4.0).sigmoid().item()
    torch.testing.assert_close(gradients(0.0), torch.tensor([low - 0.01, low + 0.01, low]))


def test_with_a_margin_what_the_loss_pulls_up_is_left_alone_and_the_rest_pushed_so_far_below_zero():
    full = torch.tensor(4.0).sigmoid().item()
    torch.testing.assert_close(gradients(8.0), torch.tensor([-0.01, full + 0.01, full]))
