"""`python -m management_api`, and the entry point of `management-api`."""

import sys

from management_api.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
