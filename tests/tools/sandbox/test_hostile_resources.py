"""Code that eats whatever there is gets no more than its limits, and the sandbox lives on."""

import pytest

from tests.support.hostile.containment import assert_contained
from tests.support.hostile.resources import RESOURCES


@pytest.mark.parametrize("snippet", RESOURCES, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_hostile(snippet, sandbox, baits):
    assert_contained(snippet, sandbox, baits)
