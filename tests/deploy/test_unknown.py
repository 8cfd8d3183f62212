"""The unknown score and the calibration of scores."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.client import Client
from deploy.errors import ClientError
from deploy.manifest import MANIFEST_NAME, Manifest, load_manifest, save_manifest
from deploy.unknown import BACKGROUND, choose_background, rows_beside, unknown_scores
from tests.deploy.swaps import PICTURES

LOGITS = st.lists(st.floats(-100, 100), min_size=1, max_size=6)


@given(LOGITS, LOGITS, st.floats(-50, 50))
def test_the_score_is_a_share_and_does_not_move_with_all_logits(
    known: list[float], other: list[float], shift: float
) -> None:
    """Between 0 and 1 for any logits; only differences count, as in any softmax."""
    one, two = np.array([known]), np.array([other])
    [score] = unknown_scores(one, two)

    assert 0 <= score <= 1
    assert unknown_scores(one + shift, two + shift) == pytest.approx([score], abs=1e-6)
    assert unknown_scores(two, one) == pytest.approx([1 - score], abs=1e-6)


def test_the_background_is_what_is_least_like_the_classes() -> None:
    """A name beside a class would be held against pictures of that class."""
    classes = np.array([[1.0, 0.0]])
    background = np.array([[0.9, 0.1], [-1.0, 0.0], [0.0, 1.0], [0.8, 0.2]])

    assert choose_background(classes, background).tolist() == [1, 2]
    assert len(rows_beside(["tree", "no such name"])) == len(BACKGROUND) - 1
    assert len(set(BACKGROUND)) == len(BACKGROUND)


def test_a_picture_of_what_a_class_names_is_less_unknown_than_one_of_the_background(
    following: Client,
) -> None:
    """Seen from an embedding that is a class's own, and from one of the background's."""
    with following.hold() as loaded:
        own = loaded.class_embeddings[:1]
        chosen = choose_background(loaded.class_embeddings, loaded._background_embeddings())
        other = loaded._background_embeddings()[chosen[:1]]
        [known, unknown] = loaded.unknown(np.concatenate([own, other]))

    assert known < 0.5 < unknown
    assert following.classify(PICTURES[:1])[0].unknown is None
    assert 0 <= following.classify(PICTURES[:1], unknown=True)[0].unknown <= 1


def test_labels_that_name_the_whole_background_have_no_unknown_score(following: Client) -> None:
    """Nothing else is left to be like; one name beside them is enough."""
    [answer] = following.classify(PICTURES[:1], list(BACKGROUND[1:]), unknown=True)
    assert 0 < answer.unknown < 1
    with pytest.raises(ClientError, match="ask with fewer labels, or without `unknown`"):
        following.classify(PICTURES[:1], list(BACKGROUND), unknown=True)


def test_a_temperature_in_the_manifest_softens_the_scores_and_changes_no_order(
    serving: Path,
) -> None:
    """softmax(logits / temperature); without one, logit_scale alone, as ever."""
    with Client(serving) as client:
        plain = client.classify(PICTURES[:1], top=10)[0].predictions
    directory = serving / "versions" / "0"
    manifest = load_manifest(directory)
    (directory / MANIFEST_NAME).chmod(0o644)
    save_manifest(directory, Manifest(**(manifest.model_dump() | {"temperature": 2.0})))
    with Client(serving) as client:
        soft = client.classify(PICTURES[:1], top=10)[0].predictions

    assert [p.label for p in soft] == [p.label for p in plain]
    roots = np.sqrt([p.score for p in plain])
    assert [p.score for p in soft] == pytest.approx(list(roots / roots.sum()), abs=1e-4)


def test_a_manifest_without_calibration_does_not_mention_it(serving: Path) -> None:
    """So releases that know no calibration read it; one of 0 is refused."""
    manifest = load_manifest(serving / "versions" / "0")
    assert "temperature" not in json.loads(manifest.model_dump_json())
    assert Manifest(**(manifest.model_dump() | {"temperature": 1.5})).model_dump()["temperature"] == 1.5
    with pytest.raises(ValueError, match="temperature"):
        Manifest(**(manifest.model_dump() | {"temperature": 0.0}))
