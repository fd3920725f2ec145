"""What an address of a process looks like. Pure."""

import re

_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5})")


def is_address(text: str) -> bool:
    """Whether it is host:port; the host a name or an IP address, a port from 1 to 65535.

    gRPC takes more (unix:, dns: and other schemes) and fails late on what is none of them.
    """
    found = _ADDRESS.fullmatch(text)
    return found is not None and 1 <= int(found[1]) <= 65_535
