// The page: polls the server while it is looked at, and shows what it says.

import { forgetKey, hasKey, request, useKey } from "/page/api.js";
import { HeatMap } from "/page/heatmap.js";
import { Interval, Reading } from "/page/metrics.js";
import { Playground } from "/page/playground.js";

// Seconds between polls (the server asks its engine once a second at most), and seconds of history shown.
const PERIOD = 1;
// Two answers that come closer together than this were held up on the way: a rate between them would mean nothing.
const SHORTEST = 0.5;
const HISTORY = 60;

const $ = (id) => document.getElementById(id);
const percent = (share, digits = 1) => (share === null ? "–" : `${(100 * share).toFixed(digits)} %`);
const time = (seconds) => (seconds === null ? "–" : seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(2)} s`);
const count = (value) => value.toLocaleString("en");

const heatMap = new HeatMap($("heatmap"), $("ramp"), HISTORY, inspect);
const playground = new Playground(askForKey);
let readings = [];
let model = null;

function setStatus(state, text) {
  const status = $("status");
  if (status.dataset.state === state && status.textContent === text) return;
  status.dataset.state = state;
  status.textContent = text;
}

/** One round: is it ready, which model, what do the counters say. */
async function poll() {
  try {
    await request("/readyz");
    model ??= (await (await request("/v1/models")).json()).data[0].id;
    setStatus("ready", "Ready");
  } catch (error) {
    if (error.status === 401) return askForKey();
    model = null;
    setStatus(error.status ? "loading" : "lost", error.status ? error.message : "No answer from the server");
  }
  $("model").textContent = model ?? "";
  playground.serve(model);
  try {
    const text = await (await request("/metrics")).text();
    take(new Reading(text, performance.now() / 1000));
  } catch (error) {
    if (error.status === 401) return askForKey();
    $("heat-empty").hidden = false;
    $("heat-empty").textContent = error.status === 404 ? "This server does not show its metrics (metrics_access)." : error.message;
  }
}

async function pollForever() {
  for (;;) {
    const began = performance.now();
    if (!document.hidden && !$("key-dialog").open) await poll();
    await new Promise((resolve) => setTimeout(resolve, Math.max(100, 1000 * PERIOD - (performance.now() - began))));
  }
}

function take(reading) {
  if (readings.length > 0 && !reading.follows(readings.at(-1))) readings = [];
  if (readings.length > 0 && reading.time - readings.at(-1).time < SHORTEST) return;
  readings.push(reading);
  while (readings.length > 2 && readings[1].time < reading.time - HISTORY) readings.shift();
  if (reading.kernel) $("kernel").textContent = [reading.kernel.name, reading.kernel.isa, reading.kernel.reason].filter(Boolean).join(" · ");
  if (readings.length > 1) show(readings);
}

function show(readings) {
  const intervals = readings.slice(1).map((reading, index) => new Interval(readings[index], reading));
  const now = readings.at(-1);
  const minute = new Interval(readings[0], now);
  const peak = Math.max(...intervals.map(({ tokensPerSecond }) => tokensPerSecond));
  $("tokens-rate").textContent = count(Math.round(intervals.at(-1).tokensPerSecond));
  $("tokens-rate-note").textContent = peak > 0 ? `peak ${count(Math.round(peak))}, last minute` : "generated, all clients";
  $("density").textContent = percent(minute.density);
  $("density-note").textContent = minute.density === null ? "per token, last minute" : `${percent(1 - minute.density)} skipped, per token`;
  $("path-share").textContent = percent(minute.sparseSteps, 0);
  $("path-share-note").textContent = minute.sparseSteps === null ? "of steps, last minute" : `of steps, ${percent(minute.sparseRows, 0)} of rows`;
  $("ttft").textContent = time(minute.ttft);
  $("ttft-note").textContent = minute.answers ? `mean of ${count(minute.answers)}, last minute` : "mean, last minute";
  $("itl").textContent = time(minute.itl);
  $("running").textContent = count(now.running);
  $("running-note").textContent = `running, ${count(now.waiting)} waiting`;
  if (minute.layers.length > 0) showLayers(intervals, minute);
}

function showLayers(intervals, minute) {
  heatMap.show(intervals, minute);
  $("heat-empty").hidden = minute.rows > 0;
  $("heat-empty").textContent = "Nothing computed in the last minute. Send a prompt and watch.";
  $("ramp-top").textContent = percent(heatMap.top, 0);
  $("checkpoint-key").hidden = minute.layers.every(({ checkpoint }) => checkpoint === undefined);
  $("heatmap").ariaLabel = `Heat map of density by layer over the last minute; ${minute.layers.length} layers, mean density ${percent(minute.density)}. Arrow keys read single values.`;
  if (!$("layers").closest("details").open) return;
  $("layers").replaceChildren(
    ...minute.layers.map(({ name, density, checkpoint = null, union, sparseSteps }) =>
      row([name, percent(density), percent(checkpoint), percent(union), percent(sparseSteps, 0)]),
    ),
  );
}

function row([head, ...cells]) {
  const tr = document.createElement("tr");
  const th = document.createElement("th");
  th.scope = "row";
  th.textContent = head;
  tr.append(th, ...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  return tr;
}

function inspect(cell) {
  $("readout").textContent = cell
    ? `Layer ${cell.layer.name}, ${Math.round(cell.ago)} s ago: ` +
      (cell.layer.density === null
        ? "nothing computed"
        : `density ${percent(cell.layer.density)}, union ${percent(cell.layer.union)}, ${count(cell.layer.rows)} token rows in ${count(cell.layer.steps)} steps`)
    : "";
}

function askForKey() {
  const dialog = $("key-dialog");
  if (dialog.open) return;
  setStatus("locked", "Key needed");
  $("key-error").textContent = hasKey() ? "The server does not know this key." : "";
  forgetKey();
  $("key").value = "";
  dialog.showModal();
}

$("key-form").addEventListener("submit", () => {
  useKey($("key").value.trim());
  $("forget-key").hidden = false;
});
$("key-dialog").addEventListener("close", poll);
// Nothing works without a key: Escape must not close the question.
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
$("forget-key").hidden = !hasKey();
$("forget-key").addEventListener("click", () => {
  forgetKey();
  location.reload();
});

// A link cannot carry the key: with one, fetch the text and open that.
for (const link of document.querySelectorAll("[data-keyed]")) {
  link.addEventListener("click", async (event) => {
    if (!hasKey()) return;
    event.preventDefault();
    const response = await request(link.dataset.keyed);
    location.assign(URL.createObjectURL(new Blob([await response.text()], { type: "text/plain" })));
  });
}

$("layers").closest("details").addEventListener("toggle", () => readings.length > 1 && show(readings));

pollForever();
