"""Tasks: the problems of an environment, and where they come from."""

from polyturn.envs.tasks.generated import GeneratedTasks
from polyturn.envs.tasks.jsonl import JsonlTasks
from polyturn.envs.tasks.mixture import MixtureTasks
from polyturn.envs.tasks.order import draw_order
from polyturn.envs.tasks.parquet import ParquetTasks
from polyturn.envs.tasks.rows import RowKeys, RowReader
from polyturn.envs.tasks.slices import SlicedTasks
from polyturn.envs.tasks.types import EnvironmentChoice, ListTasks, Task, TaskSource

__all__ = [
    "EnvironmentChoice",
    "GeneratedTasks",
    "JsonlTasks",
    "ListTasks",
    "MixtureTasks",
    "ParquetTasks",
    "RowKeys",
    "RowReader",
    "SlicedTasks",
    "Task",
    "TaskSource",
    "draw_order",
]
