"""Types of one's own as parameters: the model sees their schema, and the function gets their values."""

import dataclasses
import enum
from typing import Annotated, NotRequired, TypedDict

import pydantic
import pytest

from polyturn.tools.tool import as_tool, tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Place:
    street: str
    number: Annotated[int, pydantic.Field(ge=1)] = 1
    colour: Colour = Colour.RED

    def __post_init__(self):
        if self.street == "Nowhere":
            raise ValueError("there is no street 'Nowhere'")


class Item(TypedDict):
    name: str
    colour: NotRequired[Colour]


class Person(pydantic.BaseModel):
    name: Annotated[str, pydantic.Field(min_length=2)]
    friends: list["Friend"] = []


class Friend(pydantic.BaseModel):
    title: str

    @pydantic.field_validator("title")
    @classmethod
    def no_enemies(cls, value):
        if value == "enemy":
            raise ValueError("an enemy is no friend")
        return value


class Tree(pydantic.BaseModel):
    children: list["Tree"] = []


seen = []


@tool
def visit(
    place: Place,
    items: list[Item],
    person: Person | None = None,
    colour: Colour = Colour.BLUE,
    hours: Annotated[int, "How long to stay.", pydantic.Field(gt=0, le=24)] = 1,
    tags: Annotated[list[str], pydantic.Field(max_length=2)] = (),
    where: dict[str, Place] | None = None,
) -> str:
    """Visit."""
    seen.append((place, items, person, colour, hours, tags, where))
    return "visited"


def call(**arguments):
    return Toolset([visit]).call(ToolCall(id="c", name="visit", arguments=arguments))


def test_the_schema_says_all_of_it():
    properties = as_tool(visit).spec.parameters["properties"]
    colour = {"type": "string", "enum": ["red", "blue"]}
    assert properties["place"] == {
        "type": "object",
        "properties": {
            "street": {"type": "string"},
            "number": {"type": "integer", "minimum": 1},
            "colour": colour,
        },
        "required": ["street"],
        "additionalProperties": False,
    }
    assert properties["items"]["items"]["required"] == ["name"]
    assert properties["colour"] == colour | {"default": "blue"}
    assert properties["hours"] == {
        "type": "integer",
        "description": "How long to stay.",
        "exclusiveMinimum": 0,
        "maximum": 24,
        "default": 1,
    }
    assert properties["tags"]["maxItems"] == 2
    friends = properties["person"]["anyOf"][0]["properties"]["friends"]
    assert friends["items"] == {
        "type": "object",
        "properties": {"title": {"type": "string"}},
        "required": ["title"],
    }, "a property called title stays, pydantic's own titles and references do not"


def test_the_function_gets_values_of_its_types():
    seen.clear()
    result = call(
        place={"street": "High Street", "colour": "blue"},
        items=[{"name": "a", "colour": "red"}],
        person={"name": "Mo", "friends": [{"title": "x"}]},
        colour="red",
        where={"here": {"street": "Low Street"}},
    )
    assert result.ok, result.content
    place = Place("High Street", 1, Colour.BLUE)
    person = Person(name="Mo", friends=[Friend(title="x")])
    items = [{"name": "a", "colour": Colour.RED}]
    assert seen == [(place, items, person, Colour.RED, 1, (), {"here": Place("Low Street")})]
    assert call(place={"street": "x"}, items=[]).ok
    assert seen[-1][2:4] == (None, Colour.BLUE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"place": {"number": 3}}, "'place': 'street' is a required property"),
        ({"place": {"street": "x", "number": 0}}, "'place.number': 0 is less than the minimum of 1"),
        ({"place": {"street": "x", "town": "y"}}, "'town' was unexpected"),
        ({"place": {"street": "Nowhere"}}, "argument 'place': there is no street 'Nowhere'"),
        ({"place": {"street": "x", "colour": "green"}}, '\'place.colour\' must be one of "red", "blue"'),
        ({"items": [{"name": 3}]}, "'items[0].name' must be string, not 3"),
        ({"person": 3}, "'person' must be object or null, not 3"),
        ({"person": {"name": "M"}}, "'person.name': 'M' is too short"),
        (
            {"person": {"name": "Mo", "friends": [{"title": "enemy"}]}},
            "argument 'person': friends.0.title: Value error, an enemy is no friend",
        ),
        ({"hours": 25}, "'hours': 25 is greater than the maximum of 24"),
        ({"tags": ["a", "b", "c"]}, "'tags'"),
        ({"colour": "green"}, "'colour' must be one of"),
    ],
)
def test_what_is_wrong_is_told_to_the_model(arguments, words):
    seen.clear()
    result = call(**{"place": {"street": "x"}, "items": []} | arguments)
    assert not result.ok
    assert words in result.content
    assert "was not made" in result.content
    assert seen == []


def test_a_type_that_contains_itself_is_refused():
    def climb(tree: Tree) -> None: ...

    with pytest.raises(ValueError, match="Tree contains itself"):
        tool(climb)


def test_results_of_these_types_are_shown_as_json():
    @tool
    def find(kind: str) -> object:
        """Find."""
        return {
            "place": Place("x"),
            "person": [Person(name="Mo"), Colour.RED],
            "set": {1},
            "strange": object,
        }[kind]

    def content(kind):
        return Toolset([find]).call(ToolCall(id="c", name="find", arguments={"kind": kind})).content

    assert content("place") == '{"street": "x", "number": 1, "colour": "red"}'
    assert content("person") == '[{"name": "Mo", "friends": []}, "red"]'
    assert content("set") == "[1]"
    with pytest.raises(TypeError, match="a text or JSON, not a type"):
        content("strange")
