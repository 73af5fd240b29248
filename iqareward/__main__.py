"""`python -m iqareward`: the command line, where its script is not on the PATH."""

from iqareward.cli import app

if __name__ == "__main__":
    app(prog_name="iqareward")
