"""Lines of code per folder, and the budgets of docs/architecture.md that a file must keep."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 800  # per file


def main() -> int:
    lines: Counter[str] = Counter()
    too_long = []
    for top in ("pelton", "csrc", "tests", "benchmarks", "tools", "examples"):
        for file in sorted((ROOT / top).rglob("*")):
            if file.suffix not in {".py", ".cc", ".cpp", ".h", ".sh"}:
                continue
            count = sum(1 for line in file.read_text().splitlines() if line.strip())
            folder = file.relative_to(ROOT).parent
            lines["/".join(folder.parts[:2])] += count
            if len(file.read_text().splitlines()) > MOST_LINES:
                too_long.append(f"{file.relative_to(ROOT)} has more than {MOST_LINES} lines")
    for folder, count in sorted(lines.items()):
        print(f"{count:7,}  {folder}")
    print(f"{sum(lines.values()):7,}  in all (blank lines not counted)")
    print("\n".join(too_long), end="\n" if too_long else "")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
