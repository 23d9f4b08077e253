"""From a recipe and the command line to a validated config."""
