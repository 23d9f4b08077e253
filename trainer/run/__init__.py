"""The run, in the driver: preflight, run directory, the loop over steps, figures, failures."""
