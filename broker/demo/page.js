// The chat: who is here, what is said, and the forms. What others have written is only ever set as text.

import { Socket } from "./socket.js";
import { Strip } from "./strip.js";

const COUNTRIES = {
  at: "Austria", bw: "Botswana", co: "Colombia", cz: "Czechia", dk: "Denmark", fi: "Finland", fr: "France",
  de: "Germany", is: "Iceland", ie: "Ireland", it: "Italy", jp: "Japan", nl: "Netherlands", ng: "Nigeria",
  pe: "Peru", se: "Sweden", th: "Thailand", ua: "Ukraine",
};
const FIRST_NAMES = ["Amber", "Brisk", "Calm", "Daring", "Early", "Gentle", "Lucky", "Merry", "Quiet", "Sunny"];
const LAST_NAMES = ["Badger", "Crane", "Falcon", "Gecko", "Heron", "Lynx", "Marten", "Otter", "Panda", "Wren"];
const FIRST_ROOM = "lobby";
const TOGETHER_MS = 3 * 60_000; // messages of one person within that time stand together

const $ = (id) => document.getElementById(id);
const any = (list) => list[Math.floor(Math.random() * list.length)];
const narrow = matchMedia("(max-width: 899px)");

const me = {
  id: fresh(),
  name: recall("name") ?? `${any(FIRST_NAMES)} ${any(LAST_NAMES)}`,
  flag: recall("flag") ?? any(Object.keys(COUNTRIES)),
};
const people = new Map();
const visited = new Set([FIRST_ROOM, "kitchen", "night-shift"]);
let room = "";
let to = null; // the tag that gets the next message; null: everybody
let socket = null;
let unread = 0;
let live = null; // what the broker says of the rooms with connections; null: it does not say

const strip = new Strip((rooms) => {
  live = rooms;
  showRooms();
});

// --- The room

function enter() {
  const wanted = roomName(decode(location.hash.slice(1))) || FIRST_ROOM;
  if (wanted === room) return;
  room = wanted;
  visited.add(room);
  to = null;
  socket?.close();
  people.clear();
  $("log").replaceChildren();
  showPeople();
  showRooms();
  strip.watch(room);
  socket = new Socket(address, { open: () => strip.opened(), message: hear, status: showStatus });
  title();
}

function address() {
  const url = new URL(`/party/${encodeURIComponent(room)}`, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  url.hash = "";
  url.search = new URLSearchParams({ _pk: me.id, name: me.name, flag: me.flag });
  return url;
}

function hear(event) {
  switch (event.type) {
    case "welcome":
      people.clear();
      for (const person of event.people) people.set(person.id, person);
      $("log").replaceChildren();
      for (const said of event.history) addMessage(said);
      addLine(event.history.length ? "That is what was said before you came" : "Nobody has said anything yet");
      toNewest();
      break;
    case "joined":
    case "changed":
      people.set(event.person.id, event.person);
      if (event.line) addLine(event.line);
      break;
    case "left":
      people.delete(event.person.id);
      addLine(event.line);
      break;
    case "said":
      addMessage(event);
      break;
    case "notice":
      notice(event.line);
      break;
  }
  if (event.type !== "said") showPeople();
  strip.stirred();
}

// --- What is said

function addMessage({ from, text, to: tag, at }) {
  const mine = from.id === me.id;
  const last = $("log").lastElementChild;
  const together =
    last?.dataset.from === from.id && last.dataset.to === String(tag) && last.dataset.name === from.name &&
    at - Number(last.dataset.at) < TOGETHER_MS;
  const time = element("time", { dateTime: new Date(at).toISOString() }, clock(at));
  const head = element("p", { className: "head" },
    element("bdi", {}, mine ? "You" : from.name), " ", flag(from.flag, true), " ", time);
  const only = tag && element("p", { className: "only" }, "Only to ", flag(tag), ` ${country(tag)}`);
  const body = element("div", { className: "bubble", dir: "auto" }, only, element("p", { className: "text" }, text));
  const item = element("li", { className: "message" }, avatar(from), element("div", {}, head, body));
  Object.assign(item.dataset, { from: from.id, name: from.name, to: String(tag), at });
  item.classList.toggle("mine", mine);
  item.classList.toggle("together", together);
  item.classList.toggle("private", Boolean(tag));
  add(item);
  if (!mine && document.hidden) {
    unread += 1;
    title();
  }
}

function addLine(text) {
  add(element("li", { className: "line" }, element("span", {}, text)));
}

function add(item) {
  const log = $("log");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  log.append(item);
  while (log.childElementCount > 400) log.firstElementChild.remove();
  if (follows || item.classList.contains("mine")) toNewest();
  else $("newest").hidden = false;
}

function toNewest() {
  $("log").scrollTop = $("log").scrollHeight;
  $("newest").hidden = true;
}

function notice(text) {
  $("notice").textContent = text;
  clearTimeout(notice.timer);
  notice.timer = setTimeout(() => ($("notice").textContent = ""), 4000);
}

// --- Who is here, and where

function showPeople() {
  const known = [...people.values()];
  known.sort((a, b) => (b.id === me.id) - (a.id === me.id) || a.name.localeCompare(b.name));
  $("people-list").replaceChildren(...known.map((person) => {
    const mine = person.id === me.id;
    const name = element("span", { className: "name" }, element("bdi", {}, person.name));
    const action = mine
      ? element("button", { type: "button", className: "link" }, "Change")
      : element("button", { type: "button", className: "link", title: `Write only to ${country(person.flag)}` },
        `Only ${country(person.flag)}`);
    action.addEventListener("click", () => (mine ? edit() : choose(person.flag)));
    return element("li", {}, avatar(person), element("div", {}, name,
      element("span", { className: "where" }, mine ? "you · " : "", action)));
  }));
  for (const count of document.querySelectorAll("[data-people]")) count.textContent = people.size;
  showChoices();
  $("composer").querySelector("[data-edit]").replaceChildren(avatar(me),
    element("span", { className: "hidden" }, `You are ${me.name}, ${country(me.flag)}. Change`));
}

/** The tags in this room. The chosen one stays, also when nobody has it: a message meant for few must not go
 * to all. */
function showChoices() {
  const counts = new Map();
  for (const { flag } of people.values()) counts.set(flag, (counts.get(flag) ?? 0) + 1);
  if (to !== null && !counts.has(to)) counts.set(to, 0);
  const tags = [...counts.keys()].sort((a, b) => country(a).localeCompare(country(b)));
  const focused = $("choices").contains(document.activeElement);
  $("choices").replaceChildren(...[null, ...tags].map((tag) => {
    const input = element("input", { type: "radio", name: "to", value: tag ?? "", checked: tag === to });
    input.addEventListener("change", () => choose(tag));
    return tag === null
      ? element("label", {}, input, element("span", {}, "Everyone"))
      : element("label", {}, input, element("span", {}, flag(tag), ` Only ${country(tag)} `,
        element("small", { title: "people with this flag" }, counts.get(tag))));
  }));
  if (focused) $("choices").querySelector(":checked").focus();
}

function choose(tag) {
  to = tag;
  showChoices();
  $("choices").querySelector(":checked").parentElement.scrollIntoView({ block: "nearest", inline: "nearest" });
  $("text").placeholder = tag ? `Write to ${country(tag)} only` : "Write something";
  $("composer").classList.toggle("private", tag !== null);
  if (!$("choices").contains(document.activeElement)) {
    panels(null);
    $("text").focus();
  }
}

function showRooms() {
  const facts = new Map(live?.map((each) => [each.room, each]));
  const names = [...new Set([...visited, ...facts.keys()])].sort((a, b) => a.localeCompare(b));
  $("room-list").replaceChildren(...names.map((name) => {
    const { connections = 0, awake = false } = facts.get(name) ?? {};
    const dot = element("i", { className: "dot" });
    dot.dataset.state = awake ? "awake" : "asleep";
    const link = element("a", { href: `#${encodeURIComponent(name)}` }, live && dot, element("bdi", {}, name),
      live && element("span", { className: "hidden" }, awake ? ", awake" : ", asleep"),
      connections ? element("span", { className: "count", title: "sockets" }, connections) : null);
    if (name === room) link.setAttribute("aria-current", "page");
    return element("li", {}, link);
  }));
}

function showStatus(state, code) {
  const words = { connecting: "Connecting…", open: "Connected", waiting: "Connecting again…" };
  if (state === "waiting") {
    strip.closed();
    if (code === 4409) me.id = fresh(); // somebody else in the room has this id, and answers
  }
  if (state === "connecting" && $("status").dataset.state === "waiting") return;
  $("status").dataset.state = state;
  $("status").textContent = words[state];
}

function title() {
  document.title = `${unread ? `(${unread}) ` : ""}${room} · Broker chat`;
}

// --- Forms

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text) return;
  if (!socket.send({ say: text, to })) {
    notice("Not connected right now: your text stays here until it can be sent.");
    return;
  }
  $("text").value = "";
  grow();
});

$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});

function grow() {
  $("text").style.height = "auto";
  $("text").style.height = `${Math.min($("text").scrollHeight, 140)}px`;
}
$("text").addEventListener("input", grow);

$("new-room").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = roomName($("new-room-name").value);
  if (!name) return;
  $("new-room-name").value = "";
  location.hash = encodeURIComponent(name);
});

function edit() {
  $("name").value = me.name;
  $("flags").replaceChildren(...Object.keys(COUNTRIES).map((code) => {
    const input = element("input", { type: "radio", name: "flag", value: code, checked: code === me.flag });
    return element("label", {}, input, element("span", {}, flag(code), country(code)));
  }));
  panels(null);
  $("profile").showModal();
  $("name").select();
}

$("profile").addEventListener("submit", (event) => {
  event.preventDefault();
  me.name = $("name").value.trim() || me.name;
  me.flag = $("flags").querySelector(":checked")?.value ?? me.flag;
  keep("name", me.name);
  keep("flag", me.flag);
  socket.send({ name: me.name, flag: me.flag }); // while there is no connection, the next one's address says it
  $("profile").close();
  showPeople();
});
$("profile").querySelector("[data-cancel]").addEventListener("click", () => $("profile").close());
$("composer").querySelector("[data-edit]").addEventListener("click", edit);
$("newest").addEventListener("click", toNewest);
$("log").addEventListener("scroll", () => {
  const log = $("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 80) $("newest").hidden = true;
});

// --- Panels of the narrow page

function panels(open) {
  for (const button of document.querySelectorAll(".toggles button")) {
    const shown = button.getAttribute("aria-controls") === open;
    button.setAttribute("aria-expanded", String(shown));
    $(button.getAttribute("aria-controls")).classList.toggle("open", shown);
  }
}

for (const button of document.querySelectorAll(".toggles button")) {
  button.addEventListener("click", () => {
    panels(button.getAttribute("aria-expanded") === "true" ? null : button.getAttribute("aria-controls"));
  });
}
addEventListener("keydown", (event) => {
  const open = document.querySelector('.toggles [aria-expanded="true"]');
  if (event.key !== "Escape" || !open) return;
  panels(null);
  open.focus();
});
document.querySelector("main").addEventListener("pointerdown", () => panels(null));

// --- Small things

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** The picture of a flag; `spoken` where no word beside it says the same. */
function flag(code, spoken = false) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "flag");
  svg.setAttribute("role", "img");
  svg.setAttribute(spoken ? "aria-label" : "aria-hidden", spoken ? country(code) : "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `/flags.svg#${Object.hasOwn(COUNTRIES, code) ? code : "un"}`);
  svg.append(use);
  return svg;
}

function avatar({ name, flag: code }) {
  const made = element("span", { className: "avatar" }, element("span", {}, [...name][0]?.toUpperCase() ?? "?"), flag(code));
  made.setAttribute("aria-hidden", "true");
  let hue = 7;
  for (const character of name) hue = (hue * 31 + character.codePointAt(0)) % 360;
  made.style.setProperty("--hue", hue);
  return made;
}

function country(code) {
  return COUNTRIES[code] ?? "Elsewhere";
}

function clock(at) {
  return new Date(at).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

/** A room's name as it stands in the address: letters and digits of any script, with hyphens between. */
function roomName(text) {
  return text.toLowerCase().replace(/[^\p{L}\p{M}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 40);
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

function fresh() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function recall(key) {
  try {
    return sessionStorage.getItem(key);
  } catch {
    return null;
  }
}

function keep(key, value) {
  try {
    sessionStorage.setItem(key, value);
  } catch {
    // a browser that keeps nothing asks again
  }
}

addEventListener("hashchange", () => {
  panels(null);
  enter();
});
document.addEventListener("visibilitychange", () => {
  unread = 0;
  title();
});
keep("name", me.name);
keep("flag", me.flag);
enter();
if (!narrow.matches) $("text").focus();
