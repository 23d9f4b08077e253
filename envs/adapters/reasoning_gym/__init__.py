"""The procedural datasets of reasoning-gym (Open-Thought, Apache-2.0; needs `polyturn[reasoning-gym]`)."""
