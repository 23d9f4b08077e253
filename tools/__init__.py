"""What an agent can call: tool specs, calls and results; search."""
