"""python -m spectrim"""

from spectrim.cli import app

if __name__ == "__main__":
    app()
