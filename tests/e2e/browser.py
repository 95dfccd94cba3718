"""A real Chromium for tests: tabs that are opened, typed into and looked at.

Owns the Node process that drives it (tests/e2e/node/browser.mjs, with playwright-core) and its end. Waiting
is Playwright's: every method waits until what it needs is there, and fails when it does not come.
"""

import itertools
import json
import subprocess
from collections.abc import Mapping
from typing import Any, Self

from tests.tools import NODE_FOLDER, chromium, node

__all__ = ["Browser", "Tab"]


class Browser:
    """One headless Chromium; a context manager. Tabs share a context unless they ask for their own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [node(), "browser.mjs", chromium()],
            cwd=NODE_FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._names = itertools.count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def open(self, url: str, storage: Mapping[str, str] | None = None, **context: object) -> "Tab":
        """Open a tab. `storage` is what its sessionStorage begins with; keywords are the options of a browser
        context of its own, such as `viewport={"width": 360, "height": 740}`.
        """
        tab = Tab(self, f"tab {next(self._names)}")
        options: dict[str, object] = {"storage": dict(storage or {})}
        if context:
            options["context"] = context
        tab.do("open", url, options)
        return tab

    def ask(self, **question: object) -> Any:
        """Give one order to the browser and return what comes of it."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the browser has gone, with status {process.wait(20)}"
        answer = json.loads(line)
        assert "error" not in answer, f"{question}: {answer['error']}"
        return answer["result"]


class Tab:
    """One page in it."""

    def __init__(self, browser: Browser, name: str) -> None:
        self._browser = browser
        self._name = name

    def do(self, what: str, *arguments: object) -> Any:
        """Call a method of Playwright's Page."""
        return self._browser.ask(do=what, tab=self._name, args=arguments)

    def wait_for(self, selector: str) -> None:
        """Wait until something on the page matches and is visible."""
        self.do("waitForSelector", selector)

    def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        return self.do("evaluate", expression)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that match, in the order of the page."""
        found = self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
        return [str(text).strip() for text in found]

    def record(self) -> dict[str, Any]:
        """WebSockets `opened` and `closed`; `problems` (errors, warnings); requests that went `outside`."""
        found: dict[str, Any] = self.do("record")
        return found

    def received(self) -> int:
        """How many frames have come on its WebSockets: one that has a frame is open."""
        return int(self.do("received"))

    def close(self) -> None:
        """Close the tab, as its user does."""
        self.do("close")
