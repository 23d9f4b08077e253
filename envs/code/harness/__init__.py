"""Runs unit tests inside a sandbox. Its source is sent there; nothing of it runs in the host's process.

Two processes that share nothing but two pipes:

    tests (trusted)  -- {"call": [...], "names": {...}} -->  solution (what the model wrote)
                     <-- {"value": ..., "arguments": [...]} or {"error": [kinds, text]} --

The solution's process is forked first, before the tests and the nonce are read from stdin, so they are nowhere in its
memory (nor in that of the runner, of which both are forks). Values cross as tagged JSON and arrive as plain built-in
values, so no object of the solution's ever meets a test: an `__eq__`, a decorator, a patched builtin or a printed
verdict of the solution's stays in its own process. The process of the tests cannot be traced or read by the other (it
is not dumpable), imports nothing from the work folder, and writes its verdict after a nonce that only it and the host
know. If it is killed there is no verdict, which the host takes for a failure.

- `values`: what crosses, and how.
- `solution`: the two processes, and the solution's side.
- `tests`: the function as the tests see it; the tests are run, whatever their form; every assertion is noticed.

`harness` is the source that the sandbox gets: the modules, and an importer that takes them from there.
"""

from __future__ import annotations

import functools
import marshal
from importlib.util import MAGIC_NUMBER
from pathlib import Path

PACKAGE = "polyturn.envs.code.harness"
MODULES = ("values", "solution", "tests")
_START = """
import marshal, sys
from importlib._bootstrap_external import MAGIC_NUMBER
from importlib.machinery import ModuleSpec

class Importer:
    def find_spec(self, name, path=None, target=None):
        if name in SOURCES:
            return ModuleSpec(name, self, is_package=not SOURCES[name])
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        name = module.__name__
        if MAGIC_NUMBER == MAGIC:
            code = marshal.loads(COMPILED[name])
        else:
            code = compile(SOURCES[name], name, "exec", dont_inherit=True)
        exec(code, module.__dict__)

sys.meta_path.insert(0, Importer())
from polyturn.envs.code.harness.solution import main
main()
"""


@functools.cache
def harness() -> str:
    """The source of the program that runs in the sandbox, with its byte code for an interpreter like this one."""
    folder = Path(__file__).parent
    sources = {".".join(PACKAGE.split(".")[: depth + 1]): "" for depth in range(PACKAGE.count(".") + 1)}
    for name in MODULES:
        sources[f"{PACKAGE}.{name}"] = folder.joinpath(f"{name}.py").read_text(encoding="utf-8")
    compiled = {
        name: marshal.dumps(compile(source, name, "exec", dont_inherit=True))
        for name, source in sources.items()
    }
    return f"SOURCES = {sources!r}\nCOMPILED = {compiled!r}\nMAGIC = {MAGIC_NUMBER!r}\n{_START}"
