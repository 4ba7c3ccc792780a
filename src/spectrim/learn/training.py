"""Training a few vectors of a frozen model: seeded batches, its own teacher, state that survives being stopped."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spectrim.core import distributed
from spectrim.core.progress import Progress, silent
from spectrim.core.registry import Live, Slot
from spectrim.learn.gates import Gates

logger = logging.getLogger(__name__)

# Hidden states of the teacher are kept while they take no more than this; else it runs again at each step.
STATES_BYTES = 2**30


@dataclass(frozen=True)
class Batches:
    """Calibration windows in seeded order: each epoch a permutation of its own, the same at every run."""

    windows: Int[Tensor, "sequences length"]
    size: int
    seed: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"batch is {self.size}: at least one window a step")

    def at(self, step: int) -> Int[Tensor, "batch"]:
        """Which windows step number `step` takes; the last of an epoch and the first of the next may share a step."""
        count, size = len(self.windows), min(self.size, len(self.windows))
        places = torch.arange(step * size, (step + 1) * size)
        epochs = {
            int(epoch): self._permutation(int(epoch)) for epoch in places.div(count, rounding_mode="floor").unique()
        }
        return torch.stack([epochs[int(place) // count][int(place) % count] for place in places])

    def _permutation(self, epoch: int) -> Int[Tensor, "sequences"]:
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(len(self.windows), generator=draw)


class Teacher:
    """The dense model's next-token distributions, from the same frozen weights with the gates bypassed."""

    def __init__(self, live: Live, gates: Gates, windows: Int[Tensor, "sequences length"]) -> None:
        self.live, self.gates, self.windows = live, gates, windows
        self._states: dict[int, Tensor] = {}

    @torch.no_grad()
    def log_probabilities(self, chosen: Int[Tensor, "batch"]) -> Float[Tensor, "batch length vocabulary"]:
        """log p of every token's successor, float32."""
        with self.gates.bypass():
            state = torch.cat([self._state(int(i)) for i in chosen])
            return self.live.logits(self.windows[chosen], state).float().log_softmax(-1)

    def _state(self, index: int) -> Float[Tensor, "1 length hidden"]:
        if index in self._states:
            return self._states[index]
        ids = self.windows[index : index + 1]
        state = self.live.run(ids, self.live.enter(ids), 0, self.live.blocks)
        if state.numel() * state.element_size() * len(self.windows) <= STATES_BYTES:
            self._states[index] = state
        return state


def divergence(
    teacher: Float[Tensor, "batch length vocabulary"], logits: Float[Tensor, "batch length vocabulary"]
) -> Float[Tensor, ""]:
    """KL(dense ‖ compressed) of next-token distributions, mean over tokens, nats; teacher: log probabilities."""
    student = logits.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def cross_entropy(
    logits: Float[Tensor, "batch length vocabulary"], ids: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Mean over predictions of −log p of the next token, nats."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten().to(logits.device)
    )


def passed_back(
    chosen: Int[Tensor, "batch"], micro: int, loss_of: Callable[[Int[Tensor, "some"]], Float[Tensor, ""]]
) -> float:
    """The mean loss of the chosen windows; its gradients are added to what they lead to, `micro` windows at a time.

    Each process takes its share, and adds its part of the gradient: summed over processes they are those of the mean.
    """
    own, total = chosen[distributed.rank() :: distributed.world()], torch.zeros((), dtype=torch.float64)
    for part in own.split(micro) if len(own) else ():
        loss = loss_of(part) * (len(part) / len(chosen))
        if loss.requires_grad:  # nothing may be left that it depends on
            loss.backward()
        total += loss.detach().double().cpu()
    return float(distributed.add_up(total))


@dataclass
class Trainer:
    """A training that can be stopped at any step and goes on from the last state saved, to the same result.

    parameters: what is trained, by name; rates: AdamW's learning rate of each; state: tensors that the method changes
    itself (multipliers, scores); columns: names of the numbers that each step reports. The state is saved every
    `every` steps. clip: bound on the norm of each parameter's gradient (0: none).
    """

    parameters: Mapping[str, Tensor]
    rates: Mapping[str, float]
    slot: Slot
    columns: Sequence[str]
    state: dict[str, Tensor] = field(default_factory=dict)
    every: int = 50
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    progress: Progress = silent
    history: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = [{"params": [p], "lr": self.rates[name], "name": name} for name, p in self.parameters.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=self.betas)

    def run(
        self,
        steps: int,
        update: Callable[[int], Mapping[str, float]],
        after: Callable[[int], bool] | None = None,
        rate: Callable[[int], float] | None = None,
        stage: Callable[[int], str] = lambda step: "training",
    ) -> Float[Tensor, "steps columns"]:
        """Run to `steps` and return what was reported; a training found in the slot goes on where it was.

        update(step) computes gradients (`backward`) and returns the numbers of `columns`, the first of which is the
        loss; after(step) follows the optimizer's step and may end the training by True; rate(step) multiplies the
        learning rates. Raises ValueError, naming step and stage, when a loss is not finite: what was reached is saved.
        """
        start, done = self._resumed()
        for step in range(start, steps if not done else start):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rates[group["name"]] * (rate(step) if rate else 1.0)
            self.optimizer.zero_grad(set_to_none=True)
            found = update(step)
            self._check(found, step, stage(step))
            self._reduce()
            self.optimizer.step()
            ended = after is not None and after(step)
            self.history.append([float(found[name]) for name in self.columns])
            if ended or (step + 1) % self.every == 0:
                self.save(step + 1, ended)
            shown = ", ".join(f"{name} {found[name]:.4g}" for name in self.columns)
            self.progress(f"{stage(step)}: {shown}", step + 1, steps)
            if ended:
                break
        return torch.tensor(self.history, dtype=torch.float64).view(-1, len(self.columns))

    def _check(self, found: Mapping[str, float], step: int, stage: str) -> None:
        loss = found[self.columns[0]]
        if not math.isfinite(loss):
            self.save(step)
            raise ValueError(
                f"the loss became {loss} at step {step} of stage {stage!r}; what was reached before it is kept in the "
                "work directory: lower the learning rate, or look for windows of calibration text the model fails on"
            )

    def _reduce(self) -> None:
        """Gradients: the sum over processes, none that is missing, clipped."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            distributed.add_up(parameter.grad)
            if self.clip:
                torch.nn.utils.clip_grad_norm_([parameter], self.clip)

    def save(self, step: int, ended: bool = False) -> None:
        """Put everything that the next step needs into the slot."""
        tensors: dict[str, Tensor] = {"step": torch.tensor([step, int(ended)])}
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        tensors |= {f"state.{name}": value for name, value in self.state.items()}
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64).view(-1, len(self.columns))
        if distributed.rank() == 0:
            self.slot.save(tensors)

    @torch.no_grad()
    def _resumed(self) -> tuple[int, bool]:
        """The first step to do, and whether the training had ended by itself."""
        found = self.slot.load()
        if found is None:
            return 0, False
        for name, parameter in self.parameters.items():
            parameter.copy_(found[f"parameter.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {key: _like(key, value, parameter) for key, value in state.items()}
        for name in self.state:
            self.state[name].copy_(found[f"state.{name}"])
        self.history = found["history"].tolist()
        step, ended = found["step"].tolist()
        logger.info("training goes on at step %d", step)
        return step, bool(ended)


def _like(key: str, value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of the optimizer's state where torch keeps it: the count of steps on the CPU."""
    return value.clone() if key == "step" else value.to(parameter.device, copy=True)
