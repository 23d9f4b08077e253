"""What reaches out, and what attacks the runner, is contained in namespaces that bubblewrap made, too.

The number of files is left out: bubblewrap has no option for it, so they are bounded by the sandbox's memory alone.
"""

import pytest
from containment import assert_contained
from hostile_escape import ESCAPES
from hostile_resources import MEMORY, PROCESSES
from hostile_runner import RUNNER

from polyturn.tools.sandbox import SandboxUnavailable, make_backend

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
