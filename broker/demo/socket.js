// A WebSocket that opens itself again when it is lost, and says how it stands.

const FIRST_DELAY_MS = 300;
const LAST_DELAY_MS = 8000;

export class Socket {
  #address;
  #events;
  #socket = null;
  #timer = 0;
  #failures = 0;
  #ended = false;
  #abort = new AbortController();

  /**
   * `address()` gives the URL of each attempt. `events` has `message(value)`, with what the server sent as
   * JSON, `open()`, and `status(state, code)`, where the state is "connecting", "open" or "waiting".
   */
  constructor(address, events) {
    this.#address = address;
    this.#events = events;
    const { signal } = this.#abort;
    addEventListener("online", () => this.#hurry(), { signal });
    document.addEventListener("visibilitychange", () => document.hidden || this.#hurry(), { signal });
    this.#open();
  }

  /** Sends a value as JSON; false if there is nobody to send it to right now. */
  send(value) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify(value));
    return true;
  }

  /** Ends it for good. */
  close() {
    this.#ended = true;
    this.#abort.abort();
    clearTimeout(this.#timer);
    this.#socket?.close(1000);
  }

  #open() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#events.status("connecting");
    const socket = (this.#socket = new WebSocket(this.#address()));
    socket.onopen = () => {
      if (this.#ended) return;
      this.#events.status("open");
      this.#events.open();
    };
    socket.onmessage = (event) => {
      if (this.#ended) return;
      this.#failures = 0; // only a server that speaks counts as back
      this.#events.message(JSON.parse(event.data));
    };
    socket.onclose = (event) => {
      if (this.#ended) return;
      const longest = Math.min(LAST_DELAY_MS, FIRST_DELAY_MS * 2 ** this.#failures++);
      this.#timer = setTimeout(() => this.#open(), longest * (0.5 + Math.random() / 2));
      this.#events.status("waiting", event.code);
    };
  }

  /** The network is back, or somebody looks again: no reason to wait. */
  #hurry() {
    if (this.#timer) this.#open();
  }
}
