"""Publish or hold: the decision about one candidate version. Pure: figures in, decision out.

A batch is held only on evidence. Three rules, all of which must pass:

    gain       the new batch's own exam improved by at least `min_gain`, unless there was no room to
    own_exam   no significant loss on the new batch's own exam (it may have been known before)
    old_exams  no significant loss on the pooled exams of all batches kept before

Significant: the exact one-sided McNemar test on the flips has a p-value below `alpha`. Under 20
exam images a batch's own gain says too little either way: the first rule passes with a warning and the pooled
exams decide. Taking a batch out again has nothing to gain: the last rule alone decides, over the exams of the
batches that stay.
"""

from collections.abc import Sequence

from daemon.config import ExamConfig
from daemon.report import ExamResult
from deploy.manifest import Decision, RuleResult

MIN_EXAM_IMAGES = 20  # below this a batch's own gain is noise


def decide(exams: Sequence[ExamResult], config: ExamConfig) -> Decision:
    """Decide about a candidate from its exams.

    Args:
        exams: the first entry is the new batch's own exam, the others are older batches'. Empty when exams
            are switched off: everything is then published.
        config: `min_gain` (a fraction of the exam images) and `alpha`.
    """
    own, older = exams[:1], exams[1:]
    rules = [
        _gain_rule(own, config),
        _loss_rule("own_exam", own, config.alpha),
        _loss_rule("old_exams", older, config.alpha),
    ]
    outcome = "publish" if all(rule.passed for rule in rules) else "hold"
    return Decision(outcome=outcome, rules=tuple(rules))


def decide_revert(exams: Sequence[ExamResult], config: ExamConfig) -> Decision:
    """Decide about a candidate that lacks one batch, from the exams of the batches that stay."""
    rule = _loss_rule("old_exams", exams, config.alpha)
    return Decision(outcome="publish" if rule.passed else "hold", rules=(rule,))


def overruled(decision: Decision, who: str, why: str) -> Decision:
    """The same findings, published because an operator wants it so; says who and why."""
    detail = f"{who} decided" + (f": {why}" if why else " and gave no reason")
    rule = RuleResult(rule="operator", passed=True, detail=detail)
    return Decision(outcome="publish", rules=(*decision.rules, rule))


def loss_p_value(gained: int, lost: int) -> float:
    """Exact one-sided McNemar test: how likely `lost` or more losses among all flips are by mere chance.

    Under the null hypothesis a flip is a gain or a loss with equal probability. Integers throughout: exact
    for any number of flips, and monotone in `lost`.
    """
    flips = gained + lost
    tail = term = 1  # C(flips, 0): the number of ways to choose which flips are gains, summed up to `gained`
    for k in range(1, gained + 1):
        term = term * (flips - k + 1) // k
        tail += term
    return float(tail / 2**flips)


def _gain_rule(own: Sequence[ExamResult], config: ExamConfig) -> RuleResult:
    images = sum(exam.images for exam in own)
    if images < MIN_EXAM_IMAGES:
        return RuleResult(
            rule="gain",
            passed=True,
            detail=f"warning: only {images} exam images of this batch, {MIN_EXAM_IMAGES} are needed to "
            "judge its gain; the exams of earlier batches decide",
        )
    before = sum(exam.correct_before for exam in own)
    after = sum(exam.correct_after for exam in own)
    figures = f"{before / images:.1%} → {after / images:.1%} right on {images} exam images"
    needed = config.min_gain * images
    if images - before == 0 or images - before < needed:
        return RuleResult(rule="gain", passed=True, detail=f"no room to gain: {figures}")
    passed = after - before >= needed
    verdict = "gain" if passed else "gain too small"
    gain = (after - before) / images
    return RuleResult(
        rule="gain",
        passed=passed,
        detail=f"{verdict}: {figures}; expected at least {config.min_gain:+.1%}, found {gain:+.1%}",
    )


def _loss_rule(name: str, exams: Sequence[ExamResult], alpha: float) -> RuleResult:
    gained = sum(exam.gained for exam in exams)
    lost = sum(exam.lost for exam in exams)
    images = sum(exam.images for exam in exams)
    if images == 0:
        return RuleResult(rule=name, passed=True, detail="no exam images to lose on")
    p_value = loss_p_value(gained, lost)
    passed = p_value >= alpha
    verdict = "no evidence of loss" if passed else "evidence of loss"
    return RuleResult(
        rule=name,
        passed=passed,
        detail=f"{verdict}: {gained} images gained, {lost} lost of {images}; "
        f"one-sided McNemar p = {p_value:.3g}, held below alpha = {alpha:g}",
    )
