"""Every way to write a parameter: what the model is shown, what the function gets, and what is told."""

import asyncio
import dataclasses
import datetime
import enum
import functools
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NewType, Optional, TypedDict

import pydantic
import pytest
from annotated_types import Ge, Len
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from polyturn.envs.spaces import sample_arguments
from polyturn.tools.arguments import ArgumentChecker
from polyturn.tools.plain import unfit
from polyturn.tools.tool import as_tool, tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall, ToolError


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


class Named(TypedDict, total=False):
    name: str
    level: Level


UserId = NewType("UserId", int)
NUMBERS = {"type": "array", "items": {"type": "integer"}}

TYPES: list[tuple[Any, dict[str, Any], list[tuple[Any, Any]], list[Any]]] = [
    # type, schema, values with what the function gets, values that are refused
    (
        Annotated[int | None, Field(ge=3)],
        {"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]},
        [(3, 3), (None, None)],
        [2, "3", 3.0, True],
    ),
    (
        Annotated[list[int] | None, Field(max_length=3)],
        {"anyOf": [{**NUMBERS, "maxItems": 3}, {"type": "null"}]},
        [([1, 2, 3], [1, 2, 3]), (None, None)],
        [[1, 2, 3, 4], [1.0], "x"],
    ),
    (
        Annotated[float, Field(ge=0, le=1)],
        {"type": "number", "minimum": 0, "maximum": 1},
        [(1, 1), (0.5, 0.5)],
        [
            float("nan"),
            2,
            float("inf"),
            10**400,
            "1",
        ],
    ),
    (Annotated[float, Ge(0)], {"type": "number", "minimum": 0}, [(10**300, 10**300)], [10**400, -1, None]),
    (float | None, {"type": ["number", "null"]}, [(5, 5), (None, None)], [10**400, "5"]),
    (Optional[str], {"type": ["string", "null"]}, [("a", "a"), (None, None)], [1, ["a"]]),  # noqa: UP045
    (
        Literal["a", None],
        {"type": ["string", "null"], "enum": ["a", None]},
        [("a", "a"), (None, None)],
        ["b", 1],
    ),
    (Literal["a"], {"type": "string", "enum": ["a"]}, [("a", "a")], ["b"]),
    (Literal[Colour.RED], {"type": "string", "enum": ["red"]}, [("red", Colour.RED)], ["blue"]),
    (Level, {"type": "integer", "enum": [1, 2]}, [(2, Level.HIGH)], [3, "LOW"]),
    (
        list[Colour],
        {"type": "array", "items": {"type": "string", "enum": ["red", "blue"]}},
        [
            (["red"], [Colour.RED]),
        ],
        [["green"], "red"],
    ),
    (
        tuple[int, str],
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "minItems": 2,
            "maxItems": 2,
        },
        [([1, "a"], (1, "a"))],
        [[1], [1, "a", 2], ["a", 1]],
    ),
    (tuple[int, ...], NUMBERS, [([1, 2], (1, 2)), ([], ())], [["1"], 1]),
    (set[int], {**NUMBERS, "uniqueItems": True}, [([1, 2], {1, 2})], [[1, 1], {"a": 1}]),
    (frozenset[int], {**NUMBERS, "uniqueItems": True}, [([1], frozenset({1}))], [["a"]]),
    (Sequence[int], NUMBERS, [([1], [1])], ["12"]),
    (
        Mapping[str, int],
        {"type": "object", "additionalProperties": {"type": "integer"}},
        [({"a": 1}, {"a": 1})],
        [
            {"a": "1"},
        ],
    ),
    (
        datetime.date,
        {"type": "string", "format": "date"},
        [("2024-02-29", datetime.date(2024, 2, 29))],
        [
            "2023-02-29",
            "soon",
            3,
        ],
    ),
    (uuid.UUID, {"type": "string", "format": "uuid"}, [(str(uuid.UUID(int=1)), uuid.UUID(int=1))], ["1"]),
    (UserId, {"type": "integer"}, [(7, 7)], ["7"]),
    (
        Annotated[str, Len(2, 3)],
        {"type": "string", "minLength": 2, "maxLength": 3},
        [("ab", "ab")],
        ["a", "abcd"],
    ),
    (
        Annotated[str, Field(pattern=r"^(?!x)\w+$")],
        {"type": "string", "pattern": r"^(?!x)\w+$"},
        [("ab", "ab")],
        [
            "xa",
            "",
        ],
    ),
    (Annotated[int, pydantic.AfterValidator(lambda value: value + 1)], {"type": "integer"}, [(1, 2)], ["1"]),
    (
        Point | None,
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"x": {"type": "integer"}, "y": {"type": "number"}},
                    "required": ["x"],
                    "additionalProperties": False,
                },
                {"type": "null"},
            ]
        },
        [({"x": 1}, Point(1)), (None, None)],
        [{"x": "1"}, {"x": 1, "z": 2}, {}],
    ),
    (
        list[Named],
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "level": {"type": "integer", "enum": [1, 2]}},
                "required": [],
                "additionalProperties": False,
            },
        },
        [([{"level": 2}, {}], [{"level": Level.HIGH}, {}])],
        [[{"other": 1}], [{"level": 3}]],
    ),
    (list, {"type": "array", "items": {}}, [([1, "a"], [1, "a"])], [1]),
    (dict, {"type": "object", "additionalProperties": True}, [({"a": [1]}, {"a": [1]})], [[1]]),
    (Any, {}, [(1, 1), ({"a": None}, {"a": None})], []),
]


def taking(annotation):
    """A tool of one parameter `x`, and what its function got."""
    got = []

    def take(x):
        got.append(x)
        return "taken"

    take.__annotations__ = {"x": annotation, "return": str}
    return tool(take), got


@pytest.mark.parametrize(("annotation", "schema", "right", "wrong"), TYPES, ids=lambda value: str(value)[:40])
def test_a_type_is_shown_checked_and_converted(annotation, schema, right, wrong):
    take, got = taking(annotation)
    assert as_tool(take).spec.parameters["properties"]["x"] == schema
    toolset = Toolset([take])
    for value, wanted in right:
        result = toolset.call(ToolCall(id="c", name="take", arguments={"x": value}))
        assert result.ok, result.content
        assert got[-1] == wanted and type(got[-1]) is type(wanted)
    for value in wrong:
        result = toolset.call(ToolCall(id="c", name="take", arguments={"x": value}))
        assert not result.ok and "The call of 'take' was not made" in result.content, value
    assert len(got) == len(right)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["red", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "name", "a"]), inner, max_size=2)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(index=st.integers(0, len(TYPES) - 1), value=JSON)
def test_any_json_is_taken_or_told(index, value):
    take, got = taking(TYPES[index][0])
    result = Toolset([take]).call(ToolCall(id="c", name="take", arguments={"x": value}))
    assert result.ok == bool(got)
    assert result.ok or "was not made" in result.content


class Size(enum.Enum):
    SMALL = "s"
    LARGE = "l"


@dataclasses.dataclass
class Box:
    size: Size
    where: Point | None = None
    labels: list[str] = dataclasses.field(default_factory=list)
    weight: Annotated[float, Ge(0)] = 1.0


EXACT: list[Any] = [
    Colour,
    Size,
    Point,
    Box,
    Box | None,
    list[Box],
    dict[str, Point],
    Annotated[list[Colour], Len(1, 2)],
    Annotated[Size, "How large.", Field(description="of the box")],
]
MEMBERS = st.sampled_from(["x", "y", "size", "where", "labels", "weight", "z"])
VALUES = st.recursive(
    JSON | st.sampled_from(["s", "l", "red", "x", 1, 1.0, True, None]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(MEMBERS, inner, max_size=4),
    max_leaves=8,
)
BOXES = st.fixed_dictionaries(
    {"size": st.sampled_from(["s", "l", "m"])},
    optional={"where": VALUES, "labels": VALUES, "weight": st.floats() | st.integers() | VALUES, "z": VALUES},
)


@settings(max_examples=400, deadline=None)
@given(
    annotation=st.sampled_from([kind for kind, *_ in TYPES] + EXACT), value=VALUES | BOXES | st.lists(BOXES)
)
def test_what_is_read_in_one_go_is_what_schema_and_types_say(annotation, value):
    take, _ = taking(annotation)
    made, arguments = as_tool(take), {"x": value}
    quickly = None if unfit(value, where="x") else made.types.read(arguments)
    if quickly is not None:
        assert ArgumentChecker("take", made.spec.parameters, made.types).complaint(arguments) is None
        slowly, problems = made.types.convert(arguments)
        assert (problems, repr(slowly)) == ([], repr(quickly))


@pytest.mark.parametrize("annotation", EXACT, ids=lambda value: str(value)[:40])
def test_common_types_are_read_in_one_go(annotation):
    take, _ = taking(annotation)
    made = as_tool(take)
    arguments = sample_arguments(made.spec.parameters)
    assert made.types.read(arguments) == made.types.convert(arguments)[0]


def test_defaults_are_json_and_the_functions_own_are_used():
    seen = []
    missing = object()

    @tool
    def paint(
        x: int = Field(3, ge=1, description="How many."),
        colours: list[Colour] = [Colour.RED],  # noqa: B006
        point: Point = Point(1),  # noqa: B008
        tags: set[str] = frozenset({"a"}),
        made: list[int] = Field(default_factory=list),  # noqa: B008
        sentinel: str | None = missing,
        ratio: float = float("nan"),
        needed: int = Field(ge=1),
    ) -> str:
        """Paint."""
        seen.append((x, colours, point, tags, made, sentinel, ratio, needed))
        return ""

    parameters = as_tool(paint).spec.parameters
    json.dumps(parameters, allow_nan=False)
    shown = {name: part["default"] for name, part in parameters["properties"].items() if "default" in part}
    assert shown == {"x": 3, "colours": ["red"], "point": {"x": 1, "y": 0.0}, "tags": ["a"], "made": []}
    assert parameters["required"] == ["needed"]
    assert parameters["properties"]["x"] == {
        "type": "integer",
        "minimum": 1,
        "description": "How many.",
        "default": 3,
    }
    toolset = Toolset([paint])
    for _ in range(2):
        assert toolset.call(ToolCall(id="c", name="paint", arguments={"needed": 1})).ok
    assert seen[0][:6] == (3, [Colour.RED], Point(1), {"a"}, [], missing)
    assert seen[0][4] is not seen[1][4], "a factory makes a new one for each call"
    for wrong in ({"x": 0, "needed": 1}, {"needed": 0}, {}):
        assert not toolset.call(ToolCall(id="c", name="paint", arguments=wrong)).ok


def scale(value: float, factor: float, *, unit: str = "m") -> str:
    """Scale a value.

    Args:
        value: What.
        factor: By how much.
    """
    return f"{value * factor:g} {unit}"


class Counter:
    """Counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, by: int = 1) -> int:
        """Count on.

        Args:
            by: So far.
        """
        self.count += by
        return self.count


class Waiter:
    async def __call__(self, seconds: float) -> str:
        """Wait."""
        await asyncio.sleep(0)
        if seconds < 0:
            raise ToolError("not that long ago")
        return "done"


def test_partials_and_objects_that_can_be_called_are_tools():
    doubled = as_tool(functools.partial(scale, factor=2.0, unit="km"))
    assert doubled.spec.name == "scale"
    assert list(doubled.spec.parameters["properties"]) == ["value"]
    fixed = as_tool(functools.partial(functools.partial(scale, 3.0), unit="s"))
    assert list(fixed.spec.parameters["properties"]) == ["factor"]
    assert Toolset([doubled]).call(ToolCall(id="c", name="scale", arguments={"value": 4})).content == "8 km"
    assert Toolset([fixed]).call(ToolCall(id="c", name="scale", arguments={"factor": 4})).content == "12 s"
    count = as_tool(Counter())
    assert (count.spec.name, count.spec.description) == ("Counter", "Count on.")
    assert Toolset([count]).call(ToolCall(id="c", name="Counter", arguments={"by": 3})).content == "3"
    waits = as_tool(Waiter())
    assert waits.is_async
    called = Toolset([waits]).call_async(ToolCall(id="c", name="Waiter", arguments={"seconds": 0.1}))
    assert asyncio.run(called).content == "done"


def test_what_cannot_be_read_is_refused_when_the_tool_is_made():
    def unknown(x: "NoSuchType") -> None: ...  # noqa: F821

    def function_valued(x: "type[Point] | Counter") -> None: ...

    with pytest.raises(ValueError, match="tool 'unknown': its types cannot be read: name 'NoSuchType'"):
        tool(unknown)
    with pytest.raises(ValueError, match="parameter 'x': a model cannot be told of type"):
        tool(function_valued)
    with pytest.raises(ValueError, match="a tool is a function, not 3"):
        as_tool(3)


@pytest.mark.parametrize("annotation", [kind for kind, *_ in TYPES], ids=lambda value: str(value)[:40])
def test_sampled_arguments_are_taken(annotation):
    take, got = taking(annotation)
    arguments = sample_arguments(as_tool(take).spec.parameters)
    result = Toolset([take]).call(ToolCall(id="c", name="take", arguments=arguments))
    assert result.ok, result.content
    assert len(got) == 1


@pytest.mark.parametrize(
    "annotation",
    [
        Annotated[int, Field(gt=5)],
        Annotated[float, Field(lt=0)],
        Annotated[int, Field(ge=7, lt=8)],
        Annotated[list[int], Field(min_length=2)],
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
    ],
    ids=lambda value: str(value)[:40],
)
def test_sampled_arguments_keep_to_bounds_and_formats(annotation):
    test_sampled_arguments_are_taken(annotation)


@pytest.mark.parametrize(
    ("annotation", "fits", "beyond"),
    [
        (Annotated[int | float, Field(ge=3)], [3, 3.5], [2, 2.5]),
        (Annotated[int | float | None, Field(ge=3)], [3, None], [2, 2.5]),
        (Annotated[int | str, Field(ge=3, description="a number or a name")], [3, "a"], [2]),
        (Annotated[list[int] | str, Field(max_length=2)], [[1, 2], "ab"], [[1, 2, 3], "abc"]),
    ],
)
def test_bounds_of_a_choice_of_types_are_those_of_the_types_that_can_have_them(annotation, fits, beyond):
    def take(x):
        return "taken"

    take.__annotations__ = {"x": annotation, "return": str}
    take.__doc__ = "Take.\n\nArgs:\n    x: The value."
    tools = Toolset([as_tool(take)])
    assert all(tools.call(ToolCall(id="1", name="take", arguments={"x": value})).ok for value in fits)
    assert not any(tools.call(ToolCall(id="1", name="take", arguments={"x": value})).ok for value in beyond)


def test_a_typed_dict_is_a_parameter_by_itself():
    def take(x: Named) -> str:
        """Take.

        Args:
            x: Who it is.
        """
        return x["name"]

    answer = Toolset([as_tool(take)]).call(ToolCall(id="1", name="take", arguments={"x": {"name": "a"}}))
    assert (answer.ok, answer.content) == (True, "a")
