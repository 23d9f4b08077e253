"""What an environment author and an evaluator import needs no heavy package."""

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
    code = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
