"""`python -m faithmap` is `faithmap`."""

from faithmap.cli import app_main

if __name__ == "__main__":
    app_main()
