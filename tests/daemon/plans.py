"""A plan, for tests to vary."""

from daemon.plan import Plan

PLAN = Plan(
    batch="000001-cups",
    content_sha256="a" * 64,
    parent=0,
    parent_weights_sha256="b" * 64,
    seed=7,
    splits={"c" * 64: "train"},
    threads=2,
    preset="default",
    settings={"rank": 16},
    software={"torch": "2"},
)
