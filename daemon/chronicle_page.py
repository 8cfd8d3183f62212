"""The page of `dynlora report`: one HTML file with everything in it, readable for years without a network."""

from datetime import UTC, datetime
from html import escape
from importlib import resources

from daemon.charts import Cell, bars, curves, heat_map, matrix_kinds
from daemon.chronicle import Chronicle, moment
from daemon.comparison import Comparison, Flip, shown, thumbnail
from daemon.report import exam_rows
from deploy.manifest import Manifest

MATRIX_VERSIONS = 30
RANK_VERSIONS = 12
MOST_CLASSES = 60
# What a browser may do with it: show it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(found: Chronicle, comparison: Comparison | None, now: datetime) -> str:
    """The whole page."""
    style = resources.files("daemon").joinpath("observability", "report.css").read_text(encoding="utf-8")
    sections = [
        ("Accuracy of every version on every exam", _matrix(found)),
        ("Kept ranks", _ranks(found)),
        ("How far the weights moved", _norms(found)),
        ("How far the embeddings moved", _embeddings(found)),
        ("What changed for the exam images", _comparison(comparison)),
        ("Decisions", _decisions(found)),
        ("Classes of the live version", _classes(found)),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    warnings = "".join(f'<p class="bad">{escape(sentence)}</p>' for sentence in found.missing)
    live = next((m for m in found.manifests if m.version == found.live), None)
    model = f"{escape(live.architecture)}, " if live else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>dynlora: version {found.live}</title><style>{style}</style></head><body>"
        f"<h1>dynlora <small>version {found.live} is live</small></h1>"
        f"<p>{model}{len(found.manifests)} versions, {len(found.classes)} class names, in "
        f"<code>{escape(str(found.home))}</code>; written {now.astimezone(UTC):%Y-%m-%d %H:%M} UTC</p>"
        f"{warnings}{body}</body></html>\n"
    )


def _matrix(found: Chronicle) -> str:
    graded = [m for m in found.manifests if exam_rows(m)][-MATRIX_VERSIONS:]
    if not graded:
        return '<p class="none">no version was graded yet</p>'
    exams = list(dict.fromkeys(str(r["batch"]) for m in graded for r in reversed(exam_rows(m))))
    exams.sort()
    cells: dict[tuple[int, int], Cell] = {}
    for row, manifest in enumerate(graded):
        for exam in exam_rows(manifest):
            before, after = exam["accuracy_before"], exam["accuracy_after"]
            about = f"version {manifest.version} on {exam['batch']}: {before:.1%} before, {after:.1%} after, "
            about += f"{exam['images']} images, {exam['negative_flips']} lost"
            cells[row, exams.index(str(exam["batch"]))] = (after, f"{after:.0%}".rstrip("%"), about)
    only = _limit(len(graded), MATRIX_VERSIONS, "graded versions")
    note = f"<p>Per cent right among all known names. {only}</p>"
    return note + heat_map([f"version {m.version}" for m in graded], exams, cells, size=30)


def _ranks(found: Chronicle) -> str:
    learnt = [m for m in found.manifests if m.ranks][-RANK_VERSIONS:]
    if not learnt:
        return '<p class="none">nothing was learnt yet</p>'
    most = max(rank for m in learnt for rank in (m.ranks or {}).values()) or 1
    only = _limit(len(learnt), RANK_VERSIONS, "versions")
    note = f"<p>Rank that each matrix's update kept, by layer. {only}</p>"
    return note + f'<div class="row">{"".join(_rank_map(m, most) for m in learnt)}</div>'


def _rank_map(manifest: Manifest, most: int) -> str:
    ranks = manifest.ranks or {}
    split = {key: tuple(key.split(".")) for key in ranks}
    if any(len(parts) != 3 or not parts[1].isdecimal() for parts in split.values()):
        rows = sorted(ranks)  # named otherwise than a transformer's layers: one row for each
        cells = {(n, 0): (ranks[k] / most, str(ranks[k]), f"{k}: {ranks[k]}") for n, k in enumerate(rows)}
        return _figure(heat_map(rows, ["rank"], cells), f"version {manifest.version}")
    towers = sorted({parts[0] for parts in split.values()}, reverse=True)
    layers = 1 + max(int(parts[1]) for parts in split.values())
    kinds = matrix_kinds(ranks)
    rows = [f"{tower} {kind}" for tower in towers for kind in kinds]
    cells = {}
    for key, (tower, layer, kind) in split.items():
        place = rows.index(f"{tower} {kind}"), int(layer)
        cells[place] = (ranks[key] / most, str(ranks[key]), f"{key}: rank {ranks[key]}")
    total = sum(ranks.values())
    caption = f"version {manifest.version}, {total} in all"
    drawn = heat_map(rows, [str(n) for n in range(layers)], cells)
    return _figure(drawn, caption)


def _figure(drawn: str, caption: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def _norms(found: Chronicle) -> str:
    series = {
        "drift from version 0": found.series("drift_norm"),
        "size of the update": found.series("delta_norm"),
    }
    return "<p>Frobenius norms: ‖θ − θ₀‖ and ‖ΔW‖.</p>" + curves(series)


def _embeddings(found: Chronicle) -> str:
    series = {
        "images": found.series("mean_image_cosine"),
        "class names": found.series("mean_text_cosine"),
    }
    return (
        "<p>Mean cosine between a version's embeddings and its parent's; 1 is no change. The default preset "
        "leaves those of images as they are. After any other change vectors of two versions are not "
        "comparable: an index over image embeddings is to be built anew when such a version goes live, by a "
        "hook on <code>published</code> for one.</p>" + curves(series, digits=4)
    )


def _comparison(comparison: Comparison | None) -> str:
    if comparison is None:
        return '<p class="none">not looked at</p>'
    if comparison.why_not:
        return f'<p class="none">{escape(comparison.why_not)}</p>'
    words = (
        f"<p>Version {comparison.before} and version {comparison.after}, asked about {comparison.images} "
        f"kept exam images among the names that are known now. {len(comparison.gained)} became right, "
        f"{len(comparison.lost)} became wrong. Mean score of the right name: {comparison.mean_before:.3f} → "
        f"{comparison.mean_after:.3f}.</p>"
    )
    shift = heat_map(
        ["images"],
        [f"{low / 10:+.1f}" for low in range(-10, 10, 2)],
        {
            (0, n): (count / max(1, *comparison.shifts), str(count), f"{count} images")
            for n, count in enumerate(comparison.shifts)
        },
        size=38,
    )
    flips = [
        _flip(flip, kind)
        for kind, some in (("bad", comparison.lost), ("good", comparison.gained))
        for flip in shown(some)
    ]
    return f'{words}<p>How that score moved:</p>{shift}<div class="row flips">{"".join(flips)}</div>'


def _flip(flip: Flip, kind: str) -> str:
    picture = thumbnail(flip.path)
    drawn = f'<img src="{picture}" alt="">' if picture else ""
    words = (
        f"{escape(flip.truth)}:<br><s>{escape(flip.before)}</s> {flip.score_before:.2f}"
        f'<br><b class="{kind}">{escape(flip.after)}</b> {flip.score_after:.2f}'
    )
    return f"<figure>{drawn}<figcaption>{words}</figcaption></figure>"


def _decisions(found: Chronicle) -> str:
    rows = [_decision(m) for m in reversed(found.manifests)]
    rows += [
        f'<tr><td class="bad">{entry.state}</td><td>{escape(entry.batch)}</td><td></td><td></td>'
        f"<td>{'<br>'.join(map(escape, entry.reasons))}</td></tr>"
        for entry in found.unpublished
    ]
    head = "<tr><th>version</th><th>batch</th><th>made</th><th>images</th><th>why</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _decision(manifest: Manifest) -> str:
    batch = manifest.batch
    rules = manifest.decision.rules if manifest.decision else ()
    marks = {True: '<span class="good">✓</span>', False: '<span class="bad">✗</span>'}
    why = "<br>".join(f"{marks[rule.passed]} {escape(rule.detail)}" for rule in rules)
    counts = f"{batch.images.train} learnt, {batch.images.exam} exam" if batch else ""
    what = f"{escape(batch.id)}<br><small>{escape(', '.join(batch.classes))}</small>" if batch else ""
    made = f"{manifest.kind}, {moment(manifest)}" + (
        f"<br>by {escape(manifest.operator)}" if manifest.operator else ""
    )
    cells = (str(manifest.version), what, made, counts, why)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _classes(found: Chronicle) -> str:
    learnt = sorted((c for c in found.classes if c.train + c.exam), key=lambda c: -(c.train + c.exam))
    others = len(found.classes) - len(learnt)
    drawn = bars([(c.name, (c.train, c.exam)) for c in learnt[:MOST_CLASSES]]) if learnt else ""
    left = len(learnt) - MOST_CLASSES
    more = f"{left} more were learnt. " if left > 0 else ""
    keys = '<span class="key c0">learnt from</span><span class="key c1">kept for exams</span>'
    legend = f'<p class="legend">{keys}</p>'
    return f"<p>{more}{others} names are known without images on record.</p>{drawn}{legend if learnt else ''}"


def _limit(count: int, limit: int, what: str) -> str:
    return f"The last {limit} {what}." if count == limit else ""
