"""Every option, typed, by the part of a run that it belongs to."""
