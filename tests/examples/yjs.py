"""Editors with Yjs and y-websocket, as they come from npm, in one process of Node.

Owns that process and its end. Its peer is tests/e2e/node/yjs.mjs.
"""

import json
import subprocess
from typing import Any, Self

from tests.tools import NODE_FOLDER, node

__all__ = ["Editors"]


class Editors:
    """All editors of a test; a context manager. Each has a name."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [node("yjs", "y-websocket", "ws"), "yjs.mjs"],
            cwd=NODE_FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def do(self, what: str, editor: str, **order: object) -> Any:
        """Give one order to one editor; gives its text, whether it is in sync, and the names it knows."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"do": what, "editor": editor, **order}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"Node has gone, with status {process.wait(20)}"
        answer = json.loads(line)
        assert "error" not in answer, f"{what}: {answer['error']}"
        return answer["result"]
