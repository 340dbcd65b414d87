"""Draws the protocol's state diagram from the code's own table, as Mermaid; `--write` puts it into the page.

.venv/bin/python scripts/draw_protocol.py
"""

import re
import sys
from pathlib import Path

from retryproof.core.flow import START, TABLE

PAGE = Path(__file__).parents[1] / "docs" / "explain" / "protocol.md"
_DIAGRAM = re.compile(r"(```mermaid\n).*?(```)", re.DOTALL)


def diagram() -> str:
    """The state diagram: arrows carry replies, words in lower case are states, the others are conclusions."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, reply), targets in TABLE.items():
        for target in targets:
            arrows.setdefault((state, target), []).append(reply)
    lines = ["stateDiagram-v2", f"    [*] --> {START}"]
    lines += [f"    {state} --> {target}: {', '.join(replies)}" for (state, target), replies in arrows.items()]
    states = {state for state, _ in TABLE}
    ends = dict.fromkeys(target for targets in TABLE.values() for target in targets if target not in states)
    lines += [f"    {end} --> [*]" for end in ends]
    return "\n".join(lines) + "\n"


def drawn(page: str) -> str:
    """The page with the diagram as it should be; ValueError where it has no place for one."""
    text, places = _DIAGRAM.subn(rf"\g<1>{diagram()}\g<2>", page)
    if places != 1:
        raise ValueError(f"{PAGE.name} has {places} Mermaid blocks, not one")
    return text


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(drawn(PAGE.read_text()))
    else:
        sys.stdout.write(diagram())
