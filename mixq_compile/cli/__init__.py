"""The command line `mixq`: one file for each command, registered in `app`.

Command files import torch and the rest of the package inside their functions, so that
`mixq --help` starts at once.
"""

from __future__ import annotations


def main() -> None:
    """The entry point `mixq`."""
    from mixq_compile.cli.app import app

    app(prog_name="mixq")
