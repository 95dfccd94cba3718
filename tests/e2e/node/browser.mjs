// One headless Chromium, driven by lines of JSON on standard input, answered one by one on standard output.
//
// {"do": "open", "tab": name, "args": [url, {storage, context}]} opens a tab; `storage` is what its
// sessionStorage begins with, `context` gives it a browser context of its own with these options.
// {"do": "record", "tab": name} tells what has happened in it: its WebSockets, and all that went wrong; "received" tells
// how many frames have come on its WebSockets.
// Any other "do" is a method of Playwright's Page. Peer: tests/e2e/browser.py.

import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

const [executablePath] = process.argv.slice(2);
const quiet = [
  "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const browser = await chromium.launch({ executablePath, args: quiet, chromiumSandbox: process.getuid() !== 0 });
const shared = await browser.newContext();
const tabs = new Map();
const received = new Map();

async function open(name, url, { storage = {}, context } = {}) {
  const page = await (context ? await browser.newContext(context) : shared).newPage();
  page.setDefaultTimeout(30_000);
  const record = { opened: 0, closed: 0, problems: [], outside: [] };
  received.set(name, 0);
  page.on("websocket", (socket) => {
    record.opened += 1;
    socket.on("framereceived", () => received.set(name, received.get(name) + 1));
    socket.on("close", () => (record.closed += 1));
  });
  page.on("pageerror", (error) => record.problems.push(String(error)));
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) record.problems.push(message.text());
  });
  page.on("request", (request) => {
    if (new URL(request.url()).origin !== new URL(url).origin) record.outside.push(request.url());
  });
  await page.addInitScript((items) => {
    for (const [key, value] of Object.entries(items)) sessionStorage[key] ??= value;
  }, storage);
  tabs.set(name, { page, record });
  await page.goto(url);
}

async function obey({ do: what, tab, args = [] }) {
  if (what === "open") return open(tab, ...args);
  const { page, record } = tabs.get(tab);
  if (what === "record") return record;
  if (what === "received") return received.get(tab);
  if (what === "close") tabs.delete(tab);
  const result = await page[what](...args);
  return ["evaluate", "textContent", "inputValue", "isVisible", "title"].includes(what) ? result : null;
}

for await (const line of createInterface({ input: process.stdin })) {
  let answer;
  try {
    answer = { result: (await obey(JSON.parse(line))) ?? null };
  } catch (error) {
    answer = { error: String(error) };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
await browser.close();
