import sys

from .cli import main

if __name__ == "__main__":  # not in the processes that multiprocessing starts
    sys.exit(main())
