"""What reaches out, and what attacks the runner, is contained in namespaces that bubblewrap made, too.

The number of files is left out: bubblewrap has no option for it, so they are bounded by the sandbox's memory alone.
"""

import pytest

from polyturn.tools.sandbox import SandboxUnavailable, make_backend
from tests.support.hostile.containment import assert_contained
from tests.support.hostile.escape import ESCAPES
from tests.support.hostile.resources import MEMORY, PROCESSES
from tests.support.hostile.runner import RUNNER

# The slow ones say nothing new about what bubblewrap does.
SNIPPETS = [*ESCAPES, *PROCESSES, *(s for s in MEMORY if s.name != "decompression bomb"), *RUNNER]


@pytest.fixture(scope="module")
def backend(baits):
    try:
        running = make_backend("embedded", launcher="bubblewrap")
    except SandboxUnavailable as reason:
        pytest.skip(str(reason))
    yield running
    running.close()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name.replace(" ", "-"))
def test_hostile(snippet, sandbox, baits):
    assert_contained(snippet, sandbox, baits)
