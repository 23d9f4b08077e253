"""Images of the names that tasks build on, made from this machine's files: tests reach no hub."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

from polyturn.tools.sandbox.docker_image import TOOLS, add_shared_libraries, write_image

BASE = "debian:12-slim"
"""What the shipped tasks build on."""
PROGRAMS = f"bash timeout env awk kill ps setsid {TOOLS}"


def import_base(client: Any, image: str = BASE, programs: str = PROGRAMS) -> None:
    """Gives the daemon an image of that name with a shell and small programs, as Debian's slim image has them."""
    found = {name: path for name in programs.split() if (path := shutil.which(name, path="/usr/bin:/bin"))}
    files = {f"usr/bin/{name}": os.path.realpath(path) for name, path in found.items()}
    files["bin/bash"] = files["usr/bin/bash"]
    add_shared_libraries(files, executable="")
    repository, _, tag = image.partition(":")
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        write_image(archive, files, executable="/nonexistent/python3")
        archive.flush()
        client.api.import_image_from_file(archive.name, repository=repository, tag=tag)
