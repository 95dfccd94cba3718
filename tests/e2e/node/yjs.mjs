// Unmodified Yjs with y-websocket on ws, driven by lines of JSON on standard input, answered one by one on
// standard output.
//
// {"do": "open", "editor": name, "server": url, "room": id} makes a document and connects it; "insert" and
// "delete" change its text, "look" tells its text, whether it is in sync and who is there, "name" says who
// this is, "disconnect" and "connect" are a network that comes and goes. Peer: tests/examples/yjs.py.

import { createInterface } from "node:readline";
import { WebsocketProvider } from "y-websocket";
import WebSocket from "ws";
import * as Y from "yjs";

const editors = new Map();

function obey({ do: what, editor, ...order }) {
  if (what === "open") {
    const doc = new Y.Doc();
    const options = { WebSocketPolyfill: WebSocket, disableBc: true };
    editors.set(editor, new WebsocketProvider(order.server, order.room, doc, options));
    return null;
  }
  const provider = editors.get(editor);
  const text = provider.doc.getText("text");
  if (what === "insert") text.insert(order.at ?? text.length, order.text);
  if (what === "delete") text.delete(order.at, order.length);
  if (what === "name") provider.awareness.setLocalStateField("name", order.name);
  if (what === "disconnect") provider.disconnect();
  if (what === "connect") provider.connect();
  if (what === "close") provider.destroy();
  const names = [...provider.awareness.getStates().values()].map((state) => state.name).filter(Boolean);
  return { text: text.toString(), synced: provider.synced, names: names.sort() };
}

for await (const line of createInterface({ input: process.stdin })) {
  let answer;
  try {
    answer = { result: obey(JSON.parse(line)) };
  } catch (error) {
    answer = { error: String(error) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
process.exit(0);
