// What stands on the page. Elements are made once and their texts changed only when they differ; texts never become markup.

export const ABSENT = "–";
const DRIVERS = ["static", "memory", "tensor", "other_compute", "links", "unexplained"];
const PARTS = ["idle", "fixed", "kv", "decode", "prefill", "between_steps", "busy"];

const MOST_MARKS = 5;

export const DRIVER_ORDER = DRIVERS;

/** Makes an element with attributes and children. */
export function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Changes a text where it differs. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function show(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

function mark(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

/** Writes a name of the code as people do. */
export const words = (name) => name.replaceAll("_", " ");

export const watts = (value) => (value == null ? ABSENT : `${value < 10 ? value.toFixed(1) : Math.round(value)} W`);

export function joules(value) {
  if (value == null) return ABSENT;
  for (const [size, unit] of [[1e9, "GJ"], [1e6, "MJ"], [1e3, "kJ"]]) {
    if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  }
  if (value < 5e-4) return "0 J"; // Sums of floats seldom are.
  return `${value >= 100 ? Math.round(value) : Number(value.toPrecision(3))} J`;
}

const percent = (ratio) => (ratio == null ? ABSENT : `${Math.round(ratio * 100)} %`);

const count = (value) => (value == null ? ABSENT : String(Math.round(value * 10) / 10));

export function duration(seconds) {
  if (!(seconds >= 0)) return ABSENT;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

function figure(value) {
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value);
}

/** A list of label and value: `set(key, text)`; a text of null hides it. */
class Facts {
  constructor(entries) {
    this.element = node("dl", { class: "facts" });
    this.rows = new Map();
    for (const [key, label] of entries) {
      const value = node("dd", { class: "value", "data-figure": key }, ABSENT);
      const row = node("div", {}, node("dt", {}, label), value);
      this.rows.set(key, { row, value });
      this.element.append(row);
    }
  }

  set(key, text) {
    const { row, value } = this.rows.get(key);
    show(row, text !== null);
    if (text !== null) write(value, text);
  }
}

/** A bar of parts that add up, with its legend: `set({part: number}, format)`. */
class Share {
  constructor(names, key, label) {
    this.names = names;
    this.bar = node("div", { class: "share", "aria-hidden": "true" });
    this.list = node("ul", { class: "parts", "aria-label": label, "data-figure": key });
    this.parts = names.map((name, place) => {
      const piece = node("span", { class: `kind${place}` });
      const value = node("span", { class: "value" });
      const item = node("li", {}, node("span", { class: `swatch kind${place}` }), `${words(name)} `, value);
      this.bar.append(piece);
      this.list.append(item);
      return { piece, value, item };
    });
  }

  set(values, whole, format) {
    this.names.forEach((name, place) => {
      const { piece, value, item } = this.parts[place];
      const part = values?.[name];
      show(item, part !== undefined);
      const width = `${Math.max(0, Math.min(100, ((part ?? 0) / (whole || 1)) * 100)).toFixed(1)}%`;
      if (piece.style.width !== width) piece.style.width = width;
      if (part !== undefined) write(value, format(part));
    });
  }
}

/** An opened-up list of evidence. */
class Evidence {
  constructor(summary) {
    this.facts = node("dl", { class: "facts" });
    this.element = node("details", { "data-figure": "evidence" }, node("summary", {}, summary), this.facts);
    this.element.addEventListener("toggle", () => this.set(this.evidence));
    this.evidence = {};
    this.rows = new Map();
  }

  set(evidence) {
    this.evidence = evidence ?? {};
    show(this.element, Object.keys(this.evidence).length > 0);
    if (!this.element.open) return;
    for (const [name, value] of Object.entries(this.evidence)) {
      if (!this.rows.has(name)) {
        const cell = node("dd", { class: "value" });
        const row = node("div", {}, node("dt", {}, words(name)), cell);
        this.rows.set(name, { row, cell });
        this.facts.append(row);
      }
      write(this.rows.get(name).cell, figure(value));
    }
    for (const [name, { row }] of this.rows) show(row, name in this.evidence);
  }
}

/** One GPU's card. */
export class DeviceCard {
  constructor(device, canvas) {
    const id = `gpu-${device.gpu}`;
    this.name = `GPU ${device.gpu}`;
    this.power = node("p", { class: "power" });
    this.now = node("span", { class: "value", "data-figure": "power" });
    this.limit = node("small", { class: "value", "data-figure": "limit" });
    this.power.append(this.now, " ", this.limit);
    this.verdict = node("span", { class: "verdict value", "data-figure": "verdict" });
    this.since = node("span", { class: "quiet value" });
    this.confidence = node("span", { class: "quiet value", "data-figure": "confidence" });
    this.flags = node("span", { class: "raised value", "data-figure": "flags" });
    this.badges = node("p", { class: "badges" }, this.verdict, this.since, this.confidence, this.flags);
    this.sentence = node("p", { class: "sentence" });
    this.state = node("p", { class: "state" });
    this.canvas = canvas;
    mark(canvas, "data-figure", "trace");
    mark(canvas, "role", "img");
    mark(canvas, "aria-label", `Power of ${this.name}`);
    this.marks = Array.from({ length: MOST_MARKS }, () => node("p", { class: "mark", "aria-hidden": "true" }));
    this.limitMark = node("p", { class: "mark limit", "aria-hidden": "true" });
    this.empty = node("p", { class: "void" }, "no data");
    this.chart = node("div", { class: "chart" }, this.canvas, ...this.marks, this.limitMark, this.empty);
    this.drivers = new Share(DRIVERS, "drivers", "Drivers, watts");
    this.facts = new Facts([
      ["power_max", "highest in 1 min"],
      ["drivers_confidence", "drivers' confidence"],
      ["temperature", "temperature"],
      ["idle_level", "idle level"],
      ["idle", "idle energy"],
      ["waste", "waste"],
      ["source", "source"],
      ["age", "sample age"],
    ]);
    this.evidence = new Evidence("Evidence");
    this.element = node(
      "article",
      { class: "card", "aria-labelledby": id },
      node(
        "header",
        {},
        node("h3", { id }, `${this.name} `, node("small", { title: device.uuid }, device.name)),
        this.power,
      ),
      this.state,
      this.badges,
      this.sentence,
      this.chart,
      node("p", { class: "ends", "aria-hidden": "true" }, node("span", {}, "1 min ago"), node("span", {}, "now")),
      this.drivers.bar,
      this.drivers.list,
      this.facts.element,
      this.evidence.element,
    );
  }

  set(device, nowMs) {
    const { verdict, drivers } = device;
    mark(this.element, "data-state", device.state);
    write(this.now, watts(device.watts));
    write(this.limit, device.limit_watts ? `of ${watts(device.limit_watts)}` : "");
    write(this.state, troubles(device));
    const isReadable = device.state === "ok";
    show(this.state, !isReadable);
    show(this.badges, isReadable);
    show(this.sentence, isReadable);
    show(this.drivers.bar, Boolean(drivers));
    write(this.verdict, verdict ? words(verdict.verdict) : "no verdict");
    write(this.since, verdict ? `for ${duration((nowMs - verdict.since_ms) / 1000)}` : "");
    write(this.confidence, verdict ? `confidence ${percent(verdict.confidence)}` : "");
    write(this.flags, verdict?.flags.length ? verdict.flags.map(words).join(", ") : "");
    // The sentence begins with the verdict, which stands above it, or with another one's name.
    const sentence = verdict?.sentence.replace(`${verdict.verdict}: `, "").replace(/^\w+/, words);
    write(this.sentence, sentence ? upper(sentence) : "");
    this.drivers.set(drivers?.watts, drivers ? Object.values(drivers.watts).reduce((a, b) => a + b, 0) : 1, watts);
    this.facts.set("power_max", device.max_watts == null ? null : watts(device.max_watts));
    this.facts.set("drivers_confidence", drivers ? percent(drivers.confidence) : null);
    this.facts.set("temperature", device.temperature_celsius == null ? null : `${device.temperature_celsius} °C`);
    this.facts.set("idle_level", pairs(device.idle_watts, watts));
    this.facts.set("idle", pairs(device.idle_joules, joules));
    this.facts.set("waste", pairs(device.wasted_joules, joules));
    this.facts.set("source", device.energy_source);
    this.facts.set("age", device.age_seconds == null ? null : duration(device.age_seconds));
    this.evidence.set(verdict?.evidence);
    show(this.empty, !isReadable);
  }

  /** Puts the marks of the chart's scale beside its lines. */
  scale({ top, levels }, limitWatts) {
    const place = (element, value, text = watts(value)) => {
      write(element, text);
      const y = `${(100 * (1 - value / top)).toFixed(1)}%`;
      if (element.style.top !== y) element.style.top = y;
    };
    this.marks.forEach((element, i) => {
      show(element, i < levels.length);
      if (i < levels.length) place(element, levels[i]);
    });
    show(this.limitMark, Boolean(limitWatts));
    if (limitWatts) place(this.limitMark, limitWatts, `limit ${watts(limitWatts)}`);
  }

  describe(summary) {
    const found = summary && `${watts(summary.least)} to ${watts(summary.most)}, mean ${watts(summary.mean)}`;
    mark(this.canvas, "aria-label", `Power of ${this.name} over the last minute: ${found ?? "no data"}`);
  }
}

function troubles(device) {
  const known = {
    lost: "Lost",
    stale: `Stale: the newest sample is ${duration(device.age_seconds)} old`,
    stalled: "No new data: a driver call hangs",
    starting: "Starting: no sample yet",
    ok: "",
  };
  // The sampler's sentence may say it already.
  if (device.problem.toLowerCase().startsWith(device.state)) return upper(device.problem);
  return device.problem ? `${known[device.state]}: ${device.problem}` : `${known[device.state]}.`;
}

const upper = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function pairs(values, format) {
  const there = Object.entries(values ?? {}).filter(([, value]) => value > 0);
  return there.length ? there.map(([name, value]) => `${words(name)} ${format(value)}`).join(", ") : null;
}

/** One engine's card. */
export class EngineCard {
  constructor(engine) {
    const id = `engine-${encodeURIComponent(engine.engine_id)}`;
    this.models = node("small");
    this.inFlight = node("p", { class: "power value", "data-figure": "in_flight" });
    this.cause = node("span", { class: "verdict value", "data-figure": "cause" });
    this.confidence = node("span", { class: "quiet value", "data-figure": "cause_confidence" });
    this.advice = node("p", { class: "sentence", "data-figure": "advice" });
    this.parts = new Share(PARTS, "joules_per_unit", "Joules per unit by part");
    this.facts = new Facts([
      ["joules_per_unit", "joules per unit"],
      ["reachable", "reachable"],
      ["saved", "saving"],
      ["batch", "batch"],
      ["half_fixed_batch", "B*"],
      ["queue", "running, waiting"],
      ["coverage", "coverage"],
      ["reference", "measured elsewhere"],
      ["gpus", "GPUs"],
    ]);
    this.evidence = new Evidence("Evidence");
    this.element = node(
      "article",
      { class: "card", "aria-labelledby": id },
      node("header", {}, node("h3", { id }, `${engine.engine_id} `, this.models), this.inFlight),
      node("p", { class: "badges" }, this.cause, this.confidence),
      this.advice,
      this.parts.bar,
      this.parts.list,
      this.facts.element,
      this.evidence.element,
    );
  }

  set(engine) {
    const found = engine.diagnosis;
    const unit = words(found?.unit ?? "token");
    write(this.models, engine.models.join(", "));
    write(this.inFlight, `${engine.in_flight} in flight`);
    write(this.cause, found ? words(found.cause) : "not looked at yet");
    write(this.confidence, found && found.cause !== "unknown" ? `confidence ${percent(found.confidence)}` : "");
    write(this.advice, found?.advice ?? "");
    const per = (value) => `${joules(value)}/${unit}`;
    const parts = Object.fromEntries(Object.entries(found?.decomposition ?? {}).filter(([, part]) => part > 0));
    this.parts.set(parts, found?.joules_per_unit, joules);
    show(this.parts.bar, Object.keys(parts).length > 0);
    this.facts.set("joules_per_unit", found?.joules_per_unit == null ? null : per(found.joules_per_unit));
    this.facts.set("reachable", found?.reachable_joules_per_unit == null ? null : per(found.reachable_joules_per_unit));
    this.facts.set("saved", found?.saved_watts ? watts(found.saved_watts) : null);
    this.facts.set("batch", found?.batch == null ? null : count(found.batch));
    this.facts.set("half_fixed_batch", found?.half_fixed_batch == null ? null : count(found.half_fixed_batch));
    this.facts.set("queue", engine.running == null ? null : `${count(engine.running)}, ${count(engine.waiting)}`);
    this.facts.set("coverage", engine.coverage == null ? null : percent(engine.coverage));
    const other = found?.reference;
    this.facts.set("reference", other ? `${per(other.joules_per_token)} on ${other.gpu_model}` : null);
    this.facts.set("gpus", engine.gpus.length ? engine.gpus.join(", ") : null);
    this.evidence.set(found?.evidence);
  }
}

/** The row of figures of the whole node. */
export class NodeFigures {
  constructor(list) {
    this.values = new Map();
    for (const [key, label, noteKey] of [
      ["node_power", "Power now", "node_limit"],
      ["node_requests", "Requests in flight", "node_ended"],
      ["attributed", "Used by requests", "share"],
      ["pending", "Pending"],
      ["idle_bare", "Idle, bare", "share"],
      ["idle_parked", "Idle, parked", "share"],
      ["unattributed", "Unattributed", "share"],
      ["wasted", "Waste"],
      ["account_age", "Account age"],
    ]) {
      const value = node("span", { class: "value", "data-figure": key }, ABSENT);
      const note = node("small", { class: "value", "data-figure": noteKey });
      list.append(node("div", {}, node("dt", {}, label), node("dd", {}, value, note)));
      this.values.set(key, { value, note });
    }
  }

  set({ devices, engines, account }) {
    const readable = devices.filter((device) => device.watts != null);
    const sum = (numbers) => numbers.reduce((a, b) => a + (b ?? 0), 0);
    const put = (key, text, note) => {
      write(this.values.get(key).value, text);
      write(this.values.get(key).note, note);
    };
    const part = (value) => (account.device_joules ? `${percent(value / account.device_joules)} of all energy` : "");
    // Before the first settling nobody knows; that is not 0.
    const booked = (value) => joules(account.settled_ms == null ? null : value);
    put(
      "node_power",
      readable.length ? watts(sum(readable.map((device) => device.watts))) : ABSENT,
      readable.length ? `of ${watts(sum(readable.map((device) => device.limit_watts)))}, ${readable.length} GPU${readable.length === 1 ? "" : "s"}` : "",
    );
    put("node_requests", String(sum(engines.map((engine) => engine.in_flight))), `${account.requests} ended`);
    put("attributed", booked(account.attributed_joules), part(account.attributed_joules));
    put("pending", booked(account.pending_joules), "not booked yet");
    put("idle_bare", booked(account.idle_joules.bare), part(account.idle_joules.bare));
    put("idle_parked", booked(account.idle_joules.parked), part(account.idle_joules.parked));
    put("unattributed", booked(account.unattributed_joules), part(account.unattributed_joules));
    put("wasted", booked(sum(Object.values(account.wasted_joules))), pairs(account.wasted_joules, joules) ?? "since the start");
    put("account_age", account.age_seconds == null ? ABSENT : duration(account.age_seconds), "behind now");
  }
}

const REQUEST_FIGURES = {
  Energy: "request_joules",
  "Energy, note": "bounds",
  "Energy so far": "request_joules",
  "Energy so far, note": "bounds",
  "J per token": "joules_per_token",
  Took: "took",
  "Took, note": "ended_ago",
  "Running for": "took",
};

/** A table of requests whose rows are made once. */
export class RequestTable {
  constructor(caption, rows, isSettled) {
    this.isSettled = isSettled;
    this.body = node("tbody");
    const headings = isSettled ? ["Request", "Energy", "J per token", "Took"] : ["Request", "Energy so far", "Running for"];
    this.empty = node("p", { class: "quiet" }, "none");
    this.table = node(
      "table",
      { class: "cards" },
      node("caption", {}, caption),
      node(
        "thead",
        {},
        node("tr", {}, ...headings.map((text, i) => node("th", { scope: "col", class: i ? "number" : undefined }, text))),
      ),
      this.body,
    );
    this.rows = Array.from({ length: rows }, () => this.#row(headings));
    this.element = node("div", {}, this.table, this.empty);
  }

  #row(headings) {
    const id = node("span", { class: "value" });
    const who = node("small", { class: "value" });
    const phases = node("span", { class: "value", "data-figure": "phases" });
    const method = node("span", { class: "value", "data-figure": "method" });
    const cells = headings.slice(1).map((label) => {
      const value = node("span", { class: "value", "data-figure": REQUEST_FIGURES[label] });
      const note = node("small", { class: "value", "data-figure": REQUEST_FIGURES[`${label}, note`] });
      const cell = node("td", { class: "number", "data-label": label }, value, note);
      return { cell, value, note };
    });
    const row = node("tr", {}, node("td", { class: "whole" }, id, who, node("small", {}, phases, method)), ...cells.map(({ cell }) => cell));
    row.hidden = true;
    this.body.append(row);
    return { row, id, who, phases, method, cells };
  }

  set(requests, nowMs) {
    show(this.empty, requests.length === 0);
    this.rows.forEach(({ row, id, who, phases, method, cells }, place) => {
      const request = requests[place];
      show(row, request !== undefined);
      if (request === undefined) return;
      const { engine_id: engine, tenant, model, status } = request;
      const ended = status === "finished" || status === "running" ? "" : status;
      write(id, request.request_id);
      write(who, [model, tenant && `tenant ${tenant}`, engine, ended].filter(Boolean).join(" · "));
      write(phases, `prefill ${joules(request.prefill_joules)}, decode ${joules(request.decode_joules)}`);
      write(method, `, by ${words(request.method)}`);
      const [energy, ...others] = cells;
      write(energy.value, joules(request.energy_joules));
      write(energy.note, `${joules(request.low)} to ${joules(request.high)}`);
      const took = others[others.length - 1];
      write(took.value, duration(((this.isSettled ? request.end_ms : nowMs) - request.arrival_ms) / 1000));
      if (this.isSettled) {
        write(others[0].value, request.joules_per_output_token == null ? ABSENT : joules(request.joules_per_output_token));
        write(took.note, `${duration((nowMs - request.end_ms) / 1000)} ago`);
      }
    });
  }
}
