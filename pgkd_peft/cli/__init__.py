"""The command `pgkd`: one module a command, and the arguments that they share. Imports everything; nothing imports it.

A command's module is imported when it runs, and nothing heavy before; a new command is a line in ``main.COMMANDS``.
"""

from .main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
