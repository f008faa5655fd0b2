"use strict";
// The live page: asks `live` once a second and draws what it tells. All text of the server goes in
// as text, never as HTML.

const PERIOD = 1000, HISTORY = 120, EXPERTS_EVERY = 3;
const $ = (id) => document.getElementById(id);
const lines = { generated: [], prompts: [], running: [], waiting: [], step: [], hits: [] };
let before = null, expertsBefore = null, polls = 0, timer = 0;
let key = sessionStorage.getItem("octavo-key") || "";

const number = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + "%";
const milliseconds = (seconds) => (1000 * seconds).toFixed(seconds < 0.1 ? 1 : 0) + " ms";
function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (bytes >= 1024 && place < units.length - 1) { bytes /= 1024; place += 1; }
  return bytes.toFixed(place && bytes < 100 ? 1 : 0) + " " + units[place];
}

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function table(id, heads, rows) {
  const found = $(id), top = element("tr");
  for (const [text, kind] of heads) top.append(element("th", text, kind));
  found.replaceChildren(top, ...rows.map((cells) => {
    const line = element("tr");
    cells.forEach((cell, place) => {
      const box = element("td", undefined, heads[place][1]);
      box.append(cell);
      line.append(box);
    });
    return line;
  }));
}

function rows(id, pairs, shown) {
  const most = Math.max(1e-9, ...pairs.map(([, value]) => value));
  $(id).replaceChildren(...pairs.map(([name, value]) => {
    const line = element("div"), bar = element("div");
    bar.style.width = (100 * value / most) + "%";
    line.append(element("span", name), bar, element("span", shown(value)));
    return line;
  }));
}

function canvas(id) {
  const found = $(id), scale = window.devicePixelRatio || 1;
  found.width = Math.round(found.clientWidth * scale);
  found.height = Math.round(found.clientHeight * scale);
  return [found.getContext("2d"), found.width, found.height];
}

function line(name, value, text) {
  $(name).textContent = text;
  const values = lines[name];
  values.push(value);
  if (values.length > HISTORY) values.shift();
  const [draw, width, height] = canvas(name + "-line");
  const most = Math.max(...values) || 1;
  draw.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  draw.lineWidth = window.devicePixelRatio || 1;
  draw.beginPath();
  values.forEach((one, place) => {
    draw.lineTo(width * (1 - (values.length - 1 - place) / (HISTORY - 1)),
      height - 2 - (height - 4) * one / most);
  });
  draw.stroke();
}

function drawMemory(told) {
  const plan = told.plan, stats = told.engine;
  const block = stats.num_blocks ? plan.kv_bytes / stats.num_blocks : 0;
  const used = stats.num_used_blocks * block, cached = stats.num_cached_blocks * block;
  const parts = [
    ["weights", "weights", plan.weights_bytes],
    ["activations and graphs", "work", plan.activation_bytes + plan.graph_bytes],
    ["KV in use", "used", used],
    ["KV cached, free to reuse", "cached", cached],
    ["KV free", "free", Math.max(0, plan.kv_bytes - used - cached)],
    ["left", "rest", Math.max(0, plan.usable_bytes - plan.total_bytes)],
  ];
  const all = parts.reduce((sum, part) => sum + part[2], 0) || 1;
  $("memory").replaceChildren(...parts.map(([name, kind, bytes]) => {
    const part = element("span", undefined, kind);
    part.style.flex = "0 0 " + (100 * bytes / all) + "%";
    part.title = name + ": " + size(bytes);
    return part;
  }));
  const entries = parts.map(([name, kind, bytes]) => {
    const entry = element("li"), mark = element("i", undefined, kind);
    entry.append(mark, name + " " + size(bytes));
    return entry;
  });
  entries.push(element("li", "waste in used KV " + percent(stats.waste_share)));
  $("memory-legend").replaceChildren(...entries);
  table("tenants", [["tenant"], ["running", "number"], ["waiting", "number"], ["KV", "number"]],
    stats.tenants.map((one) => [one.tenant || "all", number(one.num_running),
      number(one.num_waiting), size(one.kv_bytes)]));
  table("groups", [["sees"], ["layers", "number"], ["format"], ["in use", "number"]],
    stats.groups.map((one) => [one.name, number(one.num_layers), one.formats,
      size(one.used_bytes)]));
}

function progress(one) {
  const box = element("div", undefined, "progress"), total = one.prompt_len + one.max_outputs;
  const prompt = Math.min(one.num_computed, one.prompt_len);
  for (const [kind, count] of [["cached", Math.min(one.num_cached_tokens, prompt)],
    ["work", Math.max(0, prompt - one.num_cached_tokens)], ["used", one.num_outputs]]) {
    const part = element("span", undefined, kind);
    part.style.flex = "0 0 " + (100 * count / total) + "%";
    box.append(part);
  }
  return box;
}

function drawRequests(stats) {
  const count = "number";
  table("requests",
    [["request"], ["tenant"], ["state"], ["progress"], ["prompt", count], ["cached", count],
      ["answer", count], ["of", count], ["age", count]],
    stats.sequences.map((one) => [
      one.request_id + (one.index ? "/" + one.index : ""), one.tenant || "-",
      !one.is_running ? "waits" : one.num_outputs ? "decodes" : "prefills", progress(one),
      number(one.prompt_len), number(one.num_cached_tokens), number(one.num_outputs),
      number(one.max_outputs), one.age_seconds.toFixed(1) + " s",
    ]));
}

function drawCauses(told) {
  const stats = told.engine, words = { never_seen: "never seen", evicted: "evicted",
    other_tenant: "of another tenant", other_version: "of another version",
    too_short: "last tokens" };
  rows("reasons", [["cached", stats.prefix_hit_tokens],
    ...Object.entries(stats.prefix_miss_tokens).map(([one, count]) => [words[one] || one, count]),
  ], number);
  const bounds = told.step_seconds_buckets, last = bounds.length;
  rows("steps", stats.step_seconds_counts
    .map((count, place) => [place < last ? "up to " + milliseconds(bounds[place])
      : "longer", count])
    .filter(([, count]) => count), number);
}

function drawExperts(counts) {
  $("experts-section").hidden = !counts.length;
  if (!counts.length) return;
  const width = counts[0].length, found = $("experts");
  const lately = counts.map((row, layer) => row.map((count, expert) =>
    count - (expertsBefore ? expertsBefore[layer][expert] : 0)));
  const total = lately.flat().reduce((sum, count) => sum + count, 0);
  if (expertsBefore && !total) return;  // nothing new: the last picture stays
  expertsBefore = counts;
  found.width = width;
  found.height = counts.length;
  found.style.height = Math.max(4, Math.min(24, 320 / counts.length)) * counts.length + "px";
  const draw = found.getContext("2d"), image = draw.createImageData(width, counts.length);
  let busiest = [0, 0, 0];
  lately.forEach((row, layer) => {
    const mean = row.reduce((sum, count) => sum + count, 0) / width || 1;
    row.forEach((count, expert) => {
      const times = count / mean, heat = Math.min(1, times / 4), place = 4 * (layer * width + expert);
      if (times > busiest[0]) busiest = [times, layer, expert];
      // From the page's quiet blue over sand to ember: 1 is the mean, 4 and more the hottest.
      image.data[place] = 40 + 200 * Math.sqrt(heat);
      image.data[place + 1] = 60 + 110 * Math.sin(Math.PI * heat);
      image.data[place + 2] = 130 * (1 - heat);
      image.data[place + 3] = 255;
    });
  });
  draw.putImageData(image, 0, 0);
  $("experts-note").textContent = counts.length + " layers (down) x " + width +
    " experts (across), lately; the busiest is expert " + busiest[2] + " of layer " + busiest[1] +
    ": " + busiest[0].toFixed(1) + " times the mean";
}

function draw(told, hasExperts) {
  const stats = told.engine, last = before || told;
  const seconds = Math.max(told.time - last.time, 1e-3), was = last.engine;
  const rate = (name) => Math.max(0, stats[name] - was[name]) / seconds;
  const steps = stats.num_steps - was.num_steps;
  const asked = stats.prefix_query_tokens - was.prefix_query_tokens;
  const share = asked > 0 ? (stats.prefix_hit_tokens - was.prefix_hit_tokens) / asked
    : stats.prefix_query_tokens ? stats.prefix_hit_tokens / stats.prefix_query_tokens : 0;
  const each = steps > 0 ? (stats.step_seconds - was.step_seconds) / steps : 0;
  line("generated", rate("num_generation_tokens"), number(rate("num_generation_tokens")));
  line("prompts", rate("num_prompt_tokens"), number(rate("num_prompt_tokens")));
  line("running", stats.num_running, number(stats.num_running));
  line("waiting", stats.num_waiting, number(stats.num_waiting));
  line("step", each, each ? milliseconds(each) : "-");
  line("hits", share, percent(share));
  before = told;
  $("model").textContent = told.model;
  $("version").textContent = "Octavo " + told.version;
  if (told.plan) drawMemory(told);
  drawRequests(stats);
  drawCauses(told);
  if (hasExperts) drawExperts(stats.expert_counts);
  $("plan").textContent = told.plan ? told.plan.text : "";
}

function say(text, isBad) {
  $("status").textContent = text;
  $("status").className = isBad ? "bad" : "";
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const headers = key ? { Authorization: "Bearer " + key } : {};
    const hasExperts = polls % EXPERTS_EVERY === 0;
    const answer = await fetch("live?experts=" + hasExperts, { headers });
    if (answer.status === 401 || answer.status === 403) {
      $("refusal").textContent = key ? (await answer.json()).error.message : "";
      sessionStorage.removeItem("octavo-key");
      $("door").hidden = false;
      $("all").hidden = true;
      say("locked", false);
      return;
    }
    const told = await answer.json();
    if (!answer.ok) throw new Error(told.error.message);
    $("door").hidden = true;
    $("all").hidden = false;
    polls += 1;
    draw(told, hasExperts);
    say("up " + Math.floor(told.uptime_seconds / 60) + " min", false);
  } catch (error) {
    say("no answer: " + error.message, true);
  }
  timer = setTimeout(poll, PERIOD);
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("octavo-key", key);
  poll();
});
document.addEventListener("visibilitychange", poll);
poll();
