"""A headless Chromium of the system, as the tests of pages drive it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def headless_chromium(*, is_required: bool) -> Iterator[Browser]:
    """The browser, for as long as the block lasts. Where there is none the test is skipped, or fails if required."""
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        reason = f"no Chromium: none of {', '.join(PROGRAMS)} is installed (apt-get install chromium)"
        if is_required:
            pytest.fail(reason)
        pytest.skip(reason)
    # Root may not have a sandbox of Chromium's.
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()
