"""A run has the file descriptors that its requests need, or is refused in a sentence."""

import gc
import subprocess
import sys

from polyturn.rollout.limits import spare_what_stays

SCRIPT = """
import resource, sys
from polyturn.configs.schema.rollout import RolloutConfig
from polyturn.rollout.limits import allow_open_files
soft, hard, requests = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
config = RolloutConfig(
    prompts_per_step=1, samples_per_prompt=1, max_concurrent_requests=requests, max_concurrent_episodes=100
)
try:
    allow_open_files(config)
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except ValueError as error:
    print(error)
"""


def limit_after(soft, hard, requests):
    command = [sys.executable, "-c", SCRIPT, str(soft), str(hard), str(requests)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_the_soft_limit_grows_as_far_as_the_hard_one_lets_it_and_no_run_starts_below_its_need():
    assert limit_after(256, 4096, 500) == str(500 + 128 + 200)
    assert limit_after(256, 700, 500) == "700"
    assert limit_after(2048, 4096, 500) == "2048"
    assert "=500 needs as many connections, and this process may have 300 files open" in limit_after(
        256, 300, 500
    )


def test_the_garbage_collector_is_as_before_once_nothing_is_played():
    """Frozen at the end of a process, libraries would report all that is theirs as leaked."""
    thresholds = gc.get_threshold()
    with spare_what_stays():
        assert gc.get_freeze_count() > 10_000 and gc.get_threshold() != thresholds
    assert (gc.get_threshold(), gc.get_freeze_count()) == (thresholds, 0)
