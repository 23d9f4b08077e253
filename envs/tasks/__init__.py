"""Tasks: the problems of an environment, and where they come from."""

from polyturn.envs.tasks.curriculum import make_curriculum
from polyturn.envs.tasks.files import JsonlTasks, ParquetTasks
from polyturn.envs.tasks.order import draw_order
from polyturn.envs.tasks.rows import RowKeys, RowReader
from polyturn.envs.tasks.sources import GeneratedTasks, MixtureTasks, SlicedTasks

__all__ = [
    "GeneratedTasks",
    "JsonlTasks",
    "MixtureTasks",
    "ParquetTasks",
    "RowKeys",
    "RowReader",
    "SlicedTasks",
    "draw_order",
    "make_curriculum",
]
