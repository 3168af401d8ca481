// The power trace of one GPU: a strip that is drawn once per round and moved by the compositor in between.
//
// Eight curves of 3,000 points need not be drawn anew for each frame, and there may be no graphics card to do it. The
// strip is a little longer than the window, so that there is always something to move in.

const DEPTH = 8192; // Points kept; a window of 60 s at 50 Hz is 3,000.
const SPANS = 96; // Driver spans kept, about one a second.
const AHEAD_SECONDS = 3; // What the strip may hold that is not in view yet.
const GAP_MS = 2;
const SET_BACK_MS = 1000; // News that end so long before what is known are of a clock that was set back.
const LEVEL_MS = 250; // A longer step than any sensor's period is drawn as the level that it is.

export class Trace {
  #windowMs;
  #ends = new Float64Array(DEPTH);
  #starts = new Float64Array(DEPTH);
  #watts = new Float32Array(DEPTH);
  #count = 0; // Points ever taken; the newest stands at (count - 1) % DEPTH.
  #spans = [];
  #context;
  #width = 0;
  #height = 0;
  #leftMs = 0; // The time at the strip's left edge.
  #top = 100;

  constructor(windowSeconds) {
    this.canvas = document.createElement("canvas");
    this.#context = this.canvas.getContext("2d");
    this.#windowMs = windowSeconds * 1000;
  }

  /** Returns up to when there is data, epoch ms; 0 for none. */
  get endMs() {
    return this.#count ? this.#ends[(this.#count - 1) % DEPTH] : 0;
  }

  /** Returns the watts at the top of the chart. */
  get top() {
    return this.#top;
  }

  /** Returns the watts at which lines are drawn: round ones, two to five of them, with room for their names. */
  get levels() {
    const rough = this.#top / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough);
    return Array.from({ length: Math.floor((this.#top * 0.94) / step) }, (_, i) => (i + 1) * step);
  }

  /** Adds a piece of the stream; what is known already is skipped. */
  add({ start_ms: startMs, steps_ms: steps, watts }) {
    if (steps.reduce((sum, step) => sum + step, startMs) < this.endMs - SET_BACK_MS) {
      this.#count = 0;
      this.#spans = [];
    }
    let end = this.endMs;
    let at = startMs;
    for (let i = 0; i < steps.length; i++) {
      const start = at;
      at += steps[i];
      if (at <= end) continue;
      const place = this.#count % DEPTH;
      this.#starts[place] = Math.max(start, end);
      this.#ends[place] = at;
      this.#watts[place] = watts[i] ?? NaN; // Nobody knows.
      this.#count += 1;
      end = at;
    }
  }

  /** Adds what the power went to, by driver; what is known already is skipped. */
  addDrivers({ starts_ms: starts, ends_ms: ends, watts }, order) {
    let known = this.#spans.at(-1)?.end ?? 0;
    for (let i = 0; i < ends.length; i++) {
      if (ends[i] <= known) continue;
      known = ends[i];
      // A new object per second and GPU, as many as are dropped: the number stays the same.
      this.#spans.push({ start: starts[i], end: ends[i], watts: order.map((name) => watts[name][i]) });
    }
    this.#spans.splice(0, this.#spans.length - SPANS);
  }

  /** Returns least, mean and greatest watts of the window, or null. */
  summary() {
    const from = this.endMs - this.#windowMs;
    let least = Infinity;
    let most = -Infinity;
    let joules = 0;
    let time = 0;
    for (let i = this.#first(from); i < this.#count; i++) {
      const place = i % DEPTH;
      const watts = this.#watts[place];
      if (Number.isNaN(watts)) continue;
      least = Math.min(least, watts);
      most = Math.max(most, watts);
      joules += watts * (this.#ends[place] - this.#starts[place]);
      time += this.#ends[place] - this.#starts[place];
    }
    return time ? { least, most, mean: joules / time } : null;
  }

  /** Draws the strip for a window whose right edge is at `headMs`. */
  draw(headMs, limitWatts, colours) {
    const frame = this.canvas.parentElement;
    const scale = Math.min(devicePixelRatio || 1, 2);
    this.#width = frame.clientWidth;
    this.#height = frame.clientHeight;
    if (!this.#width || !this.#height) return;
    const perMs = this.#width / this.#windowMs;
    const strip = Math.ceil(this.#width + AHEAD_SECONDS * 1000 * perMs);
    const [pixelsWide, pixelsHigh] = [Math.round(strip * scale), Math.round(this.#height * scale)];
    if (this.canvas.width !== pixelsWide || this.canvas.height !== pixelsHigh) {
      this.canvas.width = pixelsWide;
      this.canvas.height = pixelsHigh;
      this.canvas.style.width = `${strip}px`;
    }
    this.#leftMs = headMs - this.#windowMs;
    this.#scale(limitWatts);
    const context = this.#context;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, strip, this.#height);
    this.#drawDrivers(context, perMs, colours);
    this.#drawLines(context, strip, limitWatts, colours);
    this.#drawPower(context, perMs, colours);
    this.move(headMs);
  }

  /** Moves the strip so that the window's right edge is at `headMs`. */
  move(headMs) {
    const x = ((headMs - this.#windowMs - this.#leftMs) * this.#width) / this.#windowMs;
    this.canvas.style.transform = `translate3d(${-x.toFixed(2)}px,0,0)`;
  }

  /** Above the limit is room for its name; a peak above it makes room for itself. */
  #scale(limitWatts) {
    const summary = this.summary();
    this.#top = Math.max((limitWatts ?? 0) * 1.15, (summary?.most ?? 0) * 1.05, 10);
  }

  #y(watts) {
    return this.#height * (1 - watts / this.#top);
  }

  #drawDrivers(context, perMs, colours) {
    for (const span of this.#spans) {
      const x = (span.start - this.#leftMs) * perMs;
      const width = (span.end - span.start) * perMs;
      if (x + width < 0) continue;
      let base = 0;
      span.watts.forEach((watts, place) => {
        if (watts <= 0) return;
        context.fillStyle = colours.drivers[place];
        const bottom = this.#y(base);
        base += watts;
        const top = this.#y(base);
        context.fillRect(x, top, width + 0.5, bottom - top);
      });
    }
  }

  #drawLines(context, strip, limitWatts, colours) {
    context.lineWidth = 1;
    context.strokeStyle = colours.line;
    context.beginPath();
    for (const watts of this.levels) {
      const y = Math.round(this.#y(watts)) + 0.5;
      context.moveTo(0, y);
      context.lineTo(strip, y);
    }
    context.stroke();
    if (!limitWatts) return;
    context.strokeStyle = colours.limit;
    context.setLineDash([6, 4]);
    context.beginPath();
    const y = Math.round(this.#y(limitWatts)) + 0.5;
    context.moveTo(0, y);
    context.lineTo(strip, y);
    context.stroke();
    context.setLineDash([]);
  }

  #drawPower(context, perMs, colours) {
    context.strokeStyle = colours.trace;
    context.lineWidth = 1.25;
    context.lineJoin = "bevel";
    context.beginPath();
    let end = 0;
    for (let i = this.#first(this.#leftMs); i < this.#count; i++) {
      const place = i % DEPTH;
      if (Number.isNaN(this.#watts[place])) continue;
      const start = this.#starts[place];
      const x = (start - this.#leftMs) * perMs;
      const right = (this.#ends[place] - this.#leftMs) * perMs;
      const y = this.#y(this.#watts[place]);
      // A gap in the data is a gap in the line.
      if (start - end > GAP_MS) context.moveTo(x, y);
      end = this.#ends[place];
      if (end - start > LEVEL_MS) {
        context.lineTo(x, y);
        context.lineTo(right, y);
      } else {
        context.lineTo((x + right) / 2, y);
      }
    }
    context.stroke();
  }

  /** Returns the number of the first point that ends after a time. */
  #first(fromMs) {
    let low = Math.max(0, this.#count - DEPTH);
    let high = this.#count;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#ends[middle % DEPTH] > fromMs) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

/** The moment that the traces' right edge shows: behind the newest data by as little as keeps it from running dry. */
export class Playhead {
  #ticks = []; // [performance.now(), server ms] of the last rounds
  #rate = 1;
  #delayMs = 2200;
  #headMs = 0;
  #at = 0;

  /** Notes a round: the server's time, and up to when the traces go that are not stuck. */
  note(nowMs, endsMs) {
    this.#ticks.push([performance.now(), nowMs]);
    if (this.#ticks.length > 10) this.#ticks.shift();
    const [first, last] = [this.#ticks[0], this.#ticks[this.#ticks.length - 1]];
    if (last[0] - first[0] > 2500) {
      // A replay may run faster than time.
      const rate = (last[1] - first[1]) / (last[0] - first[0]);
      this.#rate = Math.abs(rate - 1) < 0.1 ? 1 : rate;
    }
    const ages = endsMs.map((end) => nowMs - end).filter((age) => age < 5000 * this.#rate);
    if (ages.length) {
      // Until the next round comes nothing is added.
      const needed = Math.max(...ages) + 1200 * this.#rate;
      this.#delayMs = Math.max(needed, this.#delayMs * 0.98);
    }
  }

  /** Begins anew, after a pause or a lost connection. */
  reset() {
    this.#ticks = [];
    this.#headMs = 0;
  }

  /** Returns the time to show now, epoch ms. */
  at(performanceNow) {
    if (!this.#ticks.length) return this.#headMs;
    // The round that came with the least delay tells the server's time best.
    let server = -Infinity;
    for (const [at, nowMs] of this.#ticks) server = Math.max(server, nowMs + (performanceNow - at) * this.#rate);
    const target = server - this.#delayMs;
    const passed = Math.min(performanceNow - this.#at, 1000);
    this.#at = performanceNow;
    const head = this.#headMs + passed * this.#rate;
    const off = target - head;
    this.#headMs = Math.abs(off) > 2000 * this.#rate ? target : head + off * Math.min(1, passed / 1500);
    return this.#headMs;
  }
}
