"""`python -m shuffle_nb` and the command `shuffle-nb`."""

import sys


def main() -> None:
    """Run the command; without the libraries that run notebooks, say what installs them."""
    try:
        from shuffle_nb.runner.cli import main as command

        command()
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing in ("", "shuffle_nb"):
            raise
        sys.stderr.write(
            f"shuffle-nb: running notebooks needs {missing}, which is not installed: "
            "pip install 'shuffle_nb[notebooks]'\n"
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
