"""Code that reaches for files, secrets, the network or privileges outside gets none of them."""

import pytest

from tests.support.hostile.containment import assert_contained
from tests.support.hostile.escape import ESCAPES


@pytest.mark.parametrize("snippet", ESCAPES, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_hostile(snippet, sandbox, baits):
    assert_contained(snippet, sandbox, baits)
