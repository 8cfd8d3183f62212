"""What `dynlora analyze` draws covers every kind of matrix that can be adapted."""

import numpy as np
import pytest

from daemon.charts import matrix_kinds
from dynlora.blocks import NATIVE_MLP, TIMM_ATTENTIONS, TIMM_MLPS

RANKS = {"vision.0.q": 3, "vision.0.mlp_gate": 5, "vision.1.mlp_in": 7, "text.0.out": 2}


def test_kinds_come_in_the_order_of_a_block_and_unknown_ones_last():
    """Whatever the order of the names."""
    assert matrix_kinds(["text.0.zeta", "vision.3.mlp_in", "vision.0.q", "text.1.mlp_gate"]) == [
        "q",
        "mlp_gate",
        "mlp_in",
        "zeta",
    ]


def test_every_kind_that_the_learner_adapts_has_its_place():
    """None of them is drawn after the known ones as if it were unknown."""
    variants = [layers for group in TIMM_ATTENTIONS.values() for layers in group]
    made = {kind for layers in [*variants, *TIMM_MLPS.values(), NATIVE_MLP] for kinds in layers.values()
            for kind in kinds}  # fmt: skip

    assert matrix_kinds([f"vision.0.{kind}" for kind in made] + ["vision.0.a"])[-1] == "a"


def test_a_tower_with_gated_mlps_is_drawn_and_gaps_stay_empty():
    """Rows are the kinds that the tower has, columns its blocks."""
    analysis_plots = pytest.importorskip("daemon.analysis_plots", reason="needs the extra plots")

    kinds, grid = analysis_plots.allocation(RANKS, "vision")

    assert kinds == ["q", "mlp_gate", "mlp_in"]
    expected = np.array([[3, np.nan], [5, np.nan], [np.nan, 7]])
    np.testing.assert_array_equal(grid, expected)
