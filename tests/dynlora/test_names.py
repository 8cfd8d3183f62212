"""The learner's idea of one name is the store's."""

import hypothesis.strategies as st
from hypothesis import example, given

from deploy.manifest import class_key
from dynlora.names import same_name_key


@given(st.text())
@example("\u00df\u0301")  # a letter and its accent, which folding makes two letters and their accent
@example("  Red__T-Shirt ")
def test_two_spellings_are_one_name_for_the_learner_where_they_are_for_the_store(name: str) -> None:
    """The rooms share no code, so that they agree is tested."""
    assert same_name_key(name) == class_key(name)
