"""What a run has to hold, from shapes alone: bytes in memory by stage and cause."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spectrim.calibrate.replayed import KEPT as ANSWERS
from spectrim.calibrate.sampling import together
from spectrim.core import budget
from spectrim.core.meter import KEPT
from spectrim.core.plan import Part
from spectrim.jobs import Job
from spectrim.model.targets import Structure
from spectrim.recipe import Recipe, RecipeError
from spectrim.storage import statistics_of, units_of

# What the process keeps of freed pieces below 8 MiB (`core.heap`), and its own objects: 7 to 10 MB in runs of svd.
HEAP = 2**23
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

Causes = dict[str, int]


def parse_size(given: str | int, of: str = "memory") -> int:
    """Bytes of `6GB`, `512MiB`, `1.5 GB` or a plain number. Raises RecipeError for anything else, and for none.

    of: what has that size, as the error calls it.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(given).lower())
    if found is None or found[2] not in UNITS or not int(float(found[1]) * UNITS[found[2]]):
        raise RecipeError(f"{of} {given!r} is no size: give bytes, or a number with a unit, such as 6GB or 512MiB")
    return int(float(found[1]) * UNITS[found[2]])


def shown(size: int) -> str:
    """A size to read."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a run; stored: bytes of a number in the checkpoint; own: the model writes text."""

    model: PreTrainedModel
    structure: Structure
    recipe: Recipe
    jobs: Sequence[Job]
    sequences: int
    length: int
    stored: int
    own: bool = False

    @property
    def size(self) -> int:
        """Bytes of a number as computed in."""
        return self.model.dtype.itemsize

    @property
    def embedding(self) -> Tensor:
        """The matrix of the input embedding."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return min(self.recipe.calibrate.batch, self.sequences) * self.length

    @property
    def streams(self) -> int:
        """How many models the hidden states are of: in a second pass towards the dense one, both."""
        return 2 if self.recipe.calibrate.paired else 1

    @property
    def hidden_states(self) -> int:
        """Bytes of the states of all batches between two blocks."""
        return self.streams * self.embedding.shape[1] * self.sequences * self.length * self.size

    @property
    def batch_state(self) -> int:
        """Bytes of the states of a batch."""
        return self.streams * self.embedding.shape[1] * self.tokens * self.size

    @property
    def measured(self) -> bool:
        """Whether any statistic is."""
        methods = [d for job in self.jobs for d in [*job.decomposers.values(), job.allocator]]
        return self.recipe.calibrate.paired or any(method.needs for method in methods)

    @property
    def resident(self) -> bool:
        """Whether statistics need gradients, so the whole model."""
        return any(s.needs_gradient for job in self.jobs for d in job.decomposers.values() for s in d.needs)

    def parts(self) -> Iterator[Part]:
        """The matrices of all targets that are decomposed."""
        return (part for job in self.jobs for target in job.targets for part in target.parts)


def moments(setting: Setting, hidden: int | None = None) -> dict[str, Causes]:
    """Bytes by cause at the moments that can be the fullest, each named by its stage and what is done then.

    hidden: bytes of hidden states in memory, of as many as there are (default all, without a limit on memory). What is
    imported is not counted.
    """
    found: dict[str, Causes] = {}
    if setting.measured and setting.own:
        found["text"] = _writing(setting)
    if setting.measured and setting.resident:
        found["calibrate: backwards"] = _backwards(setting)
    elif setting.measured:
        found |= _streamed(setting, setting.hidden_states if hidden is None else min(hidden, setting.hidden_states))
        if hidden is None and setting.recipe.calibrate.paired:  # of a part of a block, as large as its states
            found["calibrate: forwards"]["answers"] = min(ANSWERS, setting.hidden_states)
    held = {k: v for k, v in found.get("calibrate: forwards", {}).items() if k != "activations"}
    if setting.measured and setting.resident:
        held = {k: v for k, v in found["calibrate: backwards"].items() if k != "activations"}
    found["decompose"] = {**held, "factorisation": max(_workspace(part, setting.stored) for part in setting.parts())}
    whole = sum(p.numel() for p in setting.model.parameters()) * setting.size
    spectra = sum(16 * min(part.out_features, part.in_features) for part in setting.parts())
    found["allocate"] = {"spectra": spectra}
    tried = [] if hidden is None else trials(setting)
    loaded = sum(job.allocator.sees == "model" for job in setting.jobs) - len(tried)
    if any(job.allocator.learns for job in setting.jobs):
        found["allocate"] |= {"model": whole, **_training(setting)}
    elif loaded:  # the model, and what is put into it
        predictions = min(KEPT, 4 * setting.sequences * setting.length * setting.embedding.shape[0])
        found["allocate"] |= {
            "model": 2 * whole, "activations": _activations(setting, setting.tokens), "predictions": predictions,
        }  # fmt: skip
    for trial in tried:
        found |= _tried(setting, trial, {"spectra": spectra, "hidden_states": min(hidden or 0, trial.states)})
    found["write"] = {"spectra": spectra, "tensors": max(_written(setting))}
    return {name: {**causes, "heap": HEAP} for name, causes in found.items()}


def stages(setting: Setting, hidden: int | None = None) -> dict[str, Causes]:
    """Bytes by cause at the fullest moment of each stage."""
    found: dict[str, Causes] = {}
    for name, causes in moments(setting, hidden).items():
        stage = name.partition(":")[0]
        if sum(causes.values()) > sum(found.get(stage, {}).values()):
            found[stage] = causes
    return found


def room(setting: Setting, limit: int) -> int:
    """Bytes of hidden states that fit into memory beside all else, below the limit.

    Raises RecipeError where the limit is below what the run needs with all of them in files.
    """
    # of the rest one batch enters a block while another leaves it
    least = min(2 * setting.batch_state, setting.hidden_states)
    at_least = stages(setting, least)
    stage, causes = max(at_least.items(), key=lambda item: sum(item[1].values()))
    needed = sum(causes.values())
    if needed > limit:
        parts = ", ".join(f"{name.replace('_', ' ')} {shown(size)}" for name, size in causes.items() if size)
        raise RecipeError(
            f"memory {shown(limit)} is too little: this run needs {shown(needed)} beside its imports, to {stage} "
            f"({parts}); a smaller calibrate.batch needs less where activations are large"
        )
    beside = [sum(c.values()) for c in moments(setting, least).values() if "hidden_states" in c]
    return limit - max(beside, default=limit)


def _streamed(setting: Setting, hidden: int) -> dict[str, Causes]:
    """A block at a time: while states enter, while a block is read, and while it runs."""
    block = setting.model.get_submodule(setting.structure.block(0))
    weights = sum(p.numel() for p in block.parameters())
    # as stored and as computed in, for a moment; the very bytes where these are the same
    copied = setting.stored if setting.stored != setting.size else 0
    compressed = weights * setting.size if setting.recipe.calibrate.sequential else 0
    states = {"hidden_states": hidden}
    return {
        "calibrate: entering": {**states, "embedding": setting.embedding.numel() * (setting.size + copied)},
        "calibrate: reading": {**states, "block_weights": weights * (setting.size + copied) + compressed},
        "calibrate: forwards": {
            **states, "block_weights": weights * setting.size + compressed,
            "statistics": max(_of_a_block(setting), _of_a_step(setting) if setting.recipe.calibrate.paired else 0),
            "activations": _activations(setting, setting.tokens),
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A job whose changes are measured a block at a time; tokens: of a batch; states: bytes of those of all streams."""

    job: Job
    length: int
    tokens: int
    states: int


def trials(setting: Setting) -> list[Trial]:
    """Of the jobs that are measured so where there is a limit on memory."""
    asked, found = setting.recipe.calibrate, []
    sizes = asked.shared_out(setting.sequences)
    for job in setting.jobs:
        tried = job.allocator.streamed(sizes[1] or sizes[0], setting.length)
        if tried is not None and job.allocator.sees == "model":
            windows, length = tried
            # the dense model's, the base state's, and of every matrix changed
            states = (len(job.targets) + 2) * windows * length * setting.embedding.shape[1] * setting.size
            found.append(Trial(job, length, min(asked.batch, windows) * length, states))
    return found


def _tried(setting: Setting, trial: Trial, held: Causes) -> dict[str, Causes]:
    """A block at a time, with what is changed in it.

    At the end the embedding is read and the head after it, and then of one sequence there are four arrays of logits in
    float32.
    """
    weights = sum(p.numel() for p in setting.model.get_submodule(setting.structure.block(0)).parameters())
    copied = setting.stored if setting.stored != setting.size else 0
    read = setting.size + copied
    head = setting.model.get_output_embeddings()
    ends = {id(p): p.numel() for p in (setting.embedding, *(() if head is None else head.parameters()))}
    return {
        "allocate: entering": {**held, "embedding": setting.embedding.numel() * read},
        "allocate: reading": {**held, "block_weights": weights * read},
        "allocate: forwards": {
            **held, "block_weights": weights * setting.size, "compressed": _put_in(setting, trial.job),
            "activations": _activations(setting, trial.tokens),
        },
        "allocate: ends": {
            **held, "embedding": sum(ends.values()) * setting.size + max(ends.values()) * copied
        },
        "allocate: predicting": {
            **held, "embedding": sum(ends.values()) * setting.size,
            "activations": 16 * trial.length * setting.embedding.shape[0],
        },
    }  # fmt: skip


def _put_in(setting: Setting, job: Job) -> int:
    """The changed matrices of a block, each at its share of the budget, and what one of them is cut from."""
    share, of_block, cut = job.budget / sum(target.parameters for target in job.targets), dict[int, int](), 0
    for target in job.targets:
        for part in target.parts:
            sides, inside = part.out_features + part.in_features, target.blocks[-1]
            rank = budget.rank_within(job.format, part, int(share * part.parameters))
            of_block[inside] = of_block.get(inside, 0) + rank * sides
            factors = budget.largest_rank(job.format, part) * sides
            held = part.parameters * (setting.stored + 4) + 8 * factors
            cut = max(cut, held + job.decomposers[target.name].cutting(part))
    return setting.size * max(of_block.values()) + cut


def _of_a_block(setting: Setting) -> int:
    """The statistics of the block that has most."""
    found: dict[int, dict[Any, int]] = {}
    for job in setting.jobs:
        for target in job.targets:
            found.setdefault(target.blocks[-1], {}).update(statistics_of(job, target, "needs"))
    return max((sum(of_block.values()) for of_block in found.values()), default=0)


def _of_a_step(setting: Setting) -> int:
    """What the second pass towards the dense model holds of the largest matrix' step, in float64.

    Its Gram, that with a ridge and its factor, and a sum of the inputs' size or of a matrix'; and of one matrix the
    weight, what it misses, and what is decomposed in its place.
    """
    found: dict[str, list[Part]] = {}
    for part in setting.parts():
        found.setdefault(part.input, []).append(part)
    sizes = []
    for parts in found.values():
        outputs, width = sum(p.out_features for p in parts), parts[0].in_features
        sizes.append(3 * width**2 + width * min(width, 2 * outputs) + 3 * max(p.parameters for p in parts))
    return 8 * max(sizes)


def _activations(setting: Setting, tokens: int) -> int:
    """Of tokens at the widest input: a copy in float64, for sums, beside two of such width and four of the stream."""
    widest = max(part.in_features for t in setting.structure.of_block(0) for part in t.parts)
    return tokens * (8 * widest + 2 * setting.size * widest + 4 * setting.size * setting.embedding.shape[1])


def _backwards(setting: Setting) -> Causes:
    """The model, all statistics, and of one sequence what every matrix read and gave, and three arrays of logits."""
    kept: dict[Any, int] = {}
    for job in setting.jobs:
        for target in job.targets:
            kept |= statistics_of(job, target, "needs")
    sides = sum(p.in_features + p.out_features for t in setting.structure.targets for p in t.parts)
    return {
        "model": sum(p.numel() for p in setting.model.parameters()) * setting.size,
        "statistics": sum(kept.values()),
        "activations": setting.length * setting.size * (sides + 3 * setting.embedding.shape[0]),
    }


def _writing(setting: Setting) -> Causes:
    """The model, keys and values of a batch, and of its tokens' predictions the logits and two arrays in float64."""
    batch = together(setting.model.config, setting.recipe.calibrate.batch, setting.length, setting.size)
    rows = min(batch, setting.sequences)
    kept = ("k", "v", "qkv", "attention")
    sides = sum(p.out_features for t in setting.structure.targets for p in t.parts if t.role in kept)
    return {
        "model": sum(p.numel() for p in setting.model.parameters()) * setting.size,
        "cache": 2 * sides * rows * setting.length * setting.size,  # joined anew at each token
        "activations": rows * setting.embedding.shape[0] * (setting.size + 16),
    }


def _training(setting: Setting) -> Causes:
    """What a training holds beside the model: factors in the place of matrices, and a batch on its way back.

    Of every matrix its input, output and coordinates in its directions; of the logits about ten arrays: those of both
    models, what the loss makes of them, and gradients. Entries have values and places, and the matrix that they make.
    """
    size, factors, sides = setting.size, 0, 0
    for job in setting.jobs:
        for target in job.targets if job.allocator.learns else ():
            for part in target.parts:
                m, n = part.out_features, part.in_features
                directions, entries = units_of(part, job.decomposers[target.name].kinds)
                factors += size * (m + n) * directions - size * m * n
                factors += (size + 8) * entries + (size * m * n if entries else 0)
                sides += m + n + directions
    logits = 10 * setting.embedding.shape[0]
    return {"factors": max(0, factors), "training": setting.tokens * size * (sides + logits)}


def _workspace(part: Part, stored: int) -> int:
    """The weight as stored; in float64 it and its product with the metric, the matrix, its vectors, LAPACK's two."""
    smaller = min(part.out_features, part.in_features)
    return stored * part.parameters + 8 * (3 * part.parameters + 5 * smaller**2)


def _written(setting: Setting) -> Iterator[int]:
    """Tensors alive while one is written: a copied one, or factors in float32 and what they are cut from.

    Pivots are found in float64, from the product of the factors.
    """
    yield setting.embedding.numel() * setting.stored
    for job in setting.jobs:
        for target in job.targets:
            for part in target.parts:
                rank = budget.largest_rank(job.format, part)
                factors = rank * (part.out_features + part.in_features)
                dense = part.parameters * (setting.stored + 4) + job.decomposers[target.name].cutting(part)
                yield dense + (8 * factors if job.format == "low_rank" else 8 * (3 * part.parameters + 2 * factors))
