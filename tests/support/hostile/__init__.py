"""Programs that try to get out of a sandbox or to hurt its host, and what shows whether they did."""
