// -------------------------------------------------------------------------------------------------- controls

function mix(value) {
  // From the photograph alone over both to the heat map alone.
  document.documentElement.style.setProperty("--heat", Math.min(1, value / 50));
  document.documentElement.style.setProperty("--photo", Math.min(1, (100 - value) / 50));
  const text = value === 0 ? "photo alone" : value === 100 ? "heat map alone" : `${value} %`;
  for (const input of document.querySelectorAll(".mix-input")) {
    input.value = value;
    input.setAttribute("aria-valuetext", text);
  }
}
for (const input of document.querySelectorAll(".mix-input")) input.addEventListener("input", () => mix(Number(input.value)));

/** Buttons of which `isPressed` says which are on; they stay the same elements, so that focus stays. */
function switches(container, labels, isPressed, press) {
  function refresh() {
    for (const node of container.children) node.setAttribute("aria-pressed", String(isPressed(node.dataset.value)));
  }
  const buttons = Object.entries(labels).map(([value, text]) => button(text, () => {
    press(value);
    refresh();
  }, { "data-value": value }));
  container.replaceChildren(...buttons);
  refresh();
  return refresh;
}

const offered = ["combined", ...Object.keys(data.meanings)].filter((variant) => data.runs.some((run) => variant in run.variants));
const refreshVariants = switches(
  byId("variants"),
  Object.fromEntries(offered.map((variant) => [variant, called(variant)])),
  (variant) => state.variant === variant,
  (variant) => {
    state.variant = variant;
    drawFigures();
    drawGallery();
  },
);

const kindLabels = (run) => Object.fromEntries(KINDS.map((kind) => [kind, `${kind} (${run.n_images[kind]})`]));

function mistakeLabels(run) {
  const n = allMissed(run);
  const counts = { all: total(run.n_images), mistakes: run.decisions.good + n, "false alarm": run.decisions.good, missed: n };
  return Object.fromEntries(Object.entries(MISTAKES).map(([value, text]) => [value, `${text} (${counts[value]})`]));
}

/** All that depends on the run by which the gallery is sorted and filtered. */
function chooseRun(index) {
  state.run = index;
  const run = data.runs[index];
  if (!(state.variant in run.variants)) {
    state.variant = "combined";
    drawFigures();
  }
  for (const node of byId("variants").children) node.disabled = !(node.dataset.value in run.variants);
  refreshVariants();
  switches(byId("kinds"), kindLabels(run), (kind) => state.kinds.has(kind), (kind) => {
    if (!state.kinds.delete(kind)) state.kinds.add(kind);
    drawGallery();
  });
  const isDecided = run.decisions !== null;
  if (!isDecided) state.mistakes = "all";
  byId("mistakes").hidden = !isDecided;
  byId("mistakes-absent").hidden = isDecided;
  byId("mistakes-absent").textContent = "There is no threshold to find mistakes with: the run had no validation images. Make the report with --threshold.";
  if (isDecided) {
    switches(byId("mistakes"), mistakeLabels(run), (value) => state.mistakes === value, (value) => {
      state.mistakes = value;
      drawGallery();
    });
  }
  drawGallery();
}

// ----------------------------------------------------------------------------------------------------- start

/** The colours of the heat maps as a filter on grey images, and the strip that explains them. */
function defineColours() {
  const { red, green, blue, opacity } = data.colours;
  const table = (tag, values) => svg(tag, { type: "table", tableValues: values.join(" ") });
  const filter = svg(
    "filter", { id: "heat", x: 0, y: 0, width: 1, height: 1, "color-interpolation-filters": "sRGB" },
    svg("feComponentTransfer", { in: "SourceGraphic", result: "colour" }, table("feFuncR", red), table("feFuncG", green), table("feFuncB", blue)),
    svg("feColorMatrix", { in: "SourceGraphic", values: "0 0 0 0 0  0 0 0 0 0  0 0 0 0 0  1 0 0 0 0" }),
    svg("feComponentTransfer", { result: "opacity" }, table("feFuncA", opacity)),
    svg("feComposite", { in: "colour", in2: "opacity", operator: "in" }),
  );
  const stops = red.map((_, i) => svg("stop", {
    offset: i / (red.length - 1),
    "stop-color": `rgb(${[red, green, blue].map((values) => Math.round(values[i] * 255)).join(",")})`,
    "stop-opacity": opacity[i],
  }));
  byId("scale").append(
    svg(
      "svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("defs", {}, filter, svg("linearGradient", { id: "strip" }, ...stops)),
      svg("rect", { width: 100, height: 10, fill: "url(#strip)" }),
    ),
    html("span", { id: "scale-text" }),
  );
}

const names = data.runs.map((run) => run.name).join(", ");
document.title = `${names} – dskd-fast report`;
byId("subtitle").textContent = `${plural(data.runs.length, "run")}, ${plural(data.images.length, "test image")}; dskd-fast ${data.version}, ${data.created.replace("T", " ")}`;
byId("run-field").hidden = data.runs.length < 2;
byId("run").append(...data.runs.map((run, i) => html("option", { value: i }, run.name)));
byId("run").addEventListener("change", () => chooseRun(Number(byId("run").value)));
byId("order").addEventListener("change", () => {
  state.order = byId("order").value;
  drawGallery();
});
const perCard = Math.max(...data.images.map((image) => image.runs.filter((result) => result !== null).length));
if (perCard > 1) byId("cards").style.setProperty("--card-width", `${9 * Math.min(perCard, 4)}rem`);
defineColours();
mix(50);
drawFigures();
chooseRun(0);
