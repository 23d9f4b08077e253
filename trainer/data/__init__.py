"""The data that travels between the driver and the ranks, and how it is shared out."""
