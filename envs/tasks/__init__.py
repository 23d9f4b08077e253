"""Tasks: the problems of an environment, and where they come from."""

from polyturn.envs.tasks.jsonl import JsonlTasks
from polyturn.envs.tasks.types import EnvironmentChoice, ListTasks, Task, TaskSource

__all__ = ["EnvironmentChoice", "JsonlTasks", "ListTasks", "Task", "TaskSource"]
