"""What stands beside a frozen model's blocks: attached while it is needed, trained alone, taken off again.

Its methods change the architecture: what they learn cannot be added to the weights, so no delta can carry it
and it costs parameters and time at inference. The model itself is left as it was found after every call.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from benchmarks.stream.methods import Budget, Lesson, Params
from benchmarks.stream.tuning import FullTuning
from dynlora import Clip, Task
from dynlora.blocks import Block, class_path, find_blocks
from dynlora.errors import ModelError

Branch = Callable[[Tensor], Tensor]  # (N, L, D) → (N, L, D)

_PVT_ATTENTION = "timm.models.pvt_v2.Attention"


@contextmanager
def beside(branches: Mapping[nn.Module, Branch]) -> Iterator[None]:
    """While open, each module's output is its own plus what its branch makes of the same input."""
    handles = [module.register_forward_hook(_adding(branch)) for module, branch in branches.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(branch: Branch) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        more = branch(inputs[0])
        return (output[0] + more, *output[1:]) if isinstance(output, tuple) else output + more

    return hook


def blocks_of(model: nn.Module) -> list[Block]:
    """Both towers' blocks, each with a LayerNorm before its `attn` and its `mlp`.

    Raises:
        ModelError: a block attends in a way whose queries and output cannot be had from outside.
    """
    blocks = find_blocks(model)
    for block in blocks:
        attention = getattr(block.module, "attn", None)
        if not isinstance(attention, nn.MultiheadAttention) and class_path(attention) != _PVT_ATTENTION:
            raise ModelError(
                f"nothing can be put beside the attention of {block.path}, a {class_path(attention)}; "
                f"expected nn.MultiheadAttention or {_PVT_ATTENTION}"
            )
    return blocks


def width_of(block: Block) -> int:
    """D of what a block reads and writes."""
    norm = block.module.ln_1 if hasattr(block.module, "ln_1") else block.module.norm1
    width: int = norm.normalized_shape[0]  # type: ignore[index, union-attr, assignment]
    return width


class Adapter(FullTuning, ABC):
    """Learns as full tuning does, but the optimiser moves only what `grown` returns; all else is frozen."""

    changes_architecture = True

    def __init__(self) -> None:
        super().__init__()
        self._growing: list[Tensor] = []

    def learn(self, clip: Clip, task: Task, budget: Budget, params: Params, *, seed: int) -> Lesson:
        """Add this task's part, train it, freeze it."""
        self._growing = self.grown(clip, task, seed)
        with beside(self.branches(clip.model)):
            lesson = super().learn(clip, task, budget, params, seed=seed)
        for tensor in self._growing:
            tensor.requires_grad_(False)
        return lesson

    def trained(self, weights: dict[str, Tensor]) -> list[Tensor]:
        """The new part alone."""
        del weights
        return [tensor.requires_grad_(True) for tensor in self._growing]

    @abstractmethod
    def grown(self, clip: Clip, task: Task, seed: int) -> list[Tensor]:
        """Whatever this task adds and trains, made anew; at first it changes no output."""

    @abstractmethod
    def branches(self, model: nn.Module) -> dict[nn.Module, Branch]:
        """What is beside which part of the model while the last task is learnt."""
