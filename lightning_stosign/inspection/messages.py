"""What the inspection says of a file: errors of one line, and names that cannot steer a terminal."""

_LONGEST = 300  # characters of a name that are shown


class CheckpointError(ValueError):
    """A file or folder that cannot be inspected; the message is one line that says why."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, longest=2000))


def printable(text: str, longest: int = _LONGEST) -> str:
    r"""Return the text with control characters, lone surrogates and invisible characters escaped, cut where it is long.

    Example:
        >>> printable("head\x1b[2J.weight")
        'head\\x1b[2J.weight'
    """
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: BaseException) -> str:
    """Return the first line of what an exception says."""
    lines = str(error).splitlines() or [type(error).__name__]
    return printable(lines[0].strip())
