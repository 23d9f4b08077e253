"""Code: questions that are solved with Python, and programs that are graded by unit tests or by what they print."""
