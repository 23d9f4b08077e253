"""How a model writes its answers: dialects that turn its text into thoughts, tool calls and what it says."""

from polyturn.agents.dialects.bare_json import JSONDialect
from polyturn.agents.dialects.dialect import Dialect
from polyturn.agents.dialects.hermes import HermesDialect
from polyturn.agents.dialects.python_calls import PythonDialect
from polyturn.agents.dialects.registry import make_dialect
from polyturn.agents.dialects.sglang_parsers import SGLangDialect
from polyturn.agents.dialects.tags import TagDialect

__all__ = [
    "Dialect",
    "HermesDialect",
    "JSONDialect",
    "PythonDialect",
    "SGLangDialect",
    "TagDialect",
    "make_dialect",
]
