"use strict"; // for all of the script: this file, gallery.js and controls.js, one behind the other

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const KINDS = ["good", "structural", "logical"];
const ANOMALIES = ["structural", "logical"];
const STUDENTS = ["local", "global"];
const NO_PLACE = "no place: distance of the whole image";
const NO_OWN_MAP = "no map of its own";
const MISTAKES = { all: "All", mistakes: "Mistakes", "false alarm": "False alarms", missed: "Missed" };
// Cards are made this many at a time, when what is made ends less than so many pixels below the window.
const PAGE = 60;
const AHEAD = 600;

const state = { variant: "combined", run: 0, order: "high", kinds: new Set(KINDS), mistakes: "all" };
const byId = (id) => document.getElementById(id);

// -------------------------------------------------------------------------------------------------- elements

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  // A string becomes a text node: names are shown, never parsed.
  node.append(...children.filter((child) => child !== null));
  return node;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function button(text, onClick, attributes = {}) {
  const node = html("button", { type: "button", ...attributes }, text);
  node.addEventListener("click", onClick);
  return node;
}

// --------------------------------------------------------------------------------------------------- numbers

const figure = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
const number = (value) => String(Number(value.toPrecision(4)));
// With its zeros, so that scores line up.
const scoreText = (value) => (Math.abs(value) >= 0.001 && Math.abs(value) < 10000 ? value.toPrecision(4) : number(value));
const total = (counts) => KINDS.reduce((sum, kind) => sum + counts[kind], 0);
const missed = (run, kind) => run.n_images[kind] - run.decisions[kind] - run.suspects[kind];
const allMissed = (run) => ANOMALIES.reduce((sum, kind) => sum + missed(run, kind), 0);
// "Combined", "Local", "Global", "Global means": what there are scores of.
const called = (variant) => (variant[0].toUpperCase() + variant.slice(1)).replaceAll("-", " ");
const longName = (variant) => (STUDENTS.includes(variant) ? `${called(variant)} student` : called(variant));
const lack = (variant) => (STUDENTS.includes(variant) ? `no ${variant} student` : `no part ${variant}`);
/** Why there are no maps of it, in whatever run has it; null where there are. */
function lackOfMaps(variant) {
  const other = data.runs.map((run) => run.variants[variant]).find((figures) => figures !== undefined && figures.map !== variant);
  return other === undefined ? null : other.has_place ? NO_OWN_MAP : NO_PLACE;
}
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

/** "false alarm", "missed", or null where the decision is right, is "suspect", or there is none. */
function mistake(image, result) {
  if (result.decision === null || result.decision === "suspect" || (result.decision === "anomalous") === (image.kind !== "good")) return null;
  return image.kind === "good" ? "false alarm" : "missed";
}

// ---------------------------------------------------------------------------------------------------- charts

const WIDTH = 380;
const HEIGHT = 240;
const MARGIN = { left: 48, right: 12, top: 10, bottom: 34 };

/** Round numbers in a range, about `n` of them. */
function ticks(low, high, n) {
  const raw = (high - low) / n;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

/** 1, 2 and 5 times powers of ten in a range. */
function logarithmicTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const factor of [1, 2, 5]) {
      const tick = Number((factor * 10 ** power).toPrecision(12));
      if (tick >= low && tick <= high) found.push(tick);
    }
  }
  const decades = found.filter((tick) => Number.isInteger(Math.log10(tick)));
  return found.length > 8 && decades.length > 1 ? decades : found;
}

function scale(low, high, from, to, logarithmic = false) {
  const map = logarithmic ? Math.log : (value) => value;
  return (value) => from + ((map(value) - map(low)) / (map(high) - map(low))) * (to - from);
}

function line(className, x1, y1, x2, y2) {
  return svg("line", { class: className, x1, y1, x2, y2 });
}

function label(text, x, y, anchor, className = "") {
  return svg("text", { x, y, "text-anchor": anchor, class: className }, text);
}

function horizontalAxis(x, values, title, left = MARGIN.left) {
  const bottom = HEIGHT - MARGIN.bottom;
  return [
    line("axis", left, bottom, WIDTH - MARGIN.right, bottom),
    ...values.flatMap((value) => [line("axis", x(value), bottom, x(value), bottom + 4), label(number(value), x(value), bottom + 15, "middle")]),
    label(title, (left + WIDTH - MARGIN.right) / 2, HEIGHT - 4, "middle"),
  ];
}

function chart(title, description, legend, ...content) {
  const caption = html("figcaption", {}, html("span", { class: "chart-title" }, title), ...legend);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${description}` }, ...content);
  return html("figure", { class: "chart" }, caption, drawing);
}

function noChart(title, reason) {
  const caption = html("figcaption", {}, html("span", { class: "chart-title" }, title));
  return html("figure", { class: "chart" }, caption, html("p", { class: "none" }, reason));
}

function histogramChart(run, variant) {
  const { edges, counts, logarithmic } = run.variants[variant].histogram;
  const [low, high] = [edges[0], edges[edges.length - 1]];
  const left = 76;
  const x = scale(low, high, left, WIDTH - MARGIN.right, logarithmic);
  const shares = KINDS.map((kind) => counts[kind].map((count) => count / Math.max(run.n_images[kind], 1)));
  const highest = Math.max(...shares.flat());
  const row = (HEIGHT - MARGIN.top - MARGIN.bottom) / KINDS.length;
  const content = [];
  KINDS.forEach((kind, i) => {
    const base = MARGIN.top + (i + 1) * row;
    content.push(line("grid", left, base, WIDTH - MARGIN.right, base));
    shares[i].forEach((share, bin) => {
      if (share === 0) return;
      const height = (share / highest) * (row - 8);
      const bounds = `${number(edges[bin])} to ${number(edges[bin + 1])}: ${counts[kind][bin]} of ${run.n_images[kind]} ${kind}`;
      const width = Math.max(x(edges[bin + 1]) - x(edges[bin]) - 1, 1);
      const shape = { class: `bar ${kind}`, x: x(edges[bin]), y: base - height, width, height };
      content.push(svg("rect", shape, svg("title", {}, bounds)));
    });
    content.push(label(kind, left - 8, base - row / 2, "end", `kind ${kind}`));
    content.push(label(plural(run.n_images[kind], "image"), left - 8, base - row / 2 + 14, "end"));
  });
  let description = `${plural(total(run.n_images), "image")} from ${number(low)} to ${number(high)}`;
  const legend = [];
  if (variant === "combined" && run.threshold !== null) {
    const at = x(run.threshold);
    content.push(line("threshold", at, MARGIN.top, at, HEIGHT - MARGIN.bottom));
    description += `, threshold ${number(run.threshold)}`;
    legend.push(html("span", {}, `threshold ${number(run.threshold)} (dashed)`));
  } else if (run.threshold !== null) {
    legend.push(html("span", { class: "muted" }, "the threshold is for combined scores only"));
  }
  const values = logarithmic ? logarithmicTicks(low, high) : ticks(low, high, 6);
  const title = `image score${logarithmic ? ", logarithmic" : ""} (bars: share of the type's images)`;
  return chart("Scores by type", description, legend, ...content, ...horizontalAxis(x, values, title, left));
}

function curveChart(title, run, curves, areas, xLimit, axes, isChanceDrawn) {
  const drawn = ANOMALIES.filter((kind) => curves[kind] !== null);
  if (drawn.length === 0) return noChart(title, "It cannot be computed; why is said below.");
  const x = scale(0, xLimit, MARGIN.left, WIDTH - MARGIN.right);
  const y = scale(0, 1, HEIGHT - MARGIN.bottom, MARGIN.top);
  const content = [0, 0.25, 0.5, 0.75, 1].flatMap((value) => [
    line("grid", MARGIN.left, y(value), WIDTH - MARGIN.right, y(value)),
    label(String(value), MARGIN.left - 6, y(value) + 4, "end"),
  ]);
  if (isChanceDrawn) content.push(line("chance", x(0), y(0), x(1), y(1)));
  for (const kind of drawn) {
    const [xs, ys] = curves[kind];
    const points = xs.map((value, i) => `${x(value).toFixed(2)},${y(ys[i]).toFixed(2)}`).join(" ");
    content.push(svg("polyline", { class: `curve ${kind}`, points }));
  }
  const middle = (HEIGHT - MARGIN.bottom + MARGIN.top) / 2;
  content.push(svg("text", { "text-anchor": "middle", transform: `translate(10 ${middle}) rotate(-90)` }, axes[1]));
  const legend = ANOMALIES.map((kind) => html("span", { class: `key ${kind} key-${kind}` }, `${kind} ${figure(areas[kind])}`));
  const description = ANOMALIES.map((kind) => `${kind} ${curves[kind] === null ? "absent" : figure(areas[kind])}`).join(", ");
  return chart(title, description, legend, ...content, ...horizontalAxis(x, ticks(0, xLimit, 5), axes[0]));
}

// --------------------------------------------------------------------------------------------------- figures

function tile(title, value, ...details) {
  const lines = details.map((text) => html("div", { class: "detail" }, text));
  return html("div", { class: "tile" }, html("dt", {}, title), html("dd", {}, value, ...lines));
}

const byKind = (values) => ANOMALIES.map((kind) => `${kind} ${figure(values[kind])}`);

function decisionTiles(run) {
  const suspects = total(run.suspects) === 0 ? [] : [
    tile("Suspect", String(total(run.suspects)), "brightness or contrast of no normal image", ...KINDS.map((kind) => `${kind} ${run.suspects[kind]}`)),
  ];
  if (run.decisions === null) return [tile("Threshold", "–", "the run has none: it had no validation images"), ...suspects];
  const n = total(run.n_images) - run.n_images.good;
  return [
    tile("Threshold", number(run.threshold), "of the combined score"),
    tile("False alarms", String(run.decisions.good), `of ${plural(run.n_images.good, "good image")}`),
    tile("Missed", String(allMissed(run)), `of ${plural(n, "anomalous image")}`, ...ANOMALIES.map((kind) => `${kind} ${missed(run, kind)} of ${run.n_images[kind]}`)),
    ...suspects,
  ];
}

function studentsTable(run) {
  const variants = Object.keys(run.variants);
  const mark = (variant) => (variant === state.variant ? { class: "current" } : {});
  const measures = [["auroc", "AUROC"], ["spro", `sPRO@${data.spro_limit}`]];
  const rows = measures.flatMap(([key, name]) => ANOMALIES.map((kind) => html(
    "tr", {}, html("th", { scope: "row" }, `${name} ${kind}`),
    ...variants.map((variant) => html("td", mark(variant), figure(run.variants[variant][key][kind]))),
  )));
  const head = variants.map((variant) => html("th", { scope: "col", ...mark(variant) }, called(variant)));
  const table = html("table", {}, html("thead", {}, html("tr", {}, html("td"), ...head)), html("tbody", {}, ...rows));
  const width = variants.length > 3 ? "students wide scroll" : "students scroll";
  return html("div", { class: width, tabindex: "0", role: "region", "aria-label": `Figures of ${run.name}` }, table);
}

function runCard(run) {
  const trained = run.trained ? `, trained ${String(run.trained).slice(0, 10)}` : "";
  const head = html(
    "div", { class: "run-head" },
    html("h3", {}, run.name),
    html("p", { class: "muted" }, `${run.category}: ${run.recipe}${trained}`),
    html("p", { class: "muted" }, run.path),
  );
  const children = [head];
  const figures = run.variants[state.variant];
  const lackOfMap = lackOfMaps(state.variant);
  if (figures !== undefined && run.parts.includes(state.variant)) {
    const place = lackOfMap === null ? "" : ` – ${lackOfMap}; the ${figures.map} map is shown`;
    children.push(html("p", { class: "meaning muted" }, `${called(state.variant)}: ${data.meanings[state.variant]}${place}`));
  }
  const images = tile("Test images", String(total(run.n_images)), ...KINDS.map((kind) => `${run.n_images[kind]} ${kind}`));
  if (figures === undefined) {
    children.push(html("dl", { class: "tiles" }, images, ...decisionTiles(run)));
    children.push(html("p", { class: "none muted" }, `This run has ${lack(state.variant)}.`), studentsTable(run));
  } else {
    const measures = [
      tile("AUROC, mean", figure(figures.auroc.mean), ...byKind(figures.auroc)),
      tile(`sPRO@${data.spro_limit}, mean`, figure(figures.spro.mean), ...(lackOfMap === null ? byKind(figures.spro) : [lackOfMap])),
    ];
    children.push(html("dl", { class: "tiles" }, ...measures, ...decisionTiles(run), images));
    const sproTitle = `sPRO to FPR ${data.spro_limit}, area`;
    children.push(html(
      "div", { class: "charts" },
      histogramChart(run, state.variant),
      curveChart("ROC, area", run, figures.roc, figures.auroc, 1, ["false positive rate", "true positive rate"], true),
      lackOfMap === null
        ? curveChart(sproTitle, run, figures.spro_curve, figures.spro, data.spro_limit, ["false positive rate (pixels)", "sPRO"], false)
        : noChart(sproTitle, lackOfMap),
      studentsTable(run),
    ));
  }
  if (run.absent.length > 0) {
    children.push(html("ul", { class: "absent", "aria-label": "Absent figures" }, ...run.absent.map((reason) => html("li", {}, reason))));
  }
  return html("article", { class: "run", "aria-label": run.name }, html("div", { class: "run-body" }, ...children));
}

function comparisonTable() {
  const columns = ["auroc", "spro"].flatMap((key) => [...ANOMALIES, "mean"].map((kind) => [key, kind]));
  const names = { auroc: "AUROC", spro: `sPRO@${data.spro_limit}` };
  const values = data.runs.map((run) => columns.map(([key, kind]) => run.variants[state.variant]?.[key][kind] ?? null));
  const sameImages = new Set(data.runs.map((run) => run.category)).size === 1;
  const best = columns.map((_, i) => Math.max(...values.map((row) => row[i] ?? -1)));
  const rows = data.runs.map((run, r) => html(
    "tr", {}, html("th", { scope: "row" }, run.name),
    ...values[r].map((value, i) => html("td", sameImages && value !== null && value === best[i] ? { class: "best" } : {}, figure(value))),
    html("td", {}, run.decisions === null ? "–" : `${run.decisions.good} of ${run.n_images.good}`),
    html("td", {}, run.decisions === null ? "–" : `${allMissed(run)} of ${ANOMALIES.reduce((sum, kind) => sum + run.n_images[kind], 0)}`),
  ));
  const head = html(
    "tr", {}, html("th", { scope: "col" }, "Run"),
    ...columns.map(([key, kind]) => html("th", { scope: "col" }, names[key], html("br"), kind)),
    html("th", { scope: "col" }, "False", html("br"), "alarms"), html("th", { scope: "col" }, "Missed"),
  );
  const note = sameImages ? "; the best of each column is underlined" : "";
  const caption = html("caption", {}, `${called(state.variant)} scores${lackOfMaps(state.variant) === null ? " and maps" : ""}; false alarms and missed images by the combined score${note}`);
  return html("table", {}, caption, html("thead", {}, head), html("tbody", {}, ...rows));
}

function drawFigures() {
  byId("comparison").hidden = data.runs.length < 2;
  if (data.runs.length > 1) byId("comparison").replaceChildren(comparisonTable());
  byId("runs").replaceChildren(...data.runs.map(runCard));
}
