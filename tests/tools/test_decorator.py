"""Signature and docstring become the schema that a model is shown."""

from typing import Literal

import pytest

from polyturn.tools.tool import as_tool, tool, tools_of


def test_signature_and_docstring_give_the_schema():
    @tool
    def book(
        city: str,
        nights: int,
        kind: Literal["hotel", "hostel"] = "hotel",
        guests: list[int] | None = None,
        extras: dict[str, float] | None = None,
        price: float = 1.5,
        late: bool = False,
    ) -> str:
        """Book a room.

        Rooms are booked
        at once.

        Args:
            city: Where,
                in full.
            nights (int): How many.

        Returns:
            not: for the model
        """
        return city

    spec = as_tool(book).spec
    assert spec.name == "book"
    assert spec.description == "Book a room. Rooms are booked at once."
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where, in full."},
            "nights": {"type": "integer", "description": "How many."},
            "kind": {"type": "string", "enum": ["hotel", "hostel"], "default": "hotel"},
            "guests": {
                "anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}],
                "default": None,
            },
            "extras": {
                "anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}],
                "default": None,
            },
            "price": {"type": "number", "default": 1.5},
            "late": {"type": "boolean", "default": False},
        },
        "required": ["city", "nights"],
    }
    assert book("Ashford", 2) == "Ashford"


def test_name_and_description_can_be_given():
    @tool(name="look_up", description="Look a word up.")
    def f(word: str | int) -> str:
        """Not this."""
        return str(word)

    spec = as_tool(f).spec
    assert (spec.name, spec.description) == ("look_up", "Look a word up.")
    assert spec.parameters["properties"] == {"word": {"type": ["string", "integer"]}}


def test_methods_of_base_classes_come_first_and_can_be_overridden():
    class Base:
        @tool
        def first(self) -> str:
            """One."""
            return "base"

        @tool
        def second(self, x: int) -> str:
            """Two."""
            return "base"

    class Derived(Base):
        @tool
        def third(self) -> str:
            """Three."""
            return "derived"

        @tool
        def first(self) -> str:
            """Uno."""
            return "derived"

    tools = list(tools_of(Derived()))
    assert [t.spec.name for t in tools] == ["first", "second", "third"]
    assert tools[0].spec.description == "Uno."
    assert tools[0].function() == "derived"


def test_what_a_model_cannot_be_told_is_refused():
    def untyped(x):
        return x

    def strange(x: complex) -> None: ...

    def keywords(**x: int) -> None: ...

    def mixed(x: Literal["a", 1]) -> None: ...

    def misnamed(query: str) -> None:
        """Search.

        Args:
            qeury: What to look for.
        """

    for function, words in [
        (untyped, "'x' has no type"),
        (strange, "complex"),
        (keywords, "named arguments only"),
        (mixed, "choices must be all strings or all integers"),
        (misnamed, "'qeury', which is not a parameter"),
    ]:
        with pytest.raises(ValueError, match=words):
            tool(function)
