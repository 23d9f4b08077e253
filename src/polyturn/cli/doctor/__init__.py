"""`polyturn doctor`: facts about a machine, what they mean, and the command."""
