"""The second pass: each block decomposed again, from inputs that went through the compressed blocks before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from spectrim import driving
from spectrim.calibrate.collect import BlockStatistics, Wanted
from spectrim.core import distributed
from spectrim.core.plan import Candidate, Choice, Plan, Target
from spectrim.core.store import hash_of
from spectrim.model.live import Installed
from spectrim.run import NOTHING, Run


@dataclass
class _Chain:
    """The pass so far; upstreams: for every block come to, a hash of all blocks before it."""

    upstreams: list[str] = field(default_factory=lambda: ["first"])
    candidates: dict[str, Candidate] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)

    @property
    def upstream(self) -> str:
        """Of the block at hand."""
        return self.upstreams[-1]

    def entering(self, block: int) -> str | None:
        """What the states entering a block come from, None where the pass has not come to it."""
        return self.upstreams[block] if block < len(self.upstreams) else None


def second_pass(run: Run, plan: Plan) -> tuple[Plan, dict[str, Candidate]]:
    """Each block decomposed at its planned size, from inputs that went through the compressed blocks before it.

    Inside a block all statistics are those of the dense block. What the store has is only run, not made again.
    """
    inside = run.inside(plan)
    chain = _Chain()
    done = 0
    while done < len(inside) and not _missing(run, inside[done], chain):
        _take(run, inside[done], NOTHING, plan, chain)
        done += 1
    pending = {i: {t: tuple(run.decomposers[t.name].needs) for t in inside[i]} for i in range(done, len(inside))}
    wanted = {i: Wanted(of_block) for i, of_block in pending.items() if any(of_block.values())}
    with run.timings.stage("calibrate"):
        for index, measured in driving.drive(run, wanted, sequential=True, upstream=chain.entering):
            if index >= done:
                _take(run, inside[index], measured, plan, chain)
                done = index + 1
            del measured  # not beside those of the next block
            _install(run, inside[index], chain)
            run.progress("decompose", index + 1, max(wanted) + 1)
        for of_block in inside[done:]:
            _take(run, of_block, NOTHING, plan, chain)
    run.count_once()
    driving.forget_states(run, chain.entering)
    return run.recounted(plan, chain.choices), chain.candidates


def _take(run: Run, of_block: Sequence[Target], measured: BlockStatistics, plan: Plan, chain: _Chain) -> None:
    """Candidates and choices of one block, and what the next one's keys say of it."""
    for _ in run.decompose_all(_missing(run, of_block, chain), measured, chain.upstream):
        pass
    distributed.barrier()  # what others have made is read from here on
    candidates = {target.name: run.stored(target, chain.upstream) for target in of_block}
    chain.candidates |= candidates
    chain.choices |= run.settle_all(list(candidates.values()), plan.choices, chain.upstream)
    made = {target.name: [run.key(target, chain.upstream), asdict(chain.choices[target.name])] for target in of_block}
    chain.upstreams.append(hash_of({"before": chain.upstream, "made": made}))


def _missing(run: Run, of_block: Sequence[Target], chain: _Chain) -> list[Target]:
    """Those of a block that the store does not have."""
    return distributed.agreed(lambda: [target for target in of_block if not run.has(target, chain.upstream)])


def _install(run: Run, of_block: Sequence[Target], chain: _Chain) -> None:
    """Put a block's compressed modules into the loaded block; the driver takes them out again."""
    assert run.windows is not None
    live = Installed(run.source.model, run.structure, chain.candidates, run.windows, 1)
    for target, owner in zip(of_block, run.dealt(of_block), strict=True):
        for name, module in live.built(target.name, chain.choices[target.name], owner).items():
            run.source.model.set_submodule(name, module)
