"""The Gymnasium side: tool environments, spaces, messages, tasks, registry and the built-in environments."""

from polyturn.envs.builtin import register_builtin

register_builtin()
