"""For all tests: a cache of their own, so that nothing of the user's is read or written."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before anything imports pelton, and for the processes that tests start.
if "PELTON_CACHE" not in os.environ:
    os.environ["PELTON_CACHE"] = tempfile.mkdtemp(prefix="pelton-test-cache-")
    atexit.register(shutil.rmtree, os.environ["PELTON_CACHE"], ignore_errors=True)
