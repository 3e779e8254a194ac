"""`python -m vlm.tasks`."""

import sys

from vlm.tasks import main

if __name__ == "__main__":
    sys.exit(main())
