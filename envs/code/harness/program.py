"""The harness as one program: the sources of its modules, and an importer that takes them from there."""

from __future__ import annotations

import functools
import marshal
from importlib.util import MAGIC_NUMBER
from pathlib import Path

PACKAGE = "polyturn.envs.code.harness"
MODULES = ("values", "answering", "asking", "scoring", "stand_in", "running", "main")
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
from polyturn.envs.code.harness.main import main
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
