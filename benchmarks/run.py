"""All benchmarks, one after another: `python -m benchmarks.run`. Each prints one JSON line (see its module)."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("vit_forward", "altclip_step", "loader", "conversion", "checkpoint", "contrastive_memory", "step_overhead")
NAMES += ("generation",)


def main() -> int:
    """Runs every benchmark in its own process; the status is the worst of theirs."""
    worst = 0
    for name in sys.argv[1:] or NAMES:
        print(f"== {name}", flush=True)
        worst = max(worst, subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
