"""Branches: modules that read a layer of the backbone in the student's own forward and are trained with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selfguide.diffusion.conditions import Condition
from selfguide.guidance.component import Component
from selfguide.models import assemble
from selfguide.networks.branch import Branch
from selfguide.networks.student import Student
from selfguide.spec.sizes import override
from selfguide.training.components import Components

X, TAU = torch.randn(4, 1, 8, 8), torch.rand(4)
CONDITION = Condition.unconditional(4)


class Mean(Branch):
    """A linear map of the mean token."""

    def __init__(self, layer: int, width: int) -> None:
        super().__init__(layer)
        self.map = nn.Linear(width, 3)

    def forward(self, tokens: Tensor, tau: Tensor, condition: Condition) -> Tensor:
        return self.map(tokens.mean(1))


def student(*layers: int) -> Student:
    net = override("dit_digits")
    torch.manual_seed(0)
    backbone = assemble(net)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.1)
    branches = {f"of-{layer}": Mean(layer, net.width) for layer in layers}
    return Student(backbone, None, branches=branches)


def test_a_branch_reads_its_layer_and_leaves_the_prediction_bit_equal() -> None:
    plain, branched = student(), student(2, 1)
    outputs = branched(X, TAU, CONDITION)
    assert torch.equal(outputs.prediction, plain(X, TAU, CONDITION).prediction)
    assert outputs.branches is not None
    assert list(outputs.branches) == ["of-2", "of-1"]
    for layer in (1, 2):
        tokens = branched.backbone.features(X, TAU, CONDITION, layer)
        branch = branched.branches[f"of-{layer}"]
        assert torch.equal(outputs.branches[f"of-{layer}"], branch(tokens, TAU, CONDITION))


def test_a_branch_without_a_run_is_no_part_of_its_weights() -> None:
    assert not [name for name in student().state_dict() if name.startswith("branches")]


def test_gradients_of_a_branch_reach_its_layer_and_nothing_behind_it() -> None:
    branched = student(1)
    branched(X, TAU, CONDITION).branches["of-1"].sum().backward()
    blocks = branched.backbone.blocks
    assert all(p.grad is not None for p in blocks[0].parameters())
    assert all(p.grad is None for p in blocks[1].parameters())
    assert branched.backbone.final.weight.grad is None


def test_losses_are_named_after_their_components() -> None:
    class Own(Component):
        name = "own"

        def own_loss(self, outputs, batch, teacher):
            return outputs.prediction.sum()

    class Shared(Component):
        name = "shared"

        def loss(self, outputs, batch, teacher):
            return outputs.prediction.mean()

    components, outputs = Components((Own(), Shared())), student()(X, TAU, CONDITION)
    assert list(components.own_losses(outputs, None, None)) == ["own_loss"]
    assert list(components.losses(outputs, None, None)) == ["shared_loss"]
