"""`python -m vlm.predict`."""

import sys

from vlm.predict import main

if __name__ == "__main__":
    sys.exit(main())
