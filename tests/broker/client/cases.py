"""Addresses: what a PartySocket is told, and where it then connects. For the Python client and for the npm
package alike.

`JS_NAMES` turns the options into those of the package. A URL is what `new URL(…).href` makes of what the
package says, without a `?` that nothing follows. "ID" stands in for `_pk`.
"""

from typing import Any

JS_NAMES = {"base_path": "basePath"}

LOCAL = "127.0.0.1:1999"

#: Options, and the URL of the WebSocket. The id is "ID" unless an option says another.
WEBSOCKETS: dict[str, tuple[dict[str, Any], str]] = {
    "a room": ({"host": LOCAL, "room": "lobby"}, "ws://127.0.0.1:1999/parties/main/lobby?_pk=ID"),
    "a party": (
        {"host": LOCAL, "room": "lobby", "party": "chat-room"},
        "ws://127.0.0.1:1999/parties/chat-room/lobby?_pk=ID",
    ),
    "the main party by name": (
        {"host": LOCAL, "room": "lobby", "party": "main"},
        "ws://127.0.0.1:1999/parties/main/lobby?_pk=ID",
    ),
    "a path": (
        {"host": LOCAL, "room": "lobby", "path": "a/b c"},
        "ws://127.0.0.1:1999/parties/main/lobby/a/b%20c?_pk=ID",
    ),
    "a path that ends with a slash": (
        {"host": LOCAL, "room": "lobby", "path": "a/"},
        "ws://127.0.0.1:1999/parties/main/lobby/a/?_pk=ID",
    ),
    "an empty path": (
        {"host": LOCAL, "room": "lobby", "path": ""},
        "ws://127.0.0.1:1999/parties/main/lobby?_pk=ID",
    ),
    "a base path": (
        {"host": LOCAL, "base_path": "party/lobby"},
        "ws://127.0.0.1:1999/party/lobby?_pk=ID",
    ),
    "a base path before room and party": (
        {"host": LOCAL, "base_path": "x/y", "room": "lobby", "party": "chat", "prefix": "p"},
        "ws://127.0.0.1:1999/x/y?_pk=ID",
    ),
    "a base path with a path": (
        {"host": LOCAL, "base_path": "x", "path": "z"},
        "ws://127.0.0.1:1999/x/z?_pk=ID",
    ),
    "a prefix": (
        {"host": LOCAL, "room": "lobby", "prefix": "agents"},
        "ws://127.0.0.1:1999/agents/main/lobby?_pk=ID",
    ),
    "a prefix of two segments": (
        {"host": LOCAL, "room": "lobby", "prefix": "api/v1"},
        "ws://127.0.0.1:1999/api/v1/main/lobby?_pk=ID",
    ),
    "an empty prefix": (
        {"host": LOCAL, "room": "lobby", "prefix": ""},
        "ws://127.0.0.1:1999/parties/main/lobby?_pk=ID",
    ),
    "an id": (
        {"host": LOCAL, "room": "lobby", "id": "ann"},
        "ws://127.0.0.1:1999/parties/main/lobby?_pk=ann",
    ),
    "an id with everything in it": (
        {"host": LOCAL, "room": "lobby", "id": "ü ~*&=+%"},
        "ws://127.0.0.1:1999/parties/main/lobby?_pk=%C3%BC+%7E*%26%3D%2B%25",
    ),
    "a room outside of ASCII": (
        {"host": LOCAL, "room": "röom 日本 😀"},
        "ws://127.0.0.1:1999/parties/main/r%C3%B6om%20%E6%97%A5%E6%9C%AC%20%F0%9F%98%80?_pk=ID",
    ),
    "a room that is encoded already": (
        {"host": LOCAL, "room": "a%2Fb%3f%20c"},
        "ws://127.0.0.1:1999/parties/main/a%2Fb%3f%20c?_pk=ID",
    ),
    "every printable character that a room may have": (
        {"host": LOCAL, "room": "!$&'()*+,-.09:;=@AZ[]_az|~"},
        "ws://127.0.0.1:1999/parties/main/!$&'()*+,-.09:;=@AZ[]_az|~?_pk=ID",
    ),
    "printable characters that are encoded": (
        {"host": LOCAL, "room": 'a"<>`{}b'},
        "ws://127.0.0.1:1999/parties/main/a%22%3C%3E%60%7B%7Db?_pk=ID",
    ),
    "a room of dots that is no segment of dots": (
        {"host": LOCAL, "room": "..."},
        "ws://127.0.0.1:1999/parties/main/...?_pk=ID",
    ),
    "a party outside of ASCII": (
        {"host": LOCAL, "room": "x", "party": "größe"},
        "ws://127.0.0.1:1999/parties/gr%C3%B6%C3%9Fe/x?_pk=ID",
    ),
    "a query": (
        {"host": LOCAL, "room": "x", "query": {"a": "1", "b": None, "c": "ü&= +~*-._/?"}},
        "ws://127.0.0.1:1999/parties/main/x?_pk=ID&a=1&c=%C3%BC%26%3D+%2B%7E*-._%2F%3F",
    ),
    "a query of numbers and truths": (
        {"host": LOCAL, "room": "x", "query": {"n": 42, "yes": True, "no": False, "": "", "e": ""}},
        "ws://127.0.0.1:1999/parties/main/x?_pk=ID&n=42&yes=true&no=false&=&e=",
    ),
    "an empty query": (
        {"host": LOCAL, "room": "x", "query": {}},
        "ws://127.0.0.1:1999/parties/main/x?_pk=ID",
    ),
    "a scheme before the host does not count": (
        {"host": "http://example.com", "room": "x"},
        "wss://example.com/parties/main/x?_pk=ID",
    ),
    "wss before a local host does not count": (
        {"host": "wss://localhost:1999", "room": "x"},
        "ws://localhost:1999/parties/main/x?_pk=ID",
    ),
    "a slash behind the host": (
        {"host": "https://example.com/", "room": "x"},
        "wss://example.com/parties/main/x?_pk=ID",
    ),
    "a host with a path": (
        {"host": "example.com/sub/dir", "room": "x"},
        "wss://example.com/sub/dir/parties/main/x?_pk=ID",
    ),
    "a host in capitals": (
        {"host": "EXAMPLE.com:8080", "room": "x"},
        "wss://example.com:8080/parties/main/x?_pk=ID",
    ),
    "a host outside of ASCII": (
        {"host": "bücher.example", "room": "x"},
        "wss://xn--bcher-kva.example/parties/main/x?_pk=ID",
    ),
    "the default port": (
        {"host": "example.com:443", "room": "x"},
        "wss://example.com/parties/main/x?_pk=ID",
    ),
    "the default port of the other protocol": (
        {"host": "example.com:80", "room": "x"},
        "wss://example.com:80/parties/main/x?_pk=ID",
    ),
    "the default port of ws": (
        {"host": "localhost:80", "room": "x"},
        "ws://localhost/parties/main/x?_pk=ID",
    ),
    "localhost without a port": ({"host": "localhost", "room": "x"}, "wss://localhost/parties/main/x?_pk=ID"),
    "localhost in capitals": (
        {"host": "LOCALHOST:1999", "room": "x"},
        "wss://localhost:1999/parties/main/x?_pk=ID",
    ),
    "a name that begins like localhost": (
        {"host": "localhost.example.com:1", "room": "x"},
        "wss://localhost.example.com:1/parties/main/x?_pk=ID",
    ),
    "the loopback without a port": (
        {"host": "127.0.0.1", "room": "x"},
        "wss://127.0.0.1/parties/main/x?_pk=ID",
    ),
    "the rest of the loopback": (
        {"host": "127.0.0.2:1999", "room": "x"},
        "wss://127.0.0.2:1999/parties/main/x?_pk=ID",
    ),
    "192.168": ({"host": "192.168.1.2", "room": "x"}, "ws://192.168.1.2/parties/main/x?_pk=ID"),
    "192.169": ({"host": "192.169.1.2", "room": "x"}, "wss://192.169.1.2/parties/main/x?_pk=ID"),
    "10": ({"host": "10.0.0.1:9", "room": "x"}, "ws://10.0.0.1:9/parties/main/x?_pk=ID"),
    "100": ({"host": "100.0.0.1", "room": "x"}, "wss://100.0.0.1/parties/main/x?_pk=ID"),
    "172.15": ({"host": "172.15.0.1", "room": "x"}, "wss://172.15.0.1/parties/main/x?_pk=ID"),
    "172.16": ({"host": "172.16.0.1", "room": "x"}, "ws://172.16.0.1/parties/main/x?_pk=ID"),
    "172.31": ({"host": "172.31.255.1", "room": "x"}, "ws://172.31.255.1/parties/main/x?_pk=ID"),
    "172.32": ({"host": "172.32.0.1", "room": "x"}, "wss://172.32.0.1/parties/main/x?_pk=ID"),
    "IPv6 loopback": ({"host": "[::1]:1999", "room": "x"}, "wss://[::1]:1999/parties/main/x?_pk=ID"),
    "IPv4 loopback in IPv6": (
        {"host": "[::ffff:7f00:1]:1999", "room": "x"},
        "ws://[::ffff:7f00:1]:1999/parties/main/x?_pk=ID",
    ),
    "ws that is asked for": (
        {"host": "example.com", "room": "x", "protocol": "ws"},
        "ws://example.com/parties/main/x?_pk=ID",
    ),
    "wss that is asked for": (
        {"host": LOCAL, "room": "x", "protocol": "wss"},
        "wss://127.0.0.1:1999/parties/main/x?_pk=ID",
    ),
}

#: Options, and the URL of `PartySocket.fetch`.
REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "a room": ({"host": LOCAL, "room": "lobby"}, "http://127.0.0.1:1999/parties/main/lobby"),
    "far away": ({"host": "example.com", "room": "lobby"}, "https://example.com/parties/main/lobby"),
    "a path and a query": (
        {"host": LOCAL, "room": "ü", "party": "chat", "path": "a/b", "query": {"x": "ü", "none": None}},
        "http://127.0.0.1:1999/parties/chat/%C3%BC/a/b?x=%C3%BC",
    ),
    "a base path": ({"host": LOCAL, "room": "-", "base_path": "x"}, "http://127.0.0.1:1999/x"),
    "a prefix": ({"host": LOCAL, "room": "x", "prefix": "p"}, "http://127.0.0.1:1999/p/main/x"),
    "https that is asked for": (
        {"host": LOCAL, "room": "x", "protocol": "https"},
        "https://127.0.0.1:1999/parties/main/x",
    ),
}

#: What the package throws for too.
THROWN: dict[str, dict[str, Any]] = {
    "a path that begins with a slash": {"host": LOCAL, "room": "x", "path": "/a"},
    "neither room nor base path": {"host": LOCAL},
}

#: What raises here, and goes to another address there: the part that is wrong, and where the package goes.
DIFFERENT: dict[str, tuple[dict[str, Any], str, str]] = {
    "a room with a slash": (
        {"host": LOCAL, "room": "a/b"},
        "room",
        "ws://127.0.0.1:1999/parties/main/a/b?_pk=ID",
    ),
    "a party with a slash": (
        {"host": LOCAL, "room": "b", "party": "a/x"},
        "party",
        "ws://127.0.0.1:1999/parties/a/x/b?_pk=ID",
    ),
    "an empty party": (
        {"host": LOCAL, "room": "b", "party": ""},
        "party",
        "ws://127.0.0.1:1999/parties//b?_pk=ID",
    ),
    "a question mark": (
        {"host": LOCAL, "room": "why?"},
        "room",
        "ws://127.0.0.1:1999/parties/main/why??_pk=ID",
    ),
    "a hash": ({"host": LOCAL, "room": "a#b"}, "room", "ws://127.0.0.1:1999/parties/main/a#b?_pk=ID"),
    "a backslash": ({"host": LOCAL, "room": "a\\b"}, "room", "ws://127.0.0.1:1999/parties/main/a/b?_pk=ID"),
    "dots": ({"host": LOCAL, "room": ".."}, "room", "ws://127.0.0.1:1999/parties/?_pk=ID"),
    "encoded dots": ({"host": LOCAL, "room": "%2E."}, "room", "ws://127.0.0.1:1999/parties/?_pk=ID"),
    "dots in a path": (
        {"host": LOCAL, "room": "x", "path": "a/../b"},
        "path",
        "ws://127.0.0.1:1999/parties/main/x/b?_pk=ID",
    ),
    "a line break": ({"host": LOCAL, "room": "a\nb"}, "room", "ws://127.0.0.1:1999/parties/main/ab?_pk=ID"),
    "half an escape": ({"host": LOCAL, "room": "50%"}, "room", "ws://127.0.0.1:1999/parties/main/50%?_pk=ID"),
    "a base path that begins with a slash": (
        {"host": LOCAL, "base_path": "/x"},
        "base_path",
        "ws://127.0.0.1:1999//x?_pk=ID",
    ),
    "a name before the host": (
        {"host": "user:pw@example.com", "room": "x"},
        "host",
        "wss://user:pw@example.com/parties/main/x?_pk=ID",
    ),
    "_pk in the query": (
        {"host": LOCAL, "room": "x", "query": {"_pk": "other"}},
        "query",
        "ws://127.0.0.1:1999/parties/main/x?_pk=ID&_pk=other",
    ),
}
