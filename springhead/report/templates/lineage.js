// Draws the graph, opens nodes, looks up rows. Text reaches the page only as text, never as markup.
(() => {
  "use strict";
  const content = JSON.parse(document.getElementById("content").textContent);
  const nodes = content.nodes, edges = content.edges;
  const kinds = {version: "registered version", model: "model", data: "data set", filter: "filter", verdict: "verdict",
    evaluation: "evaluation", stage: "stage", row: "row"};
  const byId = (id) => document.getElementById(id);

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // -- the graph ---------------------------------------------------------------------------------

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
  const marks = {bad: "✕ ", warn: "! ", good: "✓ ", marked: "● "};

  function looks(node) {
    const line = colour(`--k-${node.kind}`), soft = colour(`--k-${node.kind}-soft`);
    const border = node.state === "bad" ? colour("--wrong") : line;
    const face = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
    return {
      id: node.id, x: node.x, y: node.y,
      label: (marks[node.state] || "") + cut(node.title, 38) + (node.note ? "\n" + cut(node.note, 26) : ""),
      color: {background: soft, border, highlight: {background: soft, border: colour("--ink")},
        hover: {background: soft, border: colour("--ink")}},
      borderWidth: node.id === content.start ? 3 : 1.5, borderWidthSelected: 3.5,
      font: {color: colour("--ink"), size: 18, face, multi: false},
    };
  }

  function joins(edge, id) {
    const line = edge.verified ? colour("--edge") : colour("--wrong");
    return {id, from: edge.from, to: edge.to, dashes: edge.verified ? false : [7, 5], width: edge.verified ? 1.4 : 2.2,
      color: {color: line, highlight: colour("--accent"), hover: line}};
  }

  const data = {nodes: new vis.DataSet(nodes.map(looks)), edges: new vis.DataSet(edges.map(joins))};
  const network = new vis.Network(byId("graph"), data, {
    layout: {improvedLayout: false, randomSeed: 1},
    physics: false,
    interaction: {hover: nodes.length < 300, keyboard: false, zoomView: false, tooltipDelay: 1e9, hideEdgesOnDrag: nodes.length > 300},
    nodes: {shape: "box", margin: {top: 9, right: 11, bottom: 9, left: 11}, widthConstraint: {minimum: 160, maximum: 205},
      shapeProperties: {borderRadius: 8}},
    edges: {arrows: {to: {enabled: true, scaleFactor: 0.55}}, selectionWidth: 1.2,
      smooth: nodes.length > 300 ? false : {enabled: true, type: "cubicBezier", forceDirection: "horizontal", roundness: 0.45}},
  });
  const fit = () => { network.fit({minZoomLevel: 0.05, maxZoomLevel: 1.1}); };
  network.once("afterDrawing", fit);
  byId("zoom-fit").addEventListener("click", fit);
  for (const [id, factor] of [["zoom-in", 1.3], ["zoom-out", 1 / 1.3]]) {
    byId(id).addEventListener("click", () => network.moveTo({scale: network.getScale() * factor}));
  }
  // The wheel scrolls the page until the reader has clicked into the graph.
  const wheel = (on) => network.setOptions({interaction: {zoomView: on}});
  byId("graph").addEventListener("pointerdown", () => wheel(true));
  byId("graph").addEventListener("pointerleave", () => wheel(false));
  network.on("click", (event) => { if (event.nodes.length) open(event.nodes[0], false); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    data.nodes.update(nodes.map(looks));
    data.edges.update(edges.map(joins));
  });

  // -- a node ------------------------------------------------------------------------------------

  function buttonTo(number) {
    const button = element("button", nodes[number].title);
    button.type = "button";
    button.addEventListener("click", () => open(number, true));
    return button;
  }

  function neighbours(number, from, to) {
    return [...new Set(edges.filter((edge) => edge[from] === number).map((edge) => edge[to]))];
  }

  function section(part) {
    const made = [element("h4", part.title)];
    const wide = part.title === "Parameters" || part.title.startsWith("Evaluated") || part.title.startsWith("Rules");
    const list = element("dl", undefined, wide ? "wide" : "");
    for (const [key, value, style] of part.lines) {
      list.append(element("dt", key), element("dd", value, style));
    }
    made.push(list);
    return made;
  }

  function open(number, move) {
    const node = nodes[number], panel = byId("detail");
    const kind = element("span", undefined, "kind");
    kind.append(element("i", undefined, `swatch k-${node.kind}`), element("span", kinds[node.kind] || node.kind));
    const parts = [kind, element("h3", node.title)];
    if (node.note) parts.push(element("p", node.note, "note"));
    for (const part of node.sections) if (part.lines.length) parts.push(...section(part));
    for (const [title, found] of [["Comes from", neighbours(number, "to", "from")], ["Goes to", neighbours(number, "from", "to")]]) {
      if (!found.length) continue;
      const list = element("ul", undefined, "near");
      for (const other of found.slice(0, 40)) {
        const item = element("li");
        item.append(buttonTo(other));
        list.append(item);
      }
      parts.push(element("h4", title), list);
      if (found.length > 40) parts.push(element("p", `and ${found.length - 40} more: the list below has all`, "note"));
    }
    panel.replaceChildren(...parts);
    panel.dataset.node = String(number);
    panel.scrollTop = 0;
    network.selectNodes([number]);
    if (move) network.moveTo({position: {x: node.x, y: node.y}, scale: Math.max(network.getScale(), 0.7)});
    for (const button of byId("list").querySelectorAll("button")) {
      button.setAttribute("aria-current", String(Number(button.dataset.node) === number));
    }
  }

  // -- the list ----------------------------------------------------------------------------------

  function fill(words) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (node) => `${node.title} ${node.note} ${kinds[node.kind]}`.toLowerCase();
    const found = nodes.filter((node) => wanted.every((word) => text(node).includes(word)));
    byId("list").replaceChildren(...found.map((node) => {
      const item = element("li"), button = element("button"), words = element("span", undefined, "text");
      button.type = "button";
      button.dataset.node = String(node.id);
      words.append(element("span", node.title, "name"), element("span", node.note || kinds[node.kind], "fact"));
      button.append(element("i", undefined, `swatch k-${node.kind}`), words);
      button.addEventListener("click", () => {
        open(node.id, true);
        byId("graph-section").scrollIntoView();
        byId("detail").focus({preventScroll: true});
      });
      item.append(button);
      return item;
    }));
    byId("list-count").textContent = wanted.length ? `${found.length} of ${nodes.length}` : `${nodes.length} nodes`;
  }
  byId("list-filter").addEventListener("input", (event) => fill(event.target.value));
  fill("");
  open(content.start, false);

  // -- a row -------------------------------------------------------------------------------------

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const rows = content.rows;
  if (rows.ids) {
    const ids = bytes(rows.ids), size = content.digits / 2, count = ids.length / size;
    const outcome = rows.wide ? new Uint32Array(bytes(rows.outcome).buffer) : new Uint16Array(bytes(rows.outcome).buffer);
    const values = new Float64Array(bytes(rows.values).buffer);
    const digits = (index) => Array.from(ids.subarray(index * size, index * size + size),
      (byte) => byte.toString(16).padStart(2, "0")).join("");

    // The first row whose digits are not before `text`.
    function lower(text) {
      let low = 0, high = count;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (digits(middle) < text) low = middle + 1; else high = middle;
      }
      return low;
    }

    function shown(index) {
      const what = rows.outcomes[outcome[index]];
      const box = element("div", undefined, `row-found ${what.state}`);
      const line = element("p");
      line.append(element("code", digits(index) + "…"));
      box.append(line, element("p", what.text, "what"));
      if (values.length && !Number.isNaN(values[index])) box.append(element("p", `value ${+values[index].toPrecision(6)}`));
      if (what.node !== null) {
        const go = element("p");
        go.append(buttonTo(what.node));
        box.append(go);
      }
      box.append(element("p", `springhead lineage row:${digits(index)} tells the rest`, "small"));
      return box;
    }

    function look(text) {
      const wanted = text.trim().toLowerCase().replace(/^row:/, "");
      const say = (message) => byId("found").replaceChildren(element("div", message, "row-found none"));
      if (!/^[0-9a-f]{8,64}$/.test(wanted)) return say("Give 8 to 64 digits of a row id: 0 to 9 and a to f.");
      const known = wanted.slice(0, content.digits);
      const first = lower(known.padEnd(content.digits, "0")), end = lower(known.padEnd(content.digits, "f") + "f");
      if (first === end) return say("No row behind this page has this id. springhead lineage row:ID asks all data sets.");
      const found = [];
      for (let index = first; index < Math.min(end, first + 20); index++) found.push(shown(index));
      if (end - first > found.length) found.push(element("p", `and ${end - first - found.length} more; give more digits`, "small"));
      byId("found").replaceChildren(...found);
      return undefined;
    }
    byId("lookup").addEventListener("submit", (event) => { event.preventDefault(); look(byId("row-id").value); });
  }

  window.lineage = {network, open, ready: true};
})();
