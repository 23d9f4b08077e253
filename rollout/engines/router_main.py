"""`python -m polyturn.rollout.engines.router_main ARGS` is sglang-router's launch_router.

Its own program imports SGLang, transformers and torch for a balancer in Python that is for debugging alone. The router
is compiled and needs none of them, so that it is there in a fraction of the time, and of the memory.
"""

from __future__ import annotations

import argparse
import sys

import setproctitle
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs


def main() -> None:
    """Route until told to stop."""
    setproctitle.setproctitle("sglang::router")
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser, use_router_prefix=False)
    arguments = RouterArgs.from_cli_args(parser.parse_args(sys.argv[1:]), use_router_prefix=False)
    arguments._validate_router_args()
    Router.from_args(arguments).start()


if __name__ == "__main__":
    main()
