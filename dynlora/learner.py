"""Adapt a CLIP to one task: dense phase, κ ramp, prune (CoDyRA, arXiv 2412.01004, algorithm 1).

The model is given back as it came; what was learnt is the returned, pruned low-rank update. Merging it
into the weights is the publisher's job. Knows nothing of files or clocks: same task, settings and seed,
same update, also when resumed from any of its checkpoints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynlora import attach, checkpoint, spectrum
from dynlora.attach import Site
from dynlora.clip import Clip
from dynlora.errors import Interrupted
from dynlora.moments import ImageMoments
from dynlora.objectives import Objective, build_objective
from dynlora.rank import prune, soft_threshold
from dynlora.settings import Settings
from dynlora.task import Task


@dataclass(frozen=True)
class Progress:
    """Where learning stands, after a step."""

    step: int  # steps done
    steps: int  # steps in all
    loss: float
    kept_rank: float  # mean over the adapted matrices; rows of tokens are not among them


@dataclass(frozen=True)
class Hooks:
    """How the outside takes part. All optional."""

    on_progress: Callable[[Progress], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False  # asked after every step
    should_save: Callable[[], bool] = lambda: False  # asked after every step
    save: Callable[[bytes], None] = lambda _: None  # keep a checkpoint
    resume_from: bytes | None = None  # a checkpoint of the same task, settings and seed


@dataclass(frozen=True)
class Factor:
    """The pruned update of one matrix: ΔW[row_start:row_stop] = lora_B diag(importance) lora_A."""

    site: str
    key: str
    row_start: int
    row_stop: int
    lora_B: Tensor  # (out, rank)
    lora_A: Tensor  # (rank, in)
    importance: Tensor  # (rank,)

    def delta(self) -> Tensor:
        """(out, in), float32."""
        return (self.lora_B * self.importance) @ self.lora_A


@dataclass(frozen=True)
class Adaptation:
    """What one task taught."""

    factors: list[Factor]  # matrices whose rank fell to 0 are absent
    ranks: dict[str, int]  # kept rank of every adapted matrix, zeros included; rows of tokens are not listed
    steps: int
    loss: float  # of the last step
    scale: float = field(default=1.0)  # the share of the update kept by the line search
    own_moments: ImageMoments | None = None  # of the task's images, where the vision tower stays as it was

    @property
    def tokens(self) -> int:
        """How many tokens have another embedding than before."""
        return sum(factor.site.endswith(".token") for factor in self.factors)

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖_F over all matrices."""
        return math.sqrt(sum(float(factor.delta().double().square().sum()) for factor in self.factors))


def adapt(
    clip: Clip,
    task: Task,
    settings: Settings,
    *,
    seed: int = 0,
    hooks: Hooks | None = None,
    only: Callable[[Site], bool] = lambda _: True,
) -> Adaptation:
    """Learn `task` and return the pruned update.

    Args:
        only: which matrices may be updated; all that the objective wants by default.

    Raises:
        Interrupted: `hooks.should_stop` said so; a checkpoint was saved first.
        CheckpointError: `hooks.resume_from` belongs to another task, other settings or another seed.
        ModelError: the architecture cannot be adapted.
    """
    hooks = hooks or Hooks()
    objective = build_objective(clip, task, settings, seed=seed)

    def is_wanted(site: Site) -> bool:
        return objective.wants(site) and only(site)

    with attach.attached(clip.model, settings.rank, only=is_wanted, tokens=objective.tokens) as sites:
        attach.reset(sites, seed=seed, random_importance=settings.gates == "random")
        objective.begin(sites)
        run = _Run(sites, objective, settings, steps=settings.steps, seed=seed)
        if hooks.resume_from is not None:
            run.restore(hooks.resume_from)
        loss = run.work(hooks)
        scale = objective.choose_scale(sites)
        factors, ranks = _pruned(sites, scale)
    return Adaptation(factors, ranks, run.steps, loss, scale, objective.own_moments)


class _Run:
    """The loop and its state: parameters, Adam's moments, and the number of steps done."""

    def __init__(
        self, sites: list[Site], objective: Objective, settings: Settings, *, steps: int, seed: int
    ) -> None:
        self.sites, self.objective, self.settings = sites, objective, settings
        self.steps, self.seed = steps, seed
        self.schedule = settings.schedule_for(steps)
        self.step = 0
        self.loss = math.nan
        self.importances: list[Tensor] = [site.lora.importance for site in sites]
        self.optimizer = torch.optim.AdamW(
            objective.parameter_groups(sites),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    def work(self, hooks: Hooks) -> float:
        """Do the remaining steps; returns the last loss."""
        while self.step < self.steps:
            self._one_step()
            hooks.on_progress(Progress(self.step, self.steps, self.loss, self._kept_rank()))
            stopping = hooks.should_stop() and self.step < self.steps
            if stopping or hooks.should_save():
                hooks.save(self.checkpoint())
            if stopping:
                raise Interrupted(
                    f"stopped after step {self.step} of {self.steps}; the checkpoint resumes there"
                )
        return self.loss

    def _one_step(self) -> None:
        decay = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * decay
        if self.settings.gates == "spectrum":
            self._take_turns()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective.loss(self.step)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            alive = torch.cat(self.importances) != 0
        self.optimizer.step()
        if self.schedule.is_settling(self.step):
            with torch.no_grad():
                self._set_gates(torch.cat(self.importances) * alive)
        else:
            self._threshold()
        self.step += 1
        self.loss = float(loss.detach())

    def _take_turns(self) -> None:
        """Until the ramp factors learn; then their product is taken apart, and the gates learn alone.

        What survives a threshold is only rescaled: where it points was found by the dense steps.
        """
        start, settings = max(1, self.schedule.ramp.start), self.settings  # something has to be learnt first
        if self.step == start:
            assert settings.kappa_total, "the thresholds of a spectrum add up to a known sum"
            spectrum.respan([site.lora for site in self.sites], settings.pruned_energy, settings.kappa_total)
        for site in self.sites:
            site.lora.lora_A.requires_grad_(self.step < start)
            site.lora.lora_B.requires_grad_(self.step < start and site.kind != "token")  # see reset_row
            site.lora.importance.requires_grad_(self.step >= start)

    def _threshold(self) -> None:
        kappa = self.schedule.kappa(self.step)
        if kappa == 0 or (self.settings.gates == "spectrum" and self.step == 0):  # no spectrum yet
            return
        with torch.no_grad():  # all gates in one go: the proximal step of λ‖w‖₁
            gates = soft_threshold(torch.cat(self.importances), kappa, operator=self.settings.threshold)
            self._set_gates(gates)

    def _set_gates(self, gates: Tensor) -> None:
        parts = torch.split(gates, [len(importance) for importance in self.importances])
        for importance, gate in zip(self.importances, parts, strict=True):
            importance.copy_(gate)

    def _kept_rank(self) -> float:
        gates = [site.lora.importance.detach() for site in self.sites if site.kind != "token"]
        return float(torch.count_nonzero(torch.cat(gates))) / len(gates) if gates else 0.0

    def checkpoint(self) -> bytes:
        """Everything the next step depends on."""
        state = self.optimizer.state
        groups = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return checkpoint.pack(
            groups, state, step=self.step, loss=self.loss, seed=self.seed, settings=self.settings
        )

    def restore(self, content: bytes) -> None:
        """Continue from a checkpoint of this very run."""
        groups = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.step, self.loss = checkpoint.unpack(
            content, groups, self.optimizer.state, seed=self.seed, settings=self.settings
        )


def _pruned(sites: list[Site], scale: float) -> tuple[list[Factor], dict[str, int]]:
    factors, ranks = [], {}
    for site in sites:
        lora = site.lora
        b, a, w = prune(lora.lora_B.detach(), lora.lora_A.detach(), lora.importance.detach() * scale)
        if site.kind != "token":
            ranks[site.name] = len(w)
        if len(w):
            factors.append(Factor(site.name, site.key, site.row_start, site.row_stop, b, a, w))
    return factors, ranks
