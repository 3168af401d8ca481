// The live monitor: joins the stream to what stands on the page.

import { Stream } from "./stream.js";
import { Playhead, Trace } from "./trace.js";
import { DeviceCard, DRIVER_ORDER, duration, EngineCard, NodeFigures, node, RequestTable, words, write } from "./view.js";

const ROWS = 10;
const ANNOUNCE_SECONDS = 10; // A screen reader is told of changes at most so often,
const MOST_ANNOUNCED = 3; // and of so many at a time.
const DESCRIBE_SECONDS = 15; // A chart's description changes at most so often.
const TOKEN = "jouletrace.token";

const at = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");

const traces = new Map(); // By uuid; a trace may come before its card.
const devices = new Map(); // By uuid: {card, trace, limit, verdict, state}
const engines = new Map(); // By id.
const playhead = new Playhead();
const figures = new NodeFigures(at("node"));
const running = new RequestTable("In flight, of the most joules", ROWS, false);
const settled = new RequestTable("Just settled", ROWS, true);
at("requests").append(running.element, settled.element);

let windowSeconds = 60;
let latest = null; // The newest `node`,
let latestAt = 0; // and when it came.
let requests = { in_flight: [], settled: [] };
let isPaused = false;
let wasCut = false;
let undrawn = []; // Devices whose strip is to be drawn anew, one a frame.
let described = -Infinity;
let colours = readColours();

// ---- what comes in

const stream = new Stream("v1/live", onEvent, onState);

function onEvent(name, data) {
  if (name === "hello") {
    windowSeconds = data.window_seconds;
    showEntitlement(data.requests_refused);
  } else if (name === "trace") {
    for (const [uuid, piece] of Object.entries(data)) traceOf(uuid).add(piece);
  } else if (name === "drivers") {
    for (const [uuid, piece] of Object.entries(data)) traceOf(uuid).addDrivers(piece, DRIVER_ORDER);
  } else if (name === "node") {
    onNode(data);
  } else if (name === "requests") {
    requests = data;
    if (!isPaused) showRequests();
  }
}

function traceOf(uuid) {
  if (!traces.has(uuid)) traces.set(uuid, new Trace(windowSeconds));
  return traces.get(uuid);
}

function onNode(data) {
  if (latest && data.now_ms < latest.now_ms) playhead.reset(); // Somebody has set the clock back.
  latest = data;
  latestAt = performance.now();
  for (const device of data.devices) {
    const known = devices.get(device.uuid) ?? addDevice(device);
    announceChange(known, device);
    known.limit = device.limit_watts;
  }
  const there = new Set(data.devices.map((device) => device.uuid));
  for (const [uuid, { card }] of devices) {
    if (there.has(uuid)) continue;
    card.element.remove();
    devices.delete(uuid);
    traces.delete(uuid);
  }
  playhead.note(
    data.now_ms,
    data.devices.filter((device) => device.state === "ok").map((device) => devices.get(device.uuid).trace.endMs),
  );
  if (!isPaused) showNode();
}

function addDevice(device) {
  const trace = traceOf(device.uuid);
  const card = new DeviceCard(device, trace.canvas);
  const known = { card, trace, limit: device.limit_watts, verdict: null, state: null };
  devices.set(device.uuid, known);
  at("gpus").append(card.element);
  return known;
}

// ---- what is shown

function showNode() {
  const data = latest;
  if (!data) return;
  if (at("live").hidden) {
    at("static").remove();
    at("live").hidden = false;
  }
  showProblems(data.problems);
  figures.set(data);
  at("no-gpus").hidden = data.devices.length > 0;
  for (const device of data.devices) devices.get(device.uuid).card.set(device, data.now_ms);
  showEngines(data.engines);
  undrawn = [...devices.values()];
  if (still.matches) drawAll();
  if (performance.now() - described > DESCRIBE_SECONDS * 1000) {
    described = performance.now();
    for (const { card, trace } of devices.values()) card.describe(trace.summary());
  }
  const power = `${Math.round(data.devices.reduce((sum, device) => sum + (device.watts ?? 0), 0))} W`;
  document.title = `${data.problems.length ? "Not ready" : power} · jouletrace`;
}

function showProblems(problems) {
  const list = at("problems").querySelector("ul");
  if (list.dataset.shown !== problems.join("\n")) {
    list.dataset.shown = problems.join("\n");
    list.replaceChildren(...problems.map((text) => node("li", {}, text)));
  }
  at("problems").hidden = problems.length === 0;
}

function showEngines(list) {
  for (const engine of list) {
    if (!engines.has(engine.engine_id)) {
      const card = new EngineCard(engine);
      engines.set(engine.engine_id, card);
      at("engines").append(card.element);
    }
    engines.get(engine.engine_id).set(engine);
  }
  const there = new Set(list.map((engine) => engine.engine_id));
  for (const [id, card] of engines) {
    if (there.has(id)) continue;
    card.element.remove();
    engines.delete(id);
  }
  at("no-engines").hidden = list.length > 0;
}

function showRequests() {
  const nowMs = latest?.now_ms ?? Date.now();
  running.set(requests.in_flight, nowMs);
  settled.set(requests.settled, nowMs);
}

function showEntitlement(refused) {
  at("entitle").hidden = refused === null;
  at("requests").hidden = refused !== null;
  if (refused !== null) write(at("refused"), `Requests are not shown here. ${refused}`);
  else showRequests();
}

// ---- drawing

function readColours() {
  const probe = node("span");
  document.body.append(probe);
  const resolved = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const found = {
    trace: resolved("trace"),
    line: resolved("line"),
    limit: resolved("bad"),
    drivers: DRIVER_ORDER.map((_, place) => resolved(`driver${place}`)),
  };
  probe.remove();
  return found;
}

function draw(known, headMs) {
  known.trace.draw(headMs, known.limit, colours);
  known.card.scale(known.trace, known.limit);
}

function drawAll() {
  const headMs = playhead.at(performance.now());
  for (const known of devices.values()) draw(known, headMs);
  undrawn = [];
}

function frame(now) {
  requestAnimationFrame(frame);
  if (isPaused || still.matches || !latest) return;
  const headMs = playhead.at(now);
  const next = undrawn.pop();
  if (next) draw(next, headMs);
  for (const known of devices.values()) if (known !== next) known.trace.move(headMs);
}

// ---- the connection, in words

function onState({ state, seconds, reason }) {
  const age = latest ? ` What is shown is ${duration((performance.now() - latestAt) / 1000)} old.` : "";
  const texts = {
    connecting: `Connecting.${age}`,
    live: "Live",
    waiting: `${reason}.${age} Trying again in ${seconds} s`,
    stale: `No data for ${seconds} s`,
    hidden: "Paused while hidden",
  };
  const before = at("connection").dataset.state;
  at("connection").dataset.state = state;
  write(at("connection"), texts[state]);
  at("retry").hidden = state !== "waiting";
  document.body.toggleAttribute("data-stale", state !== "live" && latest !== null);
  if (state !== "live" && latest) document.title = "Not live · jouletrace";
  if (state === "waiting" && before !== "waiting") announce(`${reason}. What is shown is old.`);
  if (state === "live") {
    if (wasCut) announce("Connected again.");
    wasCut = false;
    playhead.reset();
  }
  wasCut ||= state === "waiting";
}

// ---- for screen readers

let untold = [];
let told = -Infinity;

function announce(text) {
  untold.push(text);
}

function announceChange(known, device) {
  const verdict = device.verdict?.verdict ?? null;
  if (known.state !== null && device.state !== known.state) announce(`GPU ${device.gpu}: ${device.state}.`);
  else if (known.verdict && verdict && verdict !== known.verdict) announce(`GPU ${device.gpu}: ${words(verdict)}.`);
  known.state = device.state;
  known.verdict = verdict ?? known.verdict;
}

setInterval(() => {
  if (!untold.length || performance.now() - told < ANNOUNCE_SECONDS * 1000) return;
  const rest = untold.length - MOST_ANNOUNCED;
  write(at("announcements"), untold.slice(-MOST_ANNOUNCED).join(" ") + (rest > 0 ? ` And ${rest} earlier changes.` : ""));
  untold = [];
  told = performance.now();
}, 1000);

// ---- what people do

at("controls").hidden = false;
at("retry").addEventListener("click", () => stream.connect());
at("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  at("pause").setAttribute("aria-pressed", String(isPaused));
  if (isPaused) return;
  showNode();
  showRequests();
});
at("entitle").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, at("token").value);
  stream.connect(at("token").value);
});
dark.addEventListener("change", () => {
  colours = readColours();
  drawAll();
});
addEventListener("resize", drawAll);

stream.connect(sessionStorage.getItem(TOKEN) ?? "");
requestAnimationFrame(frame);
