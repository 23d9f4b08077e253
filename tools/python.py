"""Python as a tool: code that a model wrote runs in a sandbox of the episode's own."""

from __future__ import annotations

from typing import Any

from polyturn.tools.decorator import tool
from polyturn.tools.sandbox import ExecResult, Limits, Sandbox
from polyturn.tools.shared_sandboxes import SharedSandboxes, default_sandboxes, execute
from polyturn.tools.stateful import StatefulTool
from polyturn.tools.types import ToolError

MAX_OUTPUT_CHARS = 8_000
NO_OUTPUT = "(no output; print what you want to see)"


class _SandboxTool(StatefulTool):
    """Holds a sandbox that is made at the first call, and closed with the episode."""

    def __init__(
        self,
        sandboxes: SharedSandboxes | None = None,
        *,
        timeout_s: float = 5.0,
        limits: Limits | None = None,
    ) -> None:
        """
        Args:
            sandboxes: Where the sandbox comes from; None: from whatever backend works here, which then lives as long as
                the process. An environment that frees it in `close` passes a lease of its own.
            timeout_s: Seconds for one call.
            limits: Of the sandbox.
        """
        self._sandboxes = sandboxes or default_sandboxes()
        self._timeout_s = timeout_s
        self._limits = limits or Limits()
        self._sandbox: Sandbox | None = None

    def run(self, code: str, *, stdin: str = "", fresh: bool) -> str:
        """What the code wrote. Raises `ToolError` with the same and the reason where it did not end well."""
        if self._sandbox is None:
            self._sandbox = self._sandboxes.create(self._limits)
        result = execute(self._sandbox, code, stdin=stdin, timeout_s=self._timeout_s, fresh=fresh)
        shown = show(result)
        if result.ok:
            return shown
        raise ToolError(shown)

    def close(self) -> None:
        """Close the sandbox."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()


class PythonTool(_SandboxTool):
    """`python(code)`: one interpreter for the episode, whose names live on from call to call (as in ReTool)."""

    @tool(max_output_chars=MAX_OUTPUT_CHARS)
    def python(self, code: str) -> str:
        """Run Python code and get what it prints. Variables and files stay from one call to the next.

        Args:
            code: Python source. Print what you want to see.
        """
        return self.run(code, fresh=False)


class RunCodeTool(_SandboxTool):
    """`run_code(code, stdin)`: a new interpreter for every call."""

    @tool(max_output_chars=MAX_OUTPUT_CHARS)
    def run_code(self, code: str, stdin: str = "") -> str:
        """Run a Python program of its own and get what it prints.

        Args:
            code: Python source of the whole program.
            stdin: What the program reads from its standard input.
        """
        return self.run(code, stdin=stdin, fresh=True)


def show(result: ExecResult) -> str:
    """A result as the model reads it: what was written, then what went wrong."""
    parts: list[Any] = [result.stdout.rstrip("\n"), result.stderr.rstrip("\n")]
    if result.status != "ok":
        parts.append(f"[{result.status}: {result.detail}]")
    elif result.exit_code != 0 and not result.stderr.strip():
        parts.append(f"[exit status {result.exit_code}]")
    if result.status == "ok" and result.detail:
        parts.append(f"[{result.detail}]")
    return "\n".join(part for part in parts if part) or NO_OUTPUT
