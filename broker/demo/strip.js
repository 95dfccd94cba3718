// The live strip: what the broker does right now, read from its admin interface. Asking it wakes no room.

const LOOK_MS = 700;
const LOOK_HIDDEN_MS = 6000;
const LOOK_SOON_MS = 60;
const LOOK_APART_MS = 250;
const WINDOW_MS = 60_000;
const SAME_MS = 400; // two answers mean the same waking if their instants are that close

const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Strip {
  #element = document.getElementById("strip");
  #track = document.getElementById("track");
  #figures = new Map([...document.querySelectorAll("[data-figure]")].map((each) => [each.dataset.figure, each]));
  #room = "";
  #watching = 0; // since when this room is watched
  #followed = 0; // when it was last looked at
  #spans = []; // when the room was awake: { from, to, bar }, `to` null while it lasts
  #marks = []; // when something came from it: { at, dot }
  #wakes = null;
  #naps = 0;
  #opened = 0;
  #openedAt = null;
  #timer = 0;
  #looking = false;
  #again = false;
  #lookedAt = 0;
  #onRooms;

  /** `onRooms(rooms)` is told of all rooms with connections, each time they have been read. */
  constructor(onRooms) {
    this.#onRooms = onRooms;
    document.addEventListener("visibilitychange", () => document.hidden || this.#soon());
    setInterval(() => document.hidden || this.#draw(), still.matches ? 1000 : 100);
  }

  /** Watches another room. */
  watch(room) {
    this.#room = room;
    this.#watching = this.#followed = performance.now();
    for (const { bar } of this.#spans) bar.remove();
    for (const { dot } of this.#marks) dot.remove();
    this.#spans = [];
    this.#marks = [];
    document.getElementById("room-name").textContent = room;
    this.#show("unknown", "");
    this.closed();
    this.#soon();
  }

  /** This tab's socket is open, for the first time or again. */
  opened() {
    document.getElementById("socket").dataset.opened = ++this.#opened;
    this.#openedAt = performance.now();
    this.#wakes = null;
    this.#naps = 0;
  }

  closed() {
    this.#openedAt = null;
  }

  /** Something came from the room: it is awake, so look now. */
  stirred() {
    const dot = document.createElement("i");
    this.#marks.push({ at: performance.now(), dot });
    this.#track.append(dot);
    this.#soon();
  }

  // --- Looking

  #soon() {
    if (this.#looking) {
      this.#again = true;
      return;
    }
    clearTimeout(this.#timer);
    const rested = performance.now() - this.#lookedAt;
    this.#timer = setTimeout(() => this.#look(), Math.max(LOOK_SOON_MS, LOOK_APART_MS - rested));
  }

  async #look() {
    this.#looking = true;
    this.#again = false;
    let next = document.hidden ? LOOK_HIDDEN_MS : LOOK_MS;
    const room = this.#room;
    try {
      const [stats, { rooms }, { rooms: [here] }] = await Promise.all([
        ask("stats"),
        ask("rooms?party=chat&limit=50"),
        ask(`rooms?party=chat&room=${encodeURIComponent(room)}`),
      ]);
      if (room === this.#room) {
        this.#tell(stats);
        this.#follow(here);
        this.#onRooms(rooms);
      }
    } catch (error) {
      next = LOOK_HIDDEN_MS;
      this.#end(performance.now());
      this.#show("unknown", "");
      if (error instanceof Denied) {
        document.getElementById("explain").textContent =
          "Live figures are shown where this chat runs by “broker demo” or “broker dev”, on the same machine.";
        this.#element.dataset.state = "denied";
        return;
      }
    } finally {
      this.#looking = false;
      this.#lookedAt = performance.now();
    }
    if (this.#again) this.#soon();
    else this.#timer = setTimeout(() => this.#look(), next);
  }

  #tell({ connections, awake, wakes, messages }) {
    const values = { sockets: connections, awake, wakes, messages };
    for (const [name, value] of Object.entries(values)) {
      const element = this.#figures.get(name);
      const text = value.toLocaleString("en");
      if (element.textContent === text) continue;
      const first = element.textContent === "–";
      element.textContent = text;
      if (!first && !still.matches) {
        element.animate([{ transform: "translateY(-.35em)", opacity: 0.2 }, {}], { duration: 260, easing: "ease-out" });
      }
    }
  }

  /** Takes over what is known of the room's last waking. When it fell asleep is known only as a time between
   * two looks; half of it is never far off. */
  #follow({ awake, wakes, woke_seconds_ago: woke }) {
    const now = performance.now();
    const between = (this.#followed + now) / 2;
    this.#followed = now;
    if (this.#wakes !== null) this.#naps += wakes >= this.#wakes ? wakes - this.#wakes : wakes;
    this.#wakes = wakes;
    const last = this.#spans.at(-1);
    if (woke === null) {
      this.#end(between); // its host is a new one, and has not had it awake
    } else {
      const from = now - woke * 1000;
      if (!last || Math.abs(last.from - from) > SAME_MS) {
        this.#end(Math.min(between, from));
        if (from > this.#watching || awake) this.#begin(from);
      }
      if (!awake) this.#end(Math.max(between, from));
    }
    this.#show(awake ? "awake" : "asleep", awake ? "is awake" : "is asleep");
  }

  #begin(from) {
    const bar = document.createElement("b");
    this.#track.append(bar);
    this.#spans.push({ from, to: null, bar });
  }

  #end(at) {
    const last = this.#spans.at(-1);
    if (last && last.to === null) last.to = at;
  }

  // --- Showing

  #show(state, words) {
    if (this.#element.dataset.state === state) return;
    this.#element.dataset.state = state;
    document.getElementById("mood").textContent = words || "\u00a0";
    this.#draw();
  }

  #draw() {
    const now = performance.now();
    const place = (at) => `${Math.max(0, 100 - ((now - at) / WINDOW_MS) * 100)}%`;
    this.#spans = this.#spans.filter(({ to, bar }) => to === null || to > now - WINDOW_MS || bar.remove());
    this.#marks = this.#marks.filter(({ at, dot }) => at > now - WINDOW_MS || dot.remove());
    let awake = 0;
    const begin = Math.max(now - WINDOW_MS, this.#watching);
    for (const { from, to, bar } of this.#spans) {
      bar.style.left = place(from);
      bar.style.right = `${Math.min(100, ((now - (to ?? now)) / WINDOW_MS) * 100)}%`;
      awake += Math.max(0, (to ?? now) - Math.max(from, begin));
    }
    for (const { at, dot } of this.#marks) dot.style.left = place(at);
    const known = this.#element.dataset.state !== "unknown" && now - begin > 3000;
    const share = Math.round((awake / Math.max(1, now - begin)) * 100);
    say("share", known ? `In memory ${share} % of the last ${now - begin < WINDOW_MS ? span(now - begin) : "minute"}` : "");
    say("socket", this.#openedAt === null ? "" : this.#proof(now - this.#openedAt));
  }

  #proof(milliseconds) {
    const naps = this.#naps === 1 ? "1 nap" : `${this.#naps} naps`;
    return `Your socket: open for ${span(milliseconds)}${this.#naps ? `, through ${naps}` : ""}.`;
  }
}

class Denied extends Error {}

async function ask(question) {
  const answer = await fetch(`/_broker/api/${question}`, { cache: "no-store" });
  if (answer.status === 401 || answer.status === 403) throw new Denied();
  if (!answer.ok) throw new Error(`${question}: ${answer.status}`);
  return answer.json();
}

function say(id, text) {
  const element = document.getElementById(id);
  const shown = text || "\u00a0";
  if (element.textContent !== shown) element.textContent = shown;
}

function span(milliseconds) {
  const seconds = Math.floor(milliseconds / 1000);
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${seconds % 60} s` : `${seconds} s`;
}
