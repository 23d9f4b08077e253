"""Takes a layer of a sandbox away, and shows what gets through then; so the tests of hostile code can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from polyturn.tools.sandbox import Sandbox
from tests.support.hostile.baits import Baits
from tests.support.hostile.containment import answer, breached, num_processes, run
from tests.support.hostile.escape import ESCAPES
from tests.support.hostile.persistent import NEIGHBOUR
from tests.support.hostile.resources import RESOURCES
from tests.support.hostile.runner import RUNNER
from tests.support.hostile.snippet import Hostile

SNIPPETS = {snippet.name: snippet for snippet in (*ESCAPES, *RESOURCES, *RUNNER, NEIGHBOUR)}

Probe = Callable[[Sandbox, Baits], bool]
"""Whether something gets through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """One layer and a probe."""

    layer: str
    probe: Probe
    without: tuple[str, ...] = ()
    """Other layers that stop the same; they are away in both runs."""
    of: str = ""
    """What the probe is about, for the test's name."""

    def __str__(self) -> str:
        return f"{self.layer}: {self.of}".replace(" ", "-")


def gets_through(name: str) -> Probe:
    """A probe by one of the snippets: it says BREACH, or ends as it must not."""
    snippet = SNIPPETS[name]

    def probe(sandbox: Sandbox, baits: Baits) -> bool:
        result = run(snippet, sandbox, baits)
        return breached(result) or result.status not in snippet.ends

    return probe


def by_snippet(layer: str, name: str, *, without: tuple[str, ...] = ()) -> Ablation:
    """The ablation of a layer that keeps a snippet from getting through."""
    return Ablation(layer=layer, probe=gets_through(name), without=without, of=name)


def leaves_a_process(sandbox: Sandbox, baits: Baits) -> bool:
    """Whether a daemon outlives its execution."""
    before = num_processes(sandbox)
    assert run(SNIPPETS["a daemon that closed everything"], sandbox, baits).ok
    return num_processes(sandbox) > before


def kills_its_neighbour(sandbox: Sandbox, baits: Baits) -> bool:
    """Whether a fresh execution can kill the persistent interpreter."""
    answer(sandbox, "name = 1; print(name)", fresh=False)
    run(NEIGHBOUR, sandbox, baits)
    return not sandbox.exec("print(name)", fresh=False).ok


def is_not_the_first_to_go(sandbox: Sandbox, baits: Baits) -> bool:
    """Whether the kernel, out of memory, would rather kill something else."""
    return answer(sandbox, "print(open('/proc/self/oom_score_adj').read())") != "1000"


def forks_at_will(sandbox: Sandbox, baits: Baits) -> bool:
    """Whether the code can have far more processes than it may."""
    snippet = Hostile(
        name="hundred processes",
        code="""
import os, time
count = 0
try:
    while count < 100:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        count += 1
except OSError:
    pass
print("BREACH" if count >= 64 else "stopped at", count)
""",
    )
    return breached(run(snippet, sandbox, baits))
