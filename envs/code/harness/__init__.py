"""Runs unit tests inside a sandbox. Its source is sent there; nothing of it runs in the host's process.

Two processes that share nothing but two pipes:

    tests (trusted)  -- {"call": [...], "names": {...}} -->  solution (what the model wrote)
                     <-- {"value": ..., "arguments": [...]} or {"error": [kinds, text]} --

The solution's process is forked first, before the tests and the nonce are read from stdin, so they are nowhere in its
memory (nor in that of the runner, of which both are forks). Values cross as tagged JSON and arrive as plain built-in
values, so no object of the solution's ever meets a test: an `__eq__`, a decorator, a patched builtin or a printed
verdict of the solution's stays in its own process. The process of the tests cannot be traced or read by the other (it
is not dumpable), imports nothing from the work folder, and writes its verdict after a nonce that only it and the host
know. If it is killed there is no verdict, which the host takes for a failure.

- `values`: what crosses, and how.
- `answering`: the solution's side.
- `asking`: the function as the tests see it.
- `scoring`: every assertion of a test source is noticed.
- `stand_in`: the few names that tests take from pytest.
- `running`: the tests are run, whatever their form; the verdict.
- `main`: the two processes.
- `program`: the source that the sandbox gets.
"""
