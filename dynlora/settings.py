"""How to learn: one settings object, three presets."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

from dynlora.errors import DynloraError
from dynlora.rank import Operator, Ramp, Schedule

Gates = Literal["random", "ones", "spectrum"]

_OF_PUBLISHED = {"batch_size"}  # fields that no other objective reads
_OF_DEFAULT_FROM = "token_learning_rate"  # this one and all after it


class SettingsError(DynloraError):
    """A setting has a value that cannot work."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a task teaches, seed and images apart. Defaults: the published recipe."""

    objective: Literal["published", "default"] = "published"
    dtype: Literal["float32", "bfloat16"] = "float32"  # the towers compute in; what learns stays in float32
    images_at_once: int | None = None  # memory bounds them; None: all of a step
    prompts_at_once: int | None = None
    rank: int = 16  # of each matrix's update before pruning
    steps: int = 500
    batch_size: int = 64  # images per step of the published objective
    learning_rate: float = 5e-4  # peak; cosine to 0 without warm-up
    betas: tuple[float, float] = (0.9, 0.9999)
    weight_decay: float = 0.0
    dense_fraction: float = 0.5  # share of the steps before any thresholding
    kappa_max: float = 0.005  # threshold at the end of the ramp, where there is no kappa_total
    kappa_levels: int = 50  # stairs of the ramp, the first of which is 0
    kappa_total: float | None = None  # sum of all thresholds, instead of kappa_max: for any number of steps
    settle_fraction: float = 0.0  # share of the steps after the ramp, in which what survived goes on learning
    threshold: Operator = "paper"
    stairs: Ramp = "equal"  # of the ramp
    gates: Gates = "random"  # where they start: N(0, 1) as published, all at 1, or later at singular values
    pruned_energy: float = 0.1  # share of ‖ΔW‖² below the threshold, with gates from the spectrum

    # From here on of the default objective only (dynlora/retaining.py says what the weights weigh).
    token_learning_rate: float = 5e-3  # of the rows of the batch's tokens; 0: they stay as they are
    gate_learning_rate: float = 0.2  # of gates that are singular values
    aim: float = 1.0
    guard: float = 3.0  # images in general keep the name they had, if that was another,
    margin: float = 2.0  # by so many logits,
    keep: float = 10.0  # or if it was one of the batch's
    hold: float = 80.0
    shrink: float = 0.025  # of ‖ΔW‖²
    few_classes: int = 5  # a task of fewer holds, shrinks and, given moments, guards more, in proportion
    known_factor: float = 8.0  # a known name weighs as much as so many others
    names_per_step: int = 48  # of each kind of names that are held, looked at in a step
    views: int = 2  # crops of each image, drawn once
    crop_min_area: float = 0.6  # share of the image that a random crop keeps at least
    colour_jitter: float = 0.1  # of contrast and brightness

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise SettingsError(f"dtype is {self.dtype!r}; expected float32 or bfloat16")
        for name, least in (("rank", 1), ("batch_size", 1), ("steps", 1), ("kappa_levels", 2)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected at least {least}")
        for name in ("images_at_once", "prompts_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} is {value}; expected at least 1, or none for all at once")
        if self.gates not in get_args(Gates):
            raise SettingsError(f"gates is {self.gates!r}; expected {', '.join(get_args(Gates))}")
        if self.gates == "spectrum" and not (self.kappa_total and 0 < self.pruned_energy < 1):
            raise SettingsError(
                f"kappa_total is {self.kappa_total} and pruned_energy {self.pruned_energy}; gates from the "
                "spectrum take a sum of thresholds above 0 and a share of the energy between 0 and 1"
            )
        shares = (self.dense_fraction, self.settle_fraction)
        if min(shares) < 0 or sum(shares) > 1:
            raise SettingsError(
                f"dense_fraction is {shares[0]} and settle_fraction {shares[1]}; "
                "expected shares of the steps that add up to at most 1"
            )

    def as_dict(self) -> dict[str, Any]:
        """For plans, checkpoints and manifests, without what the objective does not read; `from_dict` takes
        it back.
        """
        values = asdict(self)
        names = list(values)
        of_default = set(names[names.index(_OF_DEFAULT_FROM) :])
        unread = _OF_PUBLISHED if self.objective == "default" else of_default
        unread = unread | ({"kappa_max"} if self.kappa_total is not None else set())
        return {key: value for key, value in values.items() if key not in unread}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The settings that `as_dict` wrote, also when they went through JSON.

        Raises:
            SettingsError: a key is unknown or a value cannot work.
        """
        try:
            return cls(**(values | {"betas": tuple(values["betas"])}))
        except (KeyError, TypeError) as error:
            raise SettingsError(f"these are not settings of this release: {error}") from error

    def with_overrides(self, **overrides: Any) -> Self:
        """The same settings but for those given that are not None."""
        return replace(self, **{key: value for key, value in overrides.items() if value is not None})

    def schedule_for(self, steps: int) -> Schedule:
        """When and how much to threshold in a task of `steps` steps."""
        schedule = Schedule(
            steps, self.dense_fraction, self.kappa_max, self.kappa_levels, self.settle_fraction, self.stairs
        )
        return schedule if self.kappa_total is None else schedule.with_total(self.kappa_total)


PAPER = Settings()
REFERENCE = Settings(threshold="reference", stairs="reference")
DEFAULT = Settings(
    objective="default",
    gates="spectrum",
    steps=150,
    learning_rate=5e-4,
    betas=(0.9, 0.99),
    pruned_energy=0.02,
    kappa_total=0.6,
    dense_fraction=0.8,
    settle_fraction=0.1,
)


def preset(name: str) -> Settings:
    """The settings of a preset.

    `paper` is the published recipe, `reference` the same as the authors' code carries it out (dead zone and
    ramp differ), `default` what the daemon learns with.

    Raises:
        SettingsError: there is no such preset.
    """
    presets = {"paper": PAPER, "reference": REFERENCE, "default": DEFAULT}
    if name not in presets:
        raise SettingsError(f"there is no preset {name!r}; expected one of {', '.join(presets)}")
    return presets[name]
