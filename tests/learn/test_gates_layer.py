"""One gated layer against its definition: weights, gradients, entries, offsets and further directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from spectrim.core.plan import Candidate, Part, Target
from spectrim.learn.gates import GatedLinear, by_kind, units
from spectrim.methods.svd import PlainSVD
from tests.learn.toys import layer, sparse_candidate, uniform


def of_layer(dense: nn.Linear) -> Candidate:
    m, n = dense.weight.shape
    target = Target("layer", "up", (0,), (Part("layer", m, n, "x", dense.bias is not None),))
    weight = dense.weight.detach()
    return PlainSVD().decompose(target, {"layer": weight}, {"layer": {}})


@pytest.mark.parametrize(("m", "n"), [(7, 11), (11, 7), (6, 6)])
def test_the_gradient_of_a_gate_is_that_of_its_direction(m: int, n: int) -> None:
    dense = layer(m, n)
    x, wanted = torch.randn(5, n, dtype=torch.float64), torch.randn(5, m, dtype=torch.float64)
    gated = GatedLinear(of_layer(dense), dense)
    gate = uniform(min(m, n), 0.2, 1.8).double().requires_grad_()
    gated.gate = gate
    loss = (gated(x) - wanted).square().sum() + gated(x).pow(3).sum()
    loss.backward()
    u, s, v = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    changed = ((u * (s * gate.detach())) @ v).requires_grad_()
    y = nn.functional.linear(x, changed, dense.bias.detach())
    torch.testing.assert_close(gated(x).detach(), y.detach())
    ((y - wanted).square().sum() + y.pow(3).sum()).backward()
    assert changed.grad is not None and gate.grad is not None
    torch.testing.assert_close(gate.grad, s * torch.einsum("mi,mn,in->i", u, changed.grad, v))


@pytest.mark.parametrize("folded", [False, True])
def test_entries_have_gates_of_their_own(folded: bool) -> None:
    dense = layer(6, 9)
    candidate, left, right = sparse_candidate(dense)
    gated, x = GatedLinear(candidate, dense), torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(gated(x), dense(x))
    gate = uniform(11, 0.1, 0.9).double()
    assert units(candidate) == 11 and [len(v) for v in by_kind(candidate, gate).values()] == [6, 5]
    tensors = candidate.tensors()
    weight = (left * gate[:6]) @ right
    for place, value, factor in zip(tensors["entries"], tensors["values"], gate[6:], strict=True):
        weight[place // 9, place % 9] += value * factor
    gated.gate = gate.clone().requires_grad_()
    if folded:
        gated.fold()
    torch.testing.assert_close(gated(x), nn.functional.linear(x, weight, dense.bias))
    gated.unfold()
    gated(x).square().sum().backward()
    assert gated.gate.grad is not None and (gated.gate.grad != 0).all()


def test_an_offset_and_further_directions_are_added() -> None:
    for bias in (True, False):
        dense = layer(6, 9, bias)
        gated, x = GatedLinear(of_layer(dense), dense), torch.randn(2, 4, 9, dtype=torch.float64)
        a, b = torch.randn(6, 2).double().requires_grad_(), torch.randn(2, 9).double().requires_grad_()
        gated.gate, gated.offset, gated.further = torch.ones(6).double(), torch.arange(6.0).double(), (a, b)
        expected = nn.functional.linear(x, dense.weight + a @ b, dense.bias) + torch.arange(6.0)
        torch.testing.assert_close(gated(x), expected)
        gradients = torch.autograd.grad(gated(x).square().sum(), (a, b))
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), (a, b)))
        gated.gate = None
        torch.testing.assert_close(gated(x), dense(x))


def test_a_right_factor_of_its_own_is_used() -> None:
    dense = layer(6, 9)
    candidate = of_layer(dense)
    tensors = {**candidate.tensors(), "right": 2 * candidate.tensors()["left"].T @ dense.weight.detach()}
    gated = GatedLinear(replace(candidate, tensors=lambda: tensors), dense)
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(gated(x), nn.functional.linear(x, 2 * dense.weight, dense.bias))
