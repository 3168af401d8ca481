// The connection: server-sent events over fetch (which can send a token, unlike EventSource), reconnecting with back-off.

const FIRST_WAIT_SECONDS = 1;
const LONGEST_WAIT_SECONDS = 15;
const HIDDEN_SECONDS = 30;
const SILENT_ROUNDS = 3; // Rounds that may be missing before the data counts as stale,
const DEAD_ROUNDS = 10; // and before the connection is given up.

/** Follows a stream; tells `onEvent(name, data)` and `onState({state, seconds, reason})`. */
export class Stream {
  #url;
  #onEvent;
  #onState;
  #token = "";
  #abort = null;
  #tries = 0;
  #timer = 0;
  #hiddenTimer = 0;
  #lastRound = 0;
  #intervalSeconds = 1;
  #state = "";

  constructor(url, onEvent, onState) {
    this.#url = url;
    this.#onEvent = onEvent;
    this.#onState = onState;
    setInterval(() => this.#watch(), 1000);
    document.addEventListener("visibilitychange", () => this.#visibility());
    addEventListener("pagehide", () => this.#close());
    addEventListener("pageshow", (event) => event.persisted && this.connect());
    addEventListener("online", () => this.#state === "waiting" && this.connect());
  }

  /** Connects anew, with a token or without. */
  connect(token = this.#token) {
    this.#token = token;
    this.#close();
    this.#run();
  }

  #close() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#abort = null;
  }

  #say(state, detail = {}) {
    this.#state = state;
    this.#onState({ state, ...detail });
  }

  async #run() {
    const abort = (this.#abort = new AbortController());
    this.#lastRound = performance.now();
    this.#say("connecting");
    let reason = "The connection was lost";
    try {
      const headers = this.#token ? { Authorization: `Bearer ${this.#token}` } : {};
      const answer = await fetch(this.#url, { headers, cache: "no-store", signal: abort.signal });
      if (!answer.ok) {
        reason = await refusal(answer);
        throw new Error(reason);
      }
      await this.#read(answer.body);
      reason = "The daemon ended the connection";
    } catch (error) {
      if (abort !== this.#abort) return; // Given up on purpose; somebody else goes on.
      if (error instanceof TypeError) reason = "The daemon cannot be reached";
    }
    if (abort === this.#abort) this.#wait(reason);
  }

  async #read(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) this.#take(part);
    }
  }

  #take(part) {
    const end = part.indexOf("\n");
    const name = part.slice("event: ".length, end);
    const data = JSON.parse(part.slice(end + 1 + "data: ".length));
    this.#lastRound = performance.now();
    if (name === "hello") this.#intervalSeconds = data.interval_seconds;
    if (this.#state !== "live") {
      this.#tries = 0;
      this.#say("live");
    }
    this.#onEvent(name, data);
  }

  /** Waits, longer each time, with some chance so that many pages do not come back at once. */
  #wait(reason) {
    this.#abort = null;
    const longest = Math.min(FIRST_WAIT_SECONDS * 2 ** this.#tries, LONGEST_WAIT_SECONDS);
    this.#tries += 1;
    let seconds = Math.max(1, Math.round(longest * (0.75 + Math.random() / 4)));
    const countDown = () => {
      if (seconds === 0) return this.connect();
      this.#say("waiting", { seconds, reason });
      seconds -= 1;
      this.#timer = setTimeout(countDown, 1000);
    };
    countDown();
  }

  /** Notices a connection that is open and dead. */
  #watch() {
    if (this.#abort === null || document.hidden) return;
    const silent = (performance.now() - this.#lastRound) / 1000;
    if (silent > Math.max(DEAD_ROUNDS * this.#intervalSeconds, 5)) {
      this.#close();
      this.#wait("The daemon has gone silent");
    } else if (silent > SILENT_ROUNDS * this.#intervalSeconds && this.#state !== "connecting") {
      this.#say("stale", { seconds: Math.round(silent) });
    }
  }

  /** A hidden page lets its connection go: it costs the daemon, and browsers allow six per site. */
  #visibility() {
    clearTimeout(this.#hiddenTimer);
    if (document.hidden) {
      this.#hiddenTimer = setTimeout(() => {
        this.#close();
        this.#say("hidden");
      }, HIDDEN_SECONDS * 1000);
    } else if (this.#abort === null) {
      this.#tries = 0;
      this.connect();
    }
  }
}

async function refusal(answer) {
  try {
    return (await answer.json()).error.message.replace(/\.$/, "");
  } catch {
    return `The daemon answered ${answer.status}`;
  }
}
