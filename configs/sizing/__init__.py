"""What a config asks for in numbers, and whether a machine has it. Nothing here needs torch."""
