"""Where the rows of figures go: the file of the run, and whatever dashboards it has."""
