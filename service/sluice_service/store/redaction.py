"""Store URLs as logs and error messages may show them: without passwords."""

from urllib.parse import urlsplit


def redact(url: str) -> str:
    """The URL without user, password and options."""
    scheme, separator, _ = url.partition("://")
    if url.startswith("sqlite:"):
        return url
    if not separator:
        return "…" if "@" in url else url
    try:
        parts = urlsplit(url)
        # A password whose special characters are not encoded may end up in any part.
        is_plain = "@" not in parts.path + parts.query + parts.fragment and parts.port != 0
    except ValueError:
        is_plain = False
    if not is_plain:
        return f"{scheme}://…"
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
