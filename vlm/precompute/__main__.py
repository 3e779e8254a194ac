"""`python -m vlm.precompute`."""

import sys

from vlm.precompute import main

if __name__ == "__main__":
    sys.exit(main())
