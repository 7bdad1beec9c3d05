// The script of the page: asks for overview.json, and shows the numbers.
//
// Each text from the server is set by textContent, never as HTML.
"use strict";

const PERIOD = 2000; // milliseconds between two requests while the page is visible
const LONGEST = 60000; // the longest pause after requests that failed
const LIMIT = 10000; // a request that takes longer is given up
const MINUTES = 60;

const byId = (id) => document.getElementById(id);
const TOKEN = document.querySelector("meta[name=token]").content;

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Numbers and times as text.

const grouped = new Intl.NumberFormat("en");
const number = (value) => grouped.format(value);
const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
const moment = (time) => new Date(time * 1000).toLocaleString();

function length(seconds) {
  if (seconds < 0.0005) return seconds > 0 ? "<1 ms" : "0";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  for (const [unit, larger, smaller, name] of [[60, "min", "s", 3600], [3600, "h", "min", 86400], [86400, "d", "h", Infinity]]) {
    if (whole < name) {
      const rest = Math.floor((whole % unit) / { s: 1, min: 60, h: 3600 }[smaller]);
      return rest ? `${Math.floor(whole / unit)} ${larger} ${rest} ${smaller}` : `${Math.floor(whole / unit)} ${larger}`;
    }
  }
}

// How long ago by the server's clock: that of the browser may differ.
const since = (time, taken) => (time === null ? "–" : length(Math.max(0, taken - time)));
const ago = (time, taken) => {
  const text = since(time, taken).split(" ").slice(0, 2).join(" ");
  return { "–": "–", "0": "now" }[text] ?? `${text} ago`;
};

// Children of an element, each with a key: an element whose key stays is kept, with the focus
// and with what is unfolded.

const shown = new WeakMap(); // the elements of a parent by their keys

function reconcile(parent, rows, keyOf, create, update) {
  const old = shown.get(parent) ?? new Map();
  const fresh = new Map();
  for (const row of rows) {
    let key = keyOf(row);
    while (fresh.has(key)) key += "'";
    fresh.set(key, old.get(key) ?? create(row));
    update(fresh.get(key), row);
  }
  for (const [key, element] of old) if (!fresh.has(key)) element.remove();
  let place = parent.firstElementChild;
  for (const element of fresh.values()) {
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
  }
  shown.set(parent, fresh);
}

function setCount(section, { total, rows }, what, order = "first") {
  const all = total === null ? `${rows.length} or more` : number(total);
  const isPart = rows.length && total !== rows.length;
  setText(section.querySelector(".count"), what ?? (isPart ? `${all}, the ${order} ${rows.length} are shown` : all));
}

function setEmpty(section, isEmpty, text) {
  section.empty ??= section.appendChild(make("p", { className: "nothing", textContent: text }));
  section.empty.hidden = !isEmpty;
}

// A column: [title, text of a row, class, title of the cell, class by the row, is optional]. An
// optional column is hidden while all its cells are empty.
class Table {
  constructor(section, columns, keyOf, nothing) {
    this.section = section;
    this.columns = columns;
    this.keyOf = keyOf;
    this.nothing = nothing;
    const titles = columns.map(([title, , className]) => make("th", { scope: "col", className: className === "number" ? "number" : "", textContent: title }));
    this.titles = titles;
    this.body = make("tbody");
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...titles)), this.body);
    this.frame = section.appendChild(make("div", { className: "scroll" }, table));
  }

  show(part, taken, count) {
    setCount(this.section, part, count);
    this.frame.hidden = part.rows.length === 0;
    setEmpty(this.section, part.rows.length === 0, this.nothing);
    const create = () => make("tr", {}, ...this.columns.map(([title]) => make("td", { "data-label": title })));
    const isGone = this.columns.map(([, text, , , , isOptional]) => isOptional && part.rows.every((row) => text(row, taken) === "–"));
    this.titles.forEach((title, index) => (title.hidden = isGone[index]));
    reconcile(this.body, part.rows, this.keyOf, create, (line, row) => {
      this.columns.forEach(([, text, className, title, extra], index) => {
        const cell = line.children[index];
        cell.hidden = isGone[index];
        const content = text(row, taken);
        setText(cell, content);
        const classes = [className, extra?.(row), content === "–" ? "empty" : ""].filter(Boolean).join(" ");
        if (cell.className !== classes) cell.className = classes;
        const hint = title ? title(row) : "";
        if (cell.title !== hint) cell.title = hint;
      });
    });
  }
}

// Items that unfold: details are asked for when the item is opened, and again when it changes.

class List {
  constructor(section, { keyOf, facts, unfolds, load, buttons, nothing }) {
    Object.assign(this, { section, keyOf, facts, unfolds, load, buttons, nothing });
    this.box = section.appendChild(make("div"));
  }

  show(part, taken, shows) {
    setCount(this.section, part, null, "newest");
    setEmpty(this.section, part.total === 0, this.nothing); // a process that records nothing has no rows
    const unfolds = this.unfolds(shows);
    const create = () => this.create(unfolds);
    reconcile(this.box, part.rows, this.keyOf, create, (item, row) => this.update(item, row, taken));
  }

  create(unfolds) {
    const facts = make("span", { className: "facts" });
    const item = make("div", { className: "item" });
    item.facts = facts;
    if (unfolds) {
      const pre = make("pre", { tabIndex: 0, textContent: "Loading" });
      const details = make("details", {}, make("summary", {}, facts), pre);
      details.addEventListener("toggle", () => {
        if (details.open) this.fill(item);
      });
      Object.assign(item, { details, pre });
      item.append(details);
    } else {
      item.append(make("div", { className: "plain" }, facts));
    }
    item.buttons = item.appendChild(make("div", { className: "buttons" }));
    return item;
  }

  async fill(item) {
    try {
      setText(item.pre, this.load.text(await askPatiently(this.load.url(item.row)), item.row));
    } catch (error) {
      setText(item.pre, error.message);
    }
  }

  update(item, row, taken) {
    const before = item.row ?? row;
    item.row = row;
    if (item.details?.open && (before.state !== row.state || before.attempt !== row.attempt)) this.fill(item);
    const facts = this.facts(row, taken);
    while (item.facts.children.length > facts.length) item.facts.lastElementChild.remove();
    facts.forEach(([text, className, title], index) => {
      const fact = item.facts.children[index] ?? item.facts.appendChild(make("span"));
      setText(fact, text);
      if (fact.className !== className) fact.className = className;
      if (fact.title !== (title ?? "")) fact.title = title ?? "";
    });
    this.buttons?.(item, row);
    item.buttons.hidden = !(this.buttons && mayAct);
  }
}

// Requests.

class Failed extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}, control = new AbortController()) {
  const limit = setTimeout(() => control.abort(), LIMIT);
  try {
    const response = await fetch(path, { cache: "no-store", redirect: "error", signal: control.signal, ...options });
    const isJson = (response.headers.get("Content-Type") ?? "").startsWith("application/json");
    const data = isJson ? await response.json() : null;
    if (!response.ok) throw new Failed(data?.error ?? `The server answers ${response.status}.`, response.status);
    if (!isJson) throw new Failed("The server answers no JSON: log in again, and reload the page.", 0);
    return data;
  } catch (error) {
    throw error instanceof Failed ? error : new Failed("The server does not answer.", 0);
  } finally {
    clearTimeout(limit);
  }
}

// A task that has just ended is not written yet: ask again.
async function askPatiently(path, options) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await ask(path, options);
    } catch (error) {
      if (error.status !== 503 || attempt === 4) throw error;
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }
}

// The parts of the page.

const short = "short";
const name = ["Task", (row) => row.name, "name"];
const request = ["Request", (row) => row.request ?? "–", "name"];
const times = (title, field) => [
  [`${title} p50`, (row) => (row[field].count ? length(row[field].p50) : "–"), "number"],
  [`${title} p95`, (row) => (row[field].count ? length(row[field].p95) : "–"), "number"],
  [`${title} max`, (row) => (row[field].count ? length(row[field].max) : "–"), "number"],
];
const amount = (title, field, isBad, isOptional) => [title, (row) => (row[field] ? number(row[field]) : "–"), "number", null, (row) => (isBad && row[field] ? "bad" : ""), isOptional];

const running = new Table(byId("running"), [
  name,
  request,
  ["For", (row, taken) => since(row.since, taken), "number", (row) => (row.since === null ? "" : `since ${moment(row.since)}`)],
  ["Attempt", (row) => number(row.attempt), "number"],
  ["Process", (row) => String(row.pid), "number"],
  ["Thread", (row) => row.thread ?? "–", "thread"],
  ["Id", (row) => row.id ?? "–", "name id"],
], (row) => `${row.pid} ${row.id ?? row.name} ${row.attempt} ${row.since}`, "No task runs.");

const waiting = new Table(byId("waiting"), [
  name,
  ["Number", (row) => number(row.count), "number"],
], (row) => row.name, "No task waits.");

const lost = new Table(byId("lost"), [
  name,
  request,
  ["Began", (row, taken) => ago(row.since, taken), "number", (row) => (row.since === null ? "" : moment(row.since))],
  ["Process", (row) => String(row.pid), "number"],
  ["Id", (row) => row.id ?? "–", "name id"],
], (row) => `${row.pid} ${row.id} ${row.name} ${row.since}`, "No task was lost.");

const names = new Table(byId("names"), [
  ["Function", (row) => row.name, "name"],
  amount("Running", "running"),
  amount("Waiting", "waiting"),
  amount("Succeeded", "succeeded"),
  amount("Failed", "failed", true),
  amount("Retried", "retried", false, true),
  amount("Discarded", "discarded", false, true),
  amount("Sent", "sent", false, true),
  amount("Put aside", "aside", true, true),
  amount("Lost", "lost", true, true),
  ...times("Wait", "wait"),
  ...times("Run", "run"),
], (row) => row.name, "No function has this name.");

const processes = new Table(byId("processes"), [
  ["Command", (row) => row.command, "name"],
  ["Process", (row) => String(row.pid), "number"],
  ["State", (row) => (row.is_alive ? "lives" : "was killed"), short, null, (row) => (row.is_alive ? "good" : "bad")],
  ["For", (row, taken) => since(row.started, taken), "number", (row) => `since ${moment(row.started)}`],
  ["Threads busy", (row) => `${number(row.threads_busy)} of ${number(row.threads)}`, "number"],
  ["Batches", (row) => (row.max_pending === null ? number(row.pending) : `${number(row.pending)} of ${number(row.max_pending)}`), "number"],
  ["Ran on server", (row) => number(row.run_here), "number", () => "tasks that ran on the server's thread, since the pool had no room"],
  ["To send", (row) => number(row.outbox), "number"],
  ["Loop late by", (row) => (row.loop_lag === null ? "–" : length(row.loop_lag)), "number"],
  ["Seen", (row, taken) => ago(row.updated, taken), "number"],
], (row) => `${row.pid} ${row.started}`, "No process is known.");

const attempt = (row) => (row.attempt > 1 ? `attempt ${row.attempt}` : "");
const fact = (text, className, title) => [text, className, title];

const failures = new List(byId("failures"), {
  keyOf: (row) => row.key,
  facts: (row, taken) => [
    fact(row.name, "name"),
    fact(row.error, "bad"),
    fact(row.request ?? "", "name dim"),
    fact(attempt(row), "dim"),
    fact(`process ${row.pid}`, "dim"),
    fact(ago(row.ended, taken), "dim", moment(row.ended)),
  ],
  unfolds: (shows) => shows.errors,
  load: {
    url: (row) => `error.json?key=${encodeURIComponent(row.key)}`,
    text: (found, row) => {
      const message = [row.error, found.message].filter(Boolean).join(": ");
      return [row.id ? `Task ${row.id}` : "", message, found.traceback].filter(Boolean).join("\n\n");
    },
  },
  nothing: "No task has failed.",
});

const due = (row, taken) => (row.due !== null && row.due > taken ? `due in ${length(row.due - taken)}` : "");
const ORDERS = { retry: ["failed", "aside"], discard: ["failed", "aside", "waiting", "retrying"] };
const LABELS = { retry: "Retry", discard: "Discard" };
const STATES = { failed: "bad", aside: "bad", lost: "bad", succeeded: "good", done: "good", retrying: "warn" };
const STATE_NAMES = { aside: "put aside" };
let mayAct = false;

const durable = new List(byId("durable"), {
  keyOf: (row) => row.id,
  facts: (row, taken) => [
    fact(row.name, "name"),
    fact(STATE_NAMES[row.state] ?? row.state, `state ${STATES[row.state] ?? "dim"}`),
    fact(row.error, "bad"),
    fact([attempt(row), due(row, taken)].filter(Boolean).join(", "), "dim", row.due === null ? "" : moment(row.due)),
    fact(ago(row.since, taken), "dim", `added at ${moment(row.since)}`),
    fact(row.id, "name dim"),
  ],
  unfolds: (shows) => shows.errors || shows.arguments,
  load: {
    url: (row) => `task.json?id=${encodeURIComponent(row.id)}`,
    text: (found) => {
      const parts = [];
      if (found.arguments === null) parts.push("The arguments are not kept.");
      else if (found.arguments) parts.push(found.arguments.length ? `Arguments:\n  ${found.arguments.join("\n  ")}` : "No arguments.");
      if (found.traceback) parts.push(found.traceback);
      return parts.join("\n\n") || "There is nothing more to show.";
    },
  },
  buttons: showButtons,
  nothing: "",
});

function showButtons(item, row) {
  if (item.state === row.state) return;
  item.state = row.state;
  const orders = mayAct ? Object.keys(ORDERS).filter((order) => ORDERS[order].includes(row.state)) : [];
  item.buttons.replaceChildren(...orders.map((order) => {
    const button = make("button", { type: "button", textContent: LABELS[order], "aria-label": `${LABELS[order]} ${row.name} ${row.id}` });
    button.addEventListener("click", () => act(item, row, order));
    return button;
  }));
}

async function act(item, row, order) {
  if (order === "discard" && !window.confirm(`Discard ${row.name}? The task will not run.`)) return;
  const said = make("span", { className: "dim", textContent: order === "retry" ? "Retry ordered" : "Discard ordered" });
  said.setAttribute("role", "status");
  const buttons = [...item.buttons.children];
  for (const button of buttons) button.disabled = true;
  try {
    await askPatiently(`${order}?id=${encodeURIComponent(row.id)}`, { method: "POST", headers: { "X-WSGI-BG-Token": TOKEN } });
    item.buttons.replaceChildren(said); // until the state of the task changes, or for some seconds
    setTimeout(() => {
      if (said.isConnected) item.state = ""; // the task may have failed again between two answers
    }, 2 * PERIOD);
  } catch (error) {
    said.className = "bad";
    said.textContent = error.message;
    for (const button of buttons) button.disabled = false;
    item.buttons.replaceChildren(...buttons, said);
  }
}

// Totals.

function showTotals({ counts, processes: { rows } }) {
  const alive = rows.filter((row) => row.is_alive);
  const sum = (field) => alive.reduce((total, row) => total + row[field], 0);
  const limits = alive.map((row) => row.max_pending);
  const most = limits.includes(null) ? 0 : limits.reduce((total, limit) => total + limit, 0);
  const tiles = [
    ["Running", counts.running],
    ["Waiting", counts.waiting],
    ["Succeeded", counts.succeeded],
    ["Failed", counts.failed, true],
    ...[["Retried", "retried"], ["Discarded", "discarded"], ["Sent", "sent"]].map(([title, field]) => [title, counts[field]]).filter(([, value]) => value),
    ...[["Put aside", "aside"], ["Lost", "lost"]].map(([title, field]) => [title, counts[field], true]).filter(([, value]) => value),
  ].map(([title, value, isBad]) => ({ title, value: number(value), isAlarm: Boolean(isBad && value) }));
  const load = [["Busy threads", sum("threads_busy"), sum("threads")], ["Batches pending", sum("pending"), most]];
  showTiles(byId("totals"), tiles);
  showTiles(byId("load"), load.map(([title, value, limit]) => ({ title, value: number(value), amount: value, limit })));
}

function showTiles(list, tiles) {
  const create = ({ limit }) => {
    const tile = make("div", {}, make("dt"), make("dd", {}, make("span"), make("small")));
    if (limit !== undefined) tile.append(make("meter", { min: 0 }));
    return tile;
  };
  reconcile(list, tiles, (tile) => tile.title, create, (element, { title, value, amount, limit, isAlarm }) => {
    const [dt, dd, meter] = element.children;
    setText(dt, title);
    setText(dd.children[0], value);
    setText(dd.children[1], limit ? ` of ${number(limit)}` : "");
    element.classList.toggle("alarm", Boolean(isAlarm));
    if (meter) {
      meter.hidden = !limit;
      meter.max = limit || 1;
      meter.high = meter.max * 0.8;
      meter.value = amount;
      meter.setAttribute("aria-label", title);
    }
  });
}

// Charts: lines and bars without text, stretched over the width; texts are HTML.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 600, HEIGHT = 100;

function draw(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  return element;
}

class Chart {
  constructor(title, series, { isStacked, format, read }) {
    Object.assign(this, { title, series, isStacked, format, read });
    this.svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", tabindex: "0" });
    this.most = make("span", { className: "most" });
    this.first = make("span");
    this.readout = make("span", { className: "read" });
    this.last = make("span");
    const keys = series.map(([, label, className]) => make("span", { className: `key ${className}`, textContent: label }));
    byId("charts").append(make("figure", {},
      make("figcaption", {}, make("b", { textContent: title }), ...keys),
      make("div", { className: "plot" }, this.svg, this.most),
      make("div", { className: "axis" }, this.first, this.readout, this.last)));
    this.minutes = [];
    this.chosen = null;
    this.svg.addEventListener("pointermove", (event) => {
      const box = this.svg.getBoundingClientRect();
      this.choose(Math.floor(((event.clientX - box.left) / box.width) * MINUTES));
    });
    this.svg.addEventListener("pointerleave", () => this.choose(null));
    this.svg.addEventListener("blur", () => this.choose(null));
    this.svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.choose(Math.min(MINUTES - 1, Math.max(0, (this.chosen ?? MINUTES) + step)));
    });
  }

  choose(slot) {
    this.chosen = slot;
    this.render();
  }

  show(minutes) {
    this.minutes = minutes;
    this.render();
  }

  // The newest minute is at the right, however many there are.
  slotOf(index) {
    return MINUTES - this.minutes.length + index;
  }

  render() {
    const { minutes, series } = this;
    const values = series.map(([value]) => minutes.map(value));
    const tops = minutes.map((_, index) => {
      const each = values.map((line) => line[index]);
      return this.isStacked ? each.reduce((total, value) => total + value, 0) : Math.max(...each);
    });
    const top = Math.max(0, ...tops);
    const scale = top ? (HEIGHT - 14) / top : 0; // the text with the maximum is above
    const step = WIDTH / MINUTES;
    const parts = [draw("line", { class: "grid", x1: 0, x2: WIDTH, y1: 14, y2: 14 }), draw("line", { class: "grid", x1: 0, x2: WIDTH, y1: (HEIGHT + 14) / 2, y2: (HEIGHT + 14) / 2 })];
    if (this.isStacked) {
      minutes.forEach((_, index) => {
        let y = HEIGHT;
        series.forEach(([, , className], line) => {
          const height = values[line][index] * scale;
          y -= height;
          if (height) parts.push(draw("rect", { class: `bar ${className}`, x: this.slotOf(index) * step + 1, y, width: step - 2, height }));
        });
      });
    } else {
      series.forEach(([, , className], line) => {
        let path = "", isOn = false;
        minutes.forEach((minute, index) => {
          const value = values[line][index];
          if (!minute[this.read.field].count) {
            isOn = false; // no task has ended: there is no time
            return;
          }
          const x = (this.slotOf(index) + 0.5) * step, y = HEIGHT - value * scale;
          // A line fills the slots of its first and last minute, so that a minute alone is seen.
          path += isOn ? `L${x} ${y}` : `M${x - step / 2} ${y}H${x}`;
          if (!minutes[index + 1]?.[this.read.field].count) path += `h${step / 2}`;
          isOn = true;
        });
        if (path) parts.push(draw("path", { class: `line ${className}`, d: path }));
      });
    }
    const chosen = this.chosen === null ? null : minutes[this.chosen - this.slotOf(0)];
    if (chosen) {
      const x = (this.chosen + 0.5) * step;
      parts.push(draw("line", { class: "cursor", x1: x, x2: x, y1: 0, y2: HEIGHT }));
    }
    this.svg.replaceChildren(...parts);
    setText(this.most, top ? this.format(top) : "");
    const newest = minutes.at(-1);
    setText(this.first, newest ? clock(newest.time - 60 * (MINUTES - 1)) : "");
    setText(this.last, newest ? clock(newest.time) : "");
    setText(this.readout, chosen ? `${clock(chosen.time)}: ${this.read.text(chosen)}` : "");
    const label = newest ? `${this.title}, the last hour. At most ${this.format(top)}. Last minute: ${this.read.text(newest)}.` : this.title;
    if (this.svg.getAttribute("aria-label") !== label) this.svg.setAttribute("aria-label", label);
  }
}

const others = (minute) => minute.discarded + minute.sent;
const lengths = (title, field) => new Chart(title, [
  [(minute) => minute[field].p50, "p50", "p50"],
  [(minute) => minute[field].p95, "p95", "p95"],
], {
  isStacked: false,
  format: length,
  read: { field, text: (minute) => (minute[field].count ? `p50 ${length(minute[field].p50)}, p95 ${length(minute[field].p95)}` : "no task") },
});

const charts = [
  new Chart("Tasks a minute", [
    [(minute) => minute.succeeded, "succeeded", "succeeded"],
    [others, "other", "other"],
    [(minute) => minute.failed, "failed", "failed"],
  ], {
    isStacked: true,
    format: number,
    read: {
      text: (minute) =>
        [[minute.succeeded, "succeeded"], [minute.failed, "failed"], [minute.sent, "sent"], [minute.discarded, "discarded"]]
          .filter(([count], index) => count || index < 2)
          .map(([count, what]) => `${number(count)} ${what}`)
          .join(", "),
    },
  }),
  lengths("Wait before the call", "wait"),
  lengths("Run of the call", "run"),
];

// The whole page.

function show(data) {
  mayAct = data.actions;
  showTotals(data);
  byId("recording").hidden = data.minutes.length > 0;
  byId("charts").hidden = data.minutes.length === 0;
  for (const chart of charts) chart.show(data.minutes);
  running.show(data.running, data.taken);
  const { total: kinds, rows: first } = data.waiting;
  const tasks = number(data.counts.waiting);
  waiting.show(data.waiting, data.taken, first.length < kinds ? `${tasks} of ${number(kinds)} functions, the first ${first.length} are shown` : tasks);
  failures.show(data.failures, data.taken, data.shows);
  byId("lost").hidden = data.lost.total === 0;
  lost.show(data.lost, data.taken);
  byId("durable").hidden = data.durable.total === 0;
  durable.show(data.durable, data.taken, data.shows);
  const { all, total, rows } = data.names;
  const part = total < all ? `${number(total)} of ${number(all)} match` : number(all);
  names.show(data.names, data.taken, rows.length < total ? `${part}, ${rows.length} are shown` : part);
  processes.show(data.processes, data.taken);
  setText(byId("updated"), `· ${new Date(data.taken * 1000).toLocaleTimeString()}`);
}

function say(state, className) {
  setText(byId("state"), state);
  document.body.className = className;
}

let timer = 0;
let current = null; // the request that has not ended
let failed = 0; // requests in a row
let isPaused = false;

// Asks once though the page is paused if the user wants other rows.
async function poll(isWanted = false) {
  clearTimeout(timer);
  current?.abort();
  current = null;
  if (document.hidden || (isPaused && !isWanted)) return;
  const mine = (current = new AbortController());
  const form = new FormData(byId("filter"));
  let pause = PERIOD;
  try {
    const data = await ask(`overview.json?${new URLSearchParams(form)}`, {}, mine);
    if (mine !== current) return; // a newer request has taken its place
    failed = 0;
    show(data);
    byId("notice").hidden = true;
    say(...(isPaused ? ["Paused", ""] : ["Live", "live"]));
  } catch (error) {
    if (mine !== current) return;
    failed += 1;
    pause = Math.min(LONGEST, PERIOD * 2 ** failed);
    const isRefused = error.status === 401 || error.status === 403;
    const ours = error instanceof Failed ? error.message : `The script of the page has failed: ${error.message}.`;
    const reason = isRefused ? "Access was refused: log in again, and reload the page." : ours;
    byId("notice").className = "notice error";
    const next = isPaused ? "" : ` The next request is in ${length(pause / 1000)}.`;
    setText(byId("notice"), `${reason} The numbers below are old.${next}`);
    byId("notice").hidden = false;
    say("No answer", "failing");
  }
  if (!isPaused) timer = setTimeout(poll, pause);
}

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  setText(byId("pause"), isPaused ? "Resume" : "Pause");
  if (isPaused) say("Paused", "");
  poll();
});

document.addEventListener("visibilitychange", () => poll());

let typing = 0;
byId("filter").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(poll, 250, true);
});
byId("filter").addEventListener("submit", (event) => {
  event.preventDefault();
  poll(true);
});

poll();
