"""Wire formats, each a pure pair: decode a body to `ImageRequest`s, encode results and errors.

A borrowed format's unknown field warns; a wrong value is a 4xx. No I/O, no web framework, no Ray.
"""


def unknown_field(name: str) -> str:
    """The warning about a field that a format does not have.

    Names come from the caller: a long one is cut, and a lone surrogate, which no answer can hold, shows as "?".
    """
    shown = name if len(name) <= 100 else name[:100] + "..."
    return f"{shown.encode('utf-8', 'replace').decode()} is unknown and was ignored"
