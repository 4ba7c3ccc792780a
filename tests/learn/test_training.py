"""Training that is stopped and goes on; batches, teacher and losses against direct computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.core.registry import Memory
from spectrim.learn import training
from spectrim.learn.training import Batches, Teacher, Trainer, cross_entropy, divergence, passed_back
from tests.learn.toys import WINDOWS, setting, uniform

# --- batches ---


@pytest.mark.parametrize(("count", "size"), [(6, 2), (7, 3), (5, 5), (4, 9), (1, 1)])
def test_every_epoch_is_a_permutation(count: int, size: int) -> None:
    batches = Batches(torch.zeros(count, 3, dtype=torch.int64), size, seed=4)
    steps = [batches.at(step) for step in range(4 * count)]
    assert all(len(chosen) == min(size, count) for chosen in steps)
    epochs = torch.cat(steps)[: 4 * count].view(-1, count)
    assert all(sorted(epoch.tolist()) == list(range(count)) for epoch in epochs)
    if count > 3:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1, "each one of its own"


def test_batches_depend_on_the_seed_and_the_step_alone() -> None:
    windows = torch.zeros(50, 3, dtype=torch.int64)
    one, other = Batches(windows, 4, 0), Batches(windows, 4, 1)
    forwards = [one.at(step).tolist() for step in range(20)]
    torch.rand(3)
    assert [Batches(windows, 4, 0).at(step).tolist() for step in reversed(range(20))] == forwards[::-1]
    assert [other.at(step).tolist() for step in range(20)] != forwards
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch is {size}"):
            Batches(windows, size, 0)


# --- the trainer ---

COLUMNS = ("loss", "extra")


class Toy:
    """A vector and a matrix pulled to noisy aims, with a state of the method's own."""

    def __init__(self, slot: Memory, every: int = 3, progress: Any = None, clip: float = 1.0) -> None:
        self.vector, self.matrix = torch.zeros(5).requires_grad_(), torch.ones(2, 3).requires_grad_()
        self.state = {"pressure": torch.zeros((), dtype=torch.float64), "seen": torch.zeros(3, dtype=torch.int64)}
        self.updates = 0
        more = {} if progress is None else {"progress": progress}
        self.trainer = Trainer(
            {"vector": self.vector, "matrix": self.matrix}, {"vector": 0.1, "matrix": 0.02}, slot, COLUMNS, self.state,
            every=every, clip=clip, **more,
        )  # fmt: skip

    def update(self, step: int) -> dict[str, float]:
        self.updates += 1
        aim = uniform(5, -1.0, seed=step)
        loss = (self.vector - aim).square().sum() * (1 + self.state["pressure"]).float() + self.matrix.pow(4).sum()
        loss.backward()
        return {"extra": float(self.state["pressure"]), "loss": float(loss.detach())}

    def after(self, step: int) -> bool:
        self.state["pressure"] += 0.25 * float(self.vector.detach().abs().sum())
        self.state["seen"][step % 3] += 1
        return False

    def run(self, steps: int = 11, **more: Any) -> Tensor:
        options: dict[str, Any] = {"after": self.after, "rate": lambda step: 1 / (1 + step), **more}
        return self.trainer.run(steps, self.update, **options)

    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector.detach(), "matrix": self.matrix.detach(), **self.state}


def equal(one: Toy, other: Toy) -> bool:
    return all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def stopping(at: int) -> Callable[[str, int, int], None]:
    def progress(stage: str, done: int, total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("at", range(1, 12))
def test_a_training_stopped_at_any_step_goes_on_to_the_same_result(at: int) -> None:
    undisturbed, slot = Toy(Memory()), Memory()
    history = undisturbed.run()
    with pytest.raises(KeyboardInterrupt):
        Toy(slot, progress=stopping(at)).run()
    again = Toy(slot)
    assert torch.equal(again.run(), history) and history.shape == (11, 2) and history.dtype == torch.float64
    assert equal(again, undisturbed)
    assert again.updates == 11 - at // 3 * 3, "what was saved is not done again"
    assert not torch.equal(undisturbed.vector, torch.zeros(5)) and float(undisturbed.state["pressure"]) > 0


def test_a_training_stopped_again_and_again_and_inside_a_step() -> None:
    undisturbed, slot, runs = Toy(Memory(), every=1), Memory(), 0
    history = undisturbed.run()

    class Dying(Toy):
        def update(self, step: int) -> dict[str, float]:
            found = super().update(step)
            if self.updates == 2:
                raise KeyboardInterrupt
            return found

    while True:
        runs, toy = runs + 1, Dying(slot, every=1)
        try:
            found = toy.run()
        except KeyboardInterrupt:
            continue
        break
    assert runs == 11 and torch.equal(found, history) and equal(toy, undisturbed)


def test_a_finished_training_is_not_done_again_and_a_longer_one_goes_on() -> None:
    slot, whole = Memory(), Toy(Memory())
    Toy(slot).run(6)
    again = Toy(slot)
    again.run(6)
    assert again.updates == 0
    longer = Toy(slot)
    assert torch.equal(longer.run(9), whole.run(9)) and longer.updates == 3 and equal(longer, whole)


def test_steps_are_those_of_adamw_with_its_rates_and_clipping() -> None:
    toy = Toy(Memory())
    toy.run(4)
    vector, matrix, state = torch.zeros(5).requires_grad_(), torch.ones(2, 3).requires_grad_(), 0.0
    both = torch.optim.AdamW(
        [{"params": [vector], "lr": 0.1}, {"params": [matrix], "lr": 0.02}], weight_decay=0.0, betas=(0.9, 0.99)
    )
    for step in range(4):
        both.param_groups[0]["lr"], both.param_groups[1]["lr"] = 0.1 / (1 + step), 0.02 / (1 + step)
        both.zero_grad()
        loss = (vector - uniform(5, -1.0, seed=step)).square().sum() * (1 + state) + matrix.pow(4).sum()
        loss.backward()
        for each in (vector, matrix):
            assert each.grad is not None
            each.grad *= min(1.0, 1 / (float(each.grad.norm()) + 1e-6))
        both.step()
        state += 0.25 * float(vector.detach().abs().sum())
    torch.testing.assert_close(toy.vector, vector)
    torch.testing.assert_close(toy.matrix, matrix)
    free = Toy(Memory(), clip=0.0)
    free.run(4)
    assert not torch.equal(free.matrix, toy.matrix)


def test_what_gets_no_gradient_stays() -> None:
    slot = Memory()
    still, moved = torch.ones(3).requires_grad_(), torch.ones(3).requires_grad_()
    trainer = Trainer({"still": still, "moved": moved}, {"still": 0.1, "moved": 0.1}, slot, ("loss",))

    def update(step: int) -> dict[str, float]:
        moved.sum().backward()
        return {"loss": 1.0}

    trainer.run(3, update)
    assert torch.equal(still, torch.ones(3)) and (moved < 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 4])
def test_a_loss_that_is_not_finite_ends_it_and_leaves_a_whole_state(bad: float, at: int) -> None:
    undisturbed, slot = Toy(Memory()), Memory()
    history = undisturbed.run()

    class Failing(Toy):
        def update(self, step: int) -> dict[str, float]:
            found = super().update(step)
            return {**found, "loss": bad} if step == at else found

    with pytest.raises(ValueError, match=rf"loss became {bad} at step {at} of stage 'warm'.*learning rate"):
        Failing(slot).run(stage=lambda step: "warm")
    failed = Failing(slot)
    with pytest.raises(ValueError, match=f"step {at} of"):
        failed.run()
    assert failed.updates == 1, "it goes on where it was"
    again = Toy(slot)
    assert torch.equal(again.run(), history) and equal(again, undisturbed) and again.updates == 11 - at


def test_it_may_end_by_itself() -> None:
    slot, seen = Memory(), []

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, done, total))

    def ends(toy: Toy) -> Callable[[int], bool]:
        return lambda step: toy.after(step) or step == 6

    toy = Toy(slot, every=4, progress=progress)
    history = toy.run(after=ends(toy), stage=lambda step: f"part {step // 4}")
    assert len(history) == 7 and [done for _, done, _ in seen] == list(range(1, 8))
    assert {total for _, _, total in seen} == {11}
    assert seen[0][0].startswith("part 0: loss ") and "extra 0" in seen[0][0] and seen[-1][0].startswith("part 1: ")
    again = Toy(slot)
    assert torch.equal(again.run(), history) and again.updates == 0 and equal(again, toy)


def test_a_state_is_a_copy() -> None:
    slot = Memory()
    toy = Toy(slot, every=2)
    toy.run(2)
    kept = {name: tensor.clone() for name, tensor in (slot.load() or {}).items()}
    toy.trainer.run(2, toy.update)  # goes on from the slot: nothing to do
    toy.vector.data += 1
    toy.state["pressure"] += 1
    assert kept and all(torch.equal(tensor, kept[name]) for name, tensor in (slot.load() or {}).items())
    slot.clear()
    assert slot.load() is None


# --- losses and the teacher ---


def test_the_divergence_of_equal_models_is_zero() -> None:
    logits = uniform(2 * 3 * 7, -4.0, 4.0).view(2, 3, 7)
    assert float(divergence(logits.log_softmax(-1), logits + 5)) == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_that_of_the_distributions_a_token() -> None:
    p, q = uniform(2 * 3 * 7, -4.0, 4.0).view(2, 3, 7), uniform(2 * 3 * 7, -4.0, 4.0, seed=1).view(2, 3, 7)
    one, other = p.double().softmax(-1), q.double().softmax(-1)
    direct = sum(float(a * (a / b).log()) for a, b in zip(one.flatten(), other.flatten(), strict=True)) / 6
    assert float(divergence(p.log_softmax(-1), q)) == pytest.approx(direct, rel=1e-5)
    assert float(divergence(q.log_softmax(-1), p)) != pytest.approx(direct, rel=1e-2), "it has a direction"
    assert divergence(p.log_softmax(-1), q.bfloat16()).dtype == torch.float32


def test_cross_entropy_is_the_loss_of_the_model() -> None:
    made = setting()
    with torch.no_grad():
        found = made.model(WINDOWS, labels=WINDOWS)
    assert float(cross_entropy(found.logits, WINDOWS)) == pytest.approx(float(found.loss), rel=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_the_teacher_is_the_dense_model(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made, runs = setting("gpt2"), 0
    if not cached:
        monkeypatch.setattr(training, "STATES_BYTES", 100)
    with torch.no_grad():
        expected = made.model(WINDOWS).logits.log_softmax(-1)
    run = made.live.run

    def counted(*args: Any) -> Tensor:
        nonlocal runs
        runs += 1
        return run(*args)

    monkeypatch.setattr(made.live, "run", counted)
    with made.gates() as gates:
        teacher = Teacher(made.live, gates, WINDOWS)
        flat = uniform(gates.slices.total).requires_grad_()
        gates.set(flat, torch.ones(gates.outputs.total))
        for chosen in (torch.tensor([4, 1]), torch.tensor([1, 0, 4])):
            found = teacher.log_probabilities(chosen)
            torch.testing.assert_close(found, expected[chosen], rtol=1e-4, atol=1e-4)
            assert found.dtype == torch.float32 and not found.requires_grad
        assert runs == (3 if cached else 5)
        gates.set(torch.ones(gates.slices.total))
        every = torch.arange(len(WINDOWS))
        assert float(divergence(teacher.log_probabilities(every), made.logits())) < 1e-6


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 9])
def test_gradients_are_those_of_the_mean_whatever_runs_at_once(micro: int) -> None:
    inputs, weight = uniform(40, -1.0).view(8, 5).double(), torch.ones(5, dtype=torch.float64).requires_grad_()
    chosen = torch.tensor([6, 0, 3, 3, 7])

    def loss(some: Tensor) -> Tensor:
        return (inputs[some] @ weight).tanh().square().mean()

    found = passed_back(chosen, micro, loss)
    assert weight.grad is not None
    gradient, weight.grad = weight.grad, None
    loss(chosen).backward()
    torch.testing.assert_close(gradient, weight.grad)
    assert found == pytest.approx(float(loss(chosen).detach()), rel=1e-12)
