"""`python -m polyturn.rollout.engines.serve ARGS` is SGLang's launch_server, also on a CPU without AMX.

The stand-ins are installed when this module is imported, not in `main`: SGLang spawns its scheduler and
detokenizer, and a spawned process imports the main module first, with the same command line.
"""

from __future__ import annotations

import os
import sys

from polyturn.rollout.engines import sglang_cpu

if sglang_cpu.is_for_cpu(sys.argv):
    sglang_cpu.install(
        seeded="--enable-deterministic-inference" in sys.argv,
        records_routing="--enable-return-routed-experts" in sys.argv,
    )


def main() -> None:
    """Serve until told to stop."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    arguments = prepare_server_args(sys.argv[1:])
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
