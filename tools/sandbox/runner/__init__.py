"""The runner: a pre-forked Python that lives inside a sandbox and runs each piece of code in a fork of itself.

This package runs *inside* the sandbox, in a bare interpreter: it imports the standard library and itself (by relative
imports), never polyturn. Copy or mount the folder as `DIR/runner` and start it as the first process of a sandbox (PID 1
of a PID namespace: it reaps orphans, and after each execution kills everything that it can see, so anywhere else it
refuses to start; no `--init` in Docker):

    python3 -s -S -P DIR/runner/start.py

It then speaks the protocol below on its stdin and stdout. What keeps code in is the sandbox around it (namespaces or
a container), and on top what `runner.confine` puts on every fork: rlimits, no_new_privs, landlock, seccomp.

Environment variables that help: PYTHONHASHSEED=0 (the order of sets is the same every time), MALLOC_ARENA_MAX=2
(threads take less address space), OPENBLAS_NUM_THREADS=1, HOME, PATH, LANG=C.UTF-8. Code sees all of them.

Protocol
--------
Both directions carry frames: two unsigned 32-bit big-endian numbers (length of the header, length of the body), the
header (a JSON object in UTF-8), the body (bytes). `runner.framing` encodes and decodes them. The host asks, the
runner answers each question with one frame, in order. When its input ends, the runner ends, and so does all it started.

`{"op": "configure", ...}`: must come first. Every other key is a field of `runner.confine.Config` (all have defaults).
    Answer `{"landlock": ABI}`; ABI is 0 where the kernel has no landlock.
`{"op": "exec", "program_bytes": N, "timeout_s": float, "fresh": bool}`, body: N bytes of program, a frame whose header
    is `{"code": str, "arguments": [str]}`, then stdin. The runner never has the body in its memory, of which every
    later execution has a copy.
    Answer `{"status", "exit_code", "seconds", "detail", "left_files", "stdout": N, "stderr": M}`, body: N bytes of
    stdout, then M bytes of stderr, each at most `output_bytes`. `status` is ok, timeout, oom, output_limit or
    setup_error; `exit_code` is null where the runner ended the code. The runner keeps the deadline; the host has to
    keep one of its own, a little later, in case the runner does not answer.
`{"op": "read", "path": str, "max_bytes": int}`. Answer `{}`, body: the file.
`{"op": "write", "path": str}`, body: the file. Answer `{}`.
`{"op": "ping"}`. Answer `{}`.

An answer `{"error": KIND, "message": str, "errno": int | null}` says that `read` or `write` was refused; KIND is
`value` (a path that leaves the work folder, not a regular file, too large) or `os`. Unknown questions end the runner.
"""
