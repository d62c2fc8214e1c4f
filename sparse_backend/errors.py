"""The one exception whose text is meant for the person at the terminal."""


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is one paragraph: it names the setting, file or field at fault and what to do. The command line prints it
    without a traceback and exits with status 2.
    """
