"""python -m var_fast is the command var-fast."""

import sys

from var_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
