"""``python -m jaxunlearn`` is ``jaxunlearn``."""

from jaxunlearn.cli import main

if __name__ == "__main__":
    main()
