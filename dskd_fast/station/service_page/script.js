"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // So many are on their way at a time, so that the service can make a batch of them.
  const AT_ONCE = 4;
  const byId = (id) => document.getElementById(id);
  const waiting = [];
  let underWay = 0;
  let done = 0;
  let sent = 0;

  /** An element; a string becomes a text node: names are shown, never parsed. */
  function html(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children.filter((child) => child !== null));
    return node;
  }
  const number = (value) => value.toPrecision(4);
  const called = (part) => part.replaceAll("-", " ");
  const bytes = (n) => `${(n / 2 ** 20).toFixed(1)} MiB`;

  const threshold = data.threshold === null ? "no threshold, so no decisions" : `threshold ${number(data.threshold)}`;
  document.title = `${data.run} – dskd-fast`;
  byId("title").textContent = data.run;
  byId("subtitle").textContent = `${threshold}; files of up to ${bytes(data.max_bytes)}`;

  function card(name, ...children) {
    const node = html("li", { class: "card result" }, html("span", { class: "name" }, name), ...children);
    byId("results").prepend(node);
  }

  function showJudgement(name, found) {
    const kind = found.decision === "normal" ? "normal" : "mistake";
    const reason = found.reason === null ? "" : `: ${found.reason}`;
    const parts = Object.entries(found.parts).map(([part, value]) => {
      const decides = part === found.decided_by;
      const text = `${called(part)} ${number(value)}`;
      return html("span", { class: decides ? "part decider" : "part", title: data.meanings[part] ?? "" }, decides ? `decided by ${text}` : text);
    });
    card(
      name,
      html(
        "p",
        { class: "caption" },
        html("span", { class: "score" }, `score ${number(found.score)}`),
        found.decision === null ? null : html("span", { class: kind }, `${found.decision}${reason}`),
      ),
      html("p", { class: "parts" }, ...parts),
      html("img", { src: `data:image/jpeg;base64,${found.overlay}`, alt: `${name} and its heat map` }),
    );
  }

  const showProblem = (name, sentence) => card(name, html("p", { class: "problem" }, sentence));

  async function send(file) {
    if (file.size > data.max_bytes) {
      showProblem(file.name, `it has ${bytes(file.size)}, and at most ${bytes(data.max_bytes)} are taken`);
      return;
    }
    try {
      const response = await fetch("predict?overlay=true", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
      const answer = await response.json();
      if (response.ok) showJudgement(file.name, answer);
      else showProblem(file.name, answer.detail);
    } catch {
      showProblem(file.name, "the service does not answer: is it still running?");
    }
  }

  async function work() {
    underWay++;
    while (waiting.length > 0) {
      await send(waiting.shift());
      done++;
      byId("status").textContent = `${done} of ${sent} done`;
    }
    underWay--;
  }

  function take(files) {
    waiting.push(...files);
    sent += files.length;
    byId("status").textContent = `${done} of ${sent} done`;
    while (underWay < AT_ONCE && waiting.length > 0) work();
  }

  byId("files").addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = "";
  });
  // The whole page takes them: a browser would otherwise leave it and show the file.
  for (const type of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(type, (event) => {
      event.preventDefault();
      byId("drop").classList.toggle("over", type === "dragover");
      if (type === "drop") take(event.dataTransfer.files);
    });
  }
})();
