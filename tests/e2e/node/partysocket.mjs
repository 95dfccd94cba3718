// Unmodified partysocket on ws, driven by lines of JSON on standard input, answered one by one on standard output.
//
// {"do": "open", "socket": name, "options": {…}, "queries": [{…}, …]} makes a PartySocket; `queries` makes its
// query a function that gives one after the other, then the last again. "send" sends `messages`: {"text": …} or
// {"base64": …}. "record" tells what has happened, "close" and "reconnect" call those methods, and "fetch" is
// PartySocket.fetch. "address" tells where a socket with these options would go, and "fetch address" where
// PartySocket.fetch would. Peers: tests/e2e/test_client.py and tests/e2e/test_partysocket.py.

import { createInterface } from "node:readline";
import PartySocket from "partysocket";
import WebSocket from "ws";

const sockets = new Map();

function open({ socket: name, options, queries }) {
  let calls = 0;
  const query = queries && (async () => queries[Math.min(calls++, queries.length - 1)]);
  const socket = new PartySocket({ ...options, ...(query && { query }), WebSocket });
  socket.binaryType = "arraybuffer";
  const events = [];
  socket.addEventListener("open", () => events.push({ type: "open", url: socket.url, protocol: socket.protocol }));
  socket.addEventListener("error", (event) => events.push({ type: "error", text: event.message }));
  socket.addEventListener("close", ({ code, reason, wasClean }) =>
    events.push({ type: "close", code, reason, wasClean }),
  );
  socket.addEventListener("message", ({ data }) =>
    events.push(
      typeof data === "string"
        ? { type: "message", text: data }
        : { type: "message", base64: Buffer.from(data).toString("base64") },
    ),
  );
  sockets.set(name, { socket, events });
  return { id: socket.id, state: socket.readyState };
}

async function obey(order) {
  if (order.do === "open") return open(order);
  if (order.do === "address") {
    const socket = new PartySocket({ ...order.options, startClosed: true, WebSocket });
    if (!socket.room && !socket.basePath) throw new Error("nowhere");
    const url = typeof socket._url === "string" ? socket._url : await socket._url();
    return { url: new URL(url).href, id: socket.id };
  }
  if (order.do === "fetch address") {
    const url = await PartySocket.fetch({ ...order.options, fetch: (url) => url });
    return { url: new URL(url).href };
  }
  if (order.do === "fetch") {
    const response = await PartySocket.fetch(order.options, order.init);
    return {
      status: response.status,
      headers: Object.fromEntries(response.headers),
      text: await response.text(),
      url: response.url,
    };
  }
  const { socket, events } = sockets.get(order.socket);
  if (order.do === "send") {
    for (const { text, base64 } of order.messages) socket.send(text ?? Buffer.from(base64, "base64"));
  } else if (order.do === "close") {
    socket.close(order.code, order.reason);
  } else if (order.do === "reconnect") {
    socket.reconnect(order.code, order.reason);
  }
  return { events, state: socket.readyState, id: socket.id, retries: socket.retryCount, room: socket.roomUrl };
}

for await (const line of createInterface({ input: process.stdin })) {
  let answer;
  try {
    answer = { result: (await obey(JSON.parse(line))) ?? null };
  } catch (error) {
    answer = { error: String(error?.stack ?? error) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
process.exit(0);
