"""What an environment author imports needs no heavy package, nor does an evaluation of a policy that is not served."""

import subprocess
import sys

MODULES = (
    "agents.chat",
    "agents.dialects",
    "agents.episode_loop",
    "agents.policies.openai",
    "agents.sglang_policy",
    "envs.registry",
    "envs.tool_env",
    "envs.wrappers",
    "envs.search.tool",
    "tools.toolset",
)


def test_no_heavy_package_is_imported():
    imports = "; ".join(f"import polyturn.{module}" for module in MODULES)
    heavy = "{'torch', 'ray', 'sglang', 'megatron', 'transformers'}"
    played = "polyturn.evaluate('quickstart', 'evaluation.num_tasks=1', policy='oracle')"
    code = f"import sys, polyturn; {imports}; {played}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
