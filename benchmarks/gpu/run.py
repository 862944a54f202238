"""The benchmark as a file, to be run from any folder; `--help` says what it does. The code is in ``__main__.py``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder has modules with names that others may look for.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
    from benchmarks.gpu.__main__ import main

    sys.exit(main())
