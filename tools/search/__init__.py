"""Search over passages: indexes, the server in front of them, and one client for all searches of a process."""
