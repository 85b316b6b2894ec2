"""``python -m trackopt`` is the ``trackopt`` command."""

from trackopt.cli import main

if __name__ == "__main__":
    main()
