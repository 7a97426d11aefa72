// --------------------------------------------------------------------------------------------------- gallery

function frame(image, run, result) {
  const node = html("span", { class: "frame" }, html("img", { class: "photo", alt: "", src: `data:image/jpeg;base64,${image.photo}` }));
  node.style.setProperty("--ratio", image.width / image.height);
  const view = run.variants[state.variant];
  if (view !== undefined) node.append(html("img", { class: "heat", alt: "", src: `data:image/png;base64,${result.maps[view.map]}` }));
  if (!view?.has_place) node.append(html("span", { class: "no-map" }, view === undefined ? lack(state.variant) : NO_PLACE));
  return node;
}

const decider = (run, result) => `decided by ${result.decided_by}${run.variants[result.decided_by].has_place ? "" : ": the whole image"}`;

/** Which part decided, and the values of all. */
function partsList(run, result) {
  if (result.decided_by === null) return null;
  const values = run.parts.map((name) => html("span", { class: "part" }, `${name} ${scoreText(result.scores[name])}`));
  return html("span", { class: "parts" }, html("span", { class: "decider" }, decider(run, result)), ...values);
}

function caption(image, run, result) {
  const score = result.scores[state.variant];
  const wrong = mistake(image, result);
  return html(
    "span", { class: "caption" },
    data.runs.length > 1 ? html("span", { class: "run-name" }, run.name) : null,
    html("span", { class: "score" }, score === undefined ? "–" : scoreText(score)),
    wrong === null ? html("span", { class: "decision" }, result.decision ?? "") : html("span", { class: "mistake" }, wrong),
    partsList(run, result),
  );
}

/** An image as each run that has it sees it: make(panel, run, result) for each. */
function panels(image, make) {
  return image.runs.flatMap((result, i) => {
    if (result === null) return [];
    const run = data.runs[i];
    return [make(html("span", { class: "panel" }, frame(image, run, result), caption(image, run, result)), run, result)];
  });
}

/** What a screen reader says of a card. */
function summary(image) {
  const parts = image.runs.flatMap((result, i) => {
    if (result === null) return [];
    const score = result.scores[state.variant];
    const said = [
      data.runs.length > 1 ? data.runs[i].name : null,
      score === undefined ? "no score" : `score ${scoreText(score)}`,
      mistake(image, result) ?? result.decision,
      result.decided_by === null ? null : decider(data.runs[i], result),
    ];
    return [said.filter((part) => part !== null).join(", ")];
  });
  return `${image.name}, ${image.kind}; ${parts.join("; ")}; enlarge`;
}

function card(image, position) {
  const open = button("", () => show(position), { class: "open", "aria-label": summary(image) });
  open.replaceChildren(html("span", { class: "panels" }, ...panels(image, (panel) => panel)));
  const about = html("p", { class: "about" }, html("span", { class: `kind ${image.kind}` }, image.kind), html("span", { class: "name" }, image.name));
  return html("li", { class: "card" }, open, about);
}

let chosen = [];
let nShown = 0;

function choose() {
  const score = (image) => image.runs[state.run].scores[state.variant];
  const isWanted = (image) => {
    const result = image.runs[state.run];
    if (result === null || !state.kinds.has(image.kind)) return false;
    if (state.mistakes === "all") return true;
    const wrong = mistake(image, result);
    return state.mistakes === "mistakes" ? wrong !== null : wrong === state.mistakes;
  };
  chosen = data.images.filter(isWanted);
  // The data is in the order of names, and sorting is stable.
  if (state.order === "high") chosen.sort((a, b) => score(b) - score(a));
  if (state.order === "low") chosen.sort((a, b) => score(a) - score(b));
}

function showMore() {
  const next = chosen.slice(nShown, nShown + PAGE).map((image, i) => card(image, nShown + i));
  byId("cards").append(...next);
  nShown += next.length;
  byId("more").hidden = nShown === chosen.length;
}

function drawGallery() {
  choose();
  // As many as there were: the reader should not lose the place when a switch is pressed.
  const wanted = Math.min(nShown, chosen.length);
  nShown = 0;
  byId("cards").replaceChildren();
  do showMore();
  while (nShown < wanted);
  requestAnimationFrame(fillWindow);
  const all = data.images.filter((image) => image.runs[state.run] !== null).length;
  byId("count").textContent = chosen.length === 0 ? `No image of ${all} matches: choose other types or decisions.` : `${chosen.length} of ${plural(all, "image")}`;
  const run = data.runs[state.run];
  const half = run.threshold !== null ? ` … ${number(run.threshold)} (threshold)` : "";
  const whose = data.runs.length > 1 ? `${run.name}: ` : "";
  const low = run.no_colour === 0 ? "0 (normal mean)" : number(run.no_colour);
  byId("scale-text").textContent = `${whose}${low}${half} … ${number(run.full_colour)} standard deviations`;
}

/** Make cards until they reach well below the window. */
function fillWindow() {
  const more = byId("more");
  if (more.hidden || more.getBoundingClientRect().top > innerHeight + AHEAD) return;
  showMore();
  requestAnimationFrame(fillWindow);
}
new IntersectionObserver(fillWindow, { rootMargin: `${AHEAD}px` }).observe(byId("more"));

// ---------------------------------------------------------------------------------------------------- viewer

let shown = 0;

function scoresTable(run, result) {
  const rows = Object.keys(run.variants).map((variant) => html(
    "tr", variant === state.variant ? { class: "current" } : {},
    html("th", { scope: "row" }, longName(variant)), html("td", {}, scoreText(result.scores[variant])),
  ));
  return html("table", {}, html("tbody", {}, ...rows));
}

function show(position) {
  shown = position;
  const image = chosen[position];
  byId("viewer-title").textContent = image.name;
  const lackOfMap = lackOfMaps(state.variant);
  const what = lackOfMap === null ? `${state.variant} map` : `${state.variant}, ${lackOfMap}`;
  byId("viewer-about").textContent = `${image.kind}, ${what}, ${position + 1} of ${chosen.length}`;
  byId("viewer-panels").replaceChildren(...panels(image, (panel, run, result) => html(
    "div", {}, panel, scoresTable(run, result), result.reason === null ? null : html("p", { class: "muted" }, `suspect: ${result.reason}`),
  )));
  byId("viewer-previous").disabled = position === 0;
  byId("viewer-next").disabled = position === chosen.length - 1;
  if (!byId("viewer").open) byId("viewer").showModal();
}

function step(by) {
  if (shown + by >= 0 && shown + by < chosen.length) show(shown + by);
}

byId("viewer-close").addEventListener("click", () => byId("viewer").close());
byId("viewer-previous").addEventListener("click", () => step(-1));
byId("viewer-next").addEventListener("click", () => step(1));
byId("viewer").addEventListener("keydown", (event) => {
  if (event.target === byId("viewer-mix") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
byId("viewer").addEventListener("click", (event) => {
  if (event.target === byId("viewer")) byId("viewer").close();
});
