"""`python -m lowcontext`: the command line."""

from lowcontext.cli import app

if __name__ == "__main__":
    app(prog_name="lowcontext")
