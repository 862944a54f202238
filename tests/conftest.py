"""For all tests: a cache of their own, so that nothing of the user's is read or written; and interrupts."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile

# Before anything imports pelton, and for the processes that tests start.
if "PELTON_CACHE" not in os.environ:
    os.environ["PELTON_CACHE"] = tempfile.mkdtemp(prefix="pelton-test-cache-")
    atexit.register(shutil.rmtree, os.environ["PELTON_CACHE"], ignore_errors=True)

# A shell starts background jobs with interrupts ignored; some tests interrupt themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
