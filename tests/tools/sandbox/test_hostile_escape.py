"""Code that reaches for files, secrets, the network or privileges outside gets none of them."""

import pytest
from containment import assert_contained
from hostile_escape import ESCAPES


@pytest.mark.parametrize("snippet", ESCAPES, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_hostile(snippet, sandbox, baits):
    assert_contained(snippet, sandbox, baits)
