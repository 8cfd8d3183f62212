"""Rank-selective LoRA for CLIP: load a model, adapt it to a task, get a small pruned update back."""

from dynlora.clip import Clip, load_clip
from dynlora.errors import DynloraError
from dynlora.learner import Adaptation, Factor, Hooks, Progress, adapt
from dynlora.settings import Settings, preset
from dynlora.task import Name, Task

__all__ = [
    "Adaptation",
    "Clip",
    "DynloraError",
    "Factor",
    "Hooks",
    "Name",
    "Progress",
    "Settings",
    "Task",
    "adapt",
    "load_clip",
    "preset",
]
