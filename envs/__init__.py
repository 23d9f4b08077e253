"""The Gymnasium side: tool environments, spaces, messages, tasks, registry and the built-in environments."""
