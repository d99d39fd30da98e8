"""`python -m fasthaw` is the command `fasthaw`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
