// What one sees of the maps and how it answers mouse, touch and keyboard.
// Tokens reach the page through JSON and textContent alone, so nothing in them is markup.
"use strict";
(() => {
  const { MEAN, rows, columns, weightsOf, largestOf, shortName, longName, number, headName } = maps;
  const element = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const RANKED = 8; // entries of the list of the largest weights

  const state = { layer: 0, head: 0, scale: "linear", query: null, key: null, held: false };
  let map = null; // the chosen head's weights, Float32Array of rows.cells * columns.cells
  let largest = 1;
  let picture = null; // the map, one pixel a cell
  let frame = null; // where the map lies on its canvas: { left, top, width, height }
  let table = null; // the colours

  function colorOf(weight, most) {
    const share = Math.min(1, weight / most);
    return table[Math.round(255 * (state.scale === "sqrt" ? Math.sqrt(share) : share))];
  }

  // ---- the map

  function drawMap() {
    const canvas = element("map"), context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    const css = getComputedStyle(document.documentElement), ink = css.getPropertyValue("--ink");
    const muted = css.getPropertyValue("--muted"), mark = css.getPropertyValue("--mark");
    const room = Math.min(760, canvas.parentElement.clientWidth);
    const font = (size) => `${size}px "DejaVu Sans", system-ui, sans-serif`;
    context.font = font(11);
    const tick = (side, cell) => (side.size === 1 ? shortName(side, cell) : String(cell * side.size));
    const widest = (side) => {
      const names = Array.from({ length: side.cells }, (_, cell) => tick(side, cell));
      return Math.min(90, Math.max(...names.map((name) => context.measureText(name).width)));
    };
    const left = 8 + widest(rows), top = 8 + Math.max(10, widest(columns));
    const cell = Math.max(0.5, Math.min((room - left - 2) / columns.cells, 640 / rows.cells, 44));
    frame = { left, top, width: cell * columns.cells, height: cell * rows.cells };
    Object.assign(canvas.dataset, frame); // for scripts that want to point at a cell
    const width = left + frame.width + 2, height = top + frame.height + 2;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(picture, left, top, frame.width, frame.height);
    context.strokeStyle = css.getPropertyValue("--grid");
    context.strokeRect(left - 0.5, top - 0.5, frame.width + 1, frame.height + 1);

    const size = Math.max(8, Math.min(11, cell - 1));
    context.font = font(size);
    context.textBaseline = "middle";
    const label = (side, chosen, draw) => {
      const every = Math.max(1, Math.ceil((side.tokens && side.size === 1 ? size : 3 * size) / cell));
      for (let place = 0; place < side.cells; place++) {
        const near = chosen !== null && Math.abs(place - chosen) < every;
        if (place !== chosen && (near || place % every)) continue;
        context.fillStyle = place === chosen ? mark : chosen === null ? ink : muted;
        draw(tick(side, place), (place + 0.5) * cell);
      }
    };
    context.textAlign = "right";
    label(rows, state.query, (text, y) => context.fillText(cut(context, text, left - 6), left - 4, top + y));
    const lying = widest(columns) < 0.9 * cell;
    context.textAlign = lying ? "center" : "left";
    label(columns, state.key, (text, x) => {
      context.save();
      context.translate(left + x, top - (lying ? 9 : 4));
      if (!lying) context.rotate(-Math.PI / 2);
      context.fillText(cut(context, text, top - 6), 0, 0);
      context.restore();
    });
    context.strokeStyle = mark;
    context.lineWidth = 1.5;
    if (state.query !== null) context.strokeRect(left, top + state.query * cell, frame.width, cell);
    if (state.key !== null) context.strokeRect(left + state.key * cell, top, cell, frame.height);
  }

  function cut(context, text, room) {
    if (context.measureText(text).width <= room) return text;
    let end = text.length;
    while (end > 1 && context.measureText(text.slice(0, end) + "…").width > room) end--;
    return text.slice(0, end) + "…";
  }

  // ---- tokens, numbers

  const strips = { query: element("queries"), key: element("keys") };

  function fillStrip(name, side) {
    for (let cell = 0; cell < side.cells; cell++) {
      const token = document.createElement("span");
      token.className = "token";
      token.id = `${name}-${cell}`;
      token.setAttribute("role", "option");
      token.dataset.cell = cell;
      token.textContent = shortName(side, cell);
      token.title = longName(side, cell);
      strips[name].append(token);
    }
  }

  function shade(name, weightOf) {
    for (const token of strips[name].children) {
      const cell = Number(token.dataset.cell), chosen = state[name] === cell;
      token.setAttribute("aria-selected", String(chosen));
      if (weightOf === null) {
        token.style.background = token.style.color = "";
        continue;
      }
      const [red, green, blue] = colorOf(weightOf(cell), largest);
      token.style.background = `rgb(${red} ${green} ${blue})`;
      token.style.color = 0.299 * red + 0.587 * green + 0.114 * blue > 135 ? "#10131a" : "#ffffff";
    }
  }

  const weightAt = (query, key) => map[query * columns.cells + key];

  function rank(name, side, weightOf) {
    const list = element("ranking");
    list.replaceChildren();
    element("ranking-name").textContent = name;
    if (weightOf === null) return;
    const order = Array.from({ length: side.cells }, (_, cell) => cell);
    order.sort((a, b) => weightOf(b) - weightOf(a) || a - b);
    const most = weightOf(order[0]) || 1;
    for (const cell of order.slice(0, RANKED)) {
      const entry = document.createElement("li");
      const parts = ["name", "track", "number"].map((kind) => {
        const part = document.createElement("span");
        part.className = kind;
        entry.append(part);
        return part;
      });
      parts[0].textContent = shortName(side, cell);
      parts[0].title = longName(side, cell);
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.style.width = `${(100 * weightOf(cell)) / most}%`;
      parts[1].append(bar);
      parts[2].textContent = number(weightOf(cell));
      list.append(entry);
    }
  }

  const where = () => `${maps.layerName(state.layer)}, ${headName(state.head)}`;

  function say(text, weight) {
    const strong = document.createElement("strong");
    strong.textContent = weight === null ? "" : number(weight);
    element("readout").replaceChildren(`${where()}: ${text}`);
    if (weight !== null) element("readout").append(document.createElement("br"), strong, ` ${maps.cellKind}`);
  }

  function show() {
    const { query, key } = state;
    const fromQuery = query === null ? null : (cell) => weightAt(query, cell);
    const toKey = key === null ? null : (cell) => weightAt(cell, key);
    shade("key", fromQuery);
    shade("query", query === null ? toKey : null);
    const names = [query !== null && longName(rows, query), key !== null && longName(columns, key)].filter(Boolean);
    if (names.length) say(names.join(" → "), names.length === 2 ? weightAt(query, key) : null);
    else say("point at a cell or a token", null);
    if (query !== null) rank(`${names[0]} attends most to`, columns, fromQuery);
    else rank(key === null ? "" : `${names[0]} is attended most by`, rows, toKey);
    drawMap();
  }

  function choose(query, key) {
    if (query === state.query && key === state.key) return;
    Object.assign(state, { query, key });
    show();
  }

  function hold(held) {
    state.held = held;
    if (!held) choose(null, null);
  }

  // ---- layers and heads

  function fillHeads() {
    const group = element("heads");
    group.replaceChildren();
    const heads = maps.counts[state.layer];
    for (let head = heads > 1 ? MEAN : 0; head < heads; head++) {
      const button = document.createElement("button"), label = document.createElement("span");
      button.type = "button";
      button.setAttribute("role", "radio");
      button.dataset.head = head;
      label.textContent = head === MEAN ? "mean" : headName(head);
      button.title = headName(head);
      button.append(document.createElement("canvas"), label);
      group.append(button);
    }
    paintHeads();
  }

  function paintHeads() {
    for (const button of element("heads").children) {
      const weights = weightsOf(state.layer, Number(button.dataset.head)), canvas = button.firstChild;
      canvas.width = canvas.height = 120;
      const most = largestOf(weights), context = canvas.getContext("2d");
      context.imageSmoothingEnabled = columns.cells > 120;
      context.drawImage(maps.paint(weights, (weight) => colorOf(weight, most)), 0, 0, 120, 120);
    }
  }

  function select(layer, head) {
    const newLayer = layer !== state.layer || !element("heads").children.length;
    Object.assign(state, { layer, head: Math.min(head, maps.counts[layer] - 1) });
    if (newLayer) fillHeads();
    for (const button of element("heads").children) {
      const checked = Number(button.dataset.head) === state.head;
      button.setAttribute("aria-checked", String(checked));
      button.tabIndex = checked ? 0 : -1;
    }
    recolor();
  }

  function recolor() {
    map = weightsOf(state.layer, state.head);
    largest = largestOf(map);
    picture = maps.paint(map, (weight) => colorOf(weight, largest));
    element("map").setAttribute("aria-label", `map of ${where()}`);
    const legend = element("legend"), context = legend.getContext("2d");
    for (let place = 0; place < legend.width; place++) {
      context.fillStyle = `rgb(${colorOf(place / (legend.width - 1), 1).join(" ")})`;
      context.fillRect(place, 0, 1, legend.height);
    }
    element("legend-high").textContent = number(largest);
    show();
  }

  // ---- events

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const within = (place, side) => Math.max(0, Math.min(side.cells - 1, place));

  function listenToKeys(target, move) {
    target.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hold(false);
      else if (event.key === "Enter" || event.key === " ") hold(!state.held);
      else if (!move(event.key)) return;
      event.preventDefault();
    });
  }

  function listenToMap() {
    const canvas = element("map");
    const cellAt = (event) => {
      const column = Math.floor(((event.offsetX - frame.left) / frame.width) * columns.cells);
      const row = Math.floor(((event.offsetY - frame.top) / frame.height) * rows.cells);
      const inside = row >= 0 && row < rows.cells && column >= 0 && column < columns.cells;
      return inside ? [row, column] : [null, null];
    };
    canvas.addEventListener("pointermove", (event) => state.held || choose(...cellAt(event)));
    canvas.addEventListener("pointerleave", () => state.held || choose(null, null));
    canvas.addEventListener("click", (event) => {
      const [row, column] = cellAt(event), again = state.held && row === state.query && column === state.key;
      hold(!again && row !== null);
      if (state.held) choose(row, column);
    });
    listenToKeys(canvas, (key) => {
      if (!STEPS[key]) return false;
      const [down, right] = STEPS[key], fresh = state.query === null || state.key === null;
      if (fresh) choose(state.query ?? 0, state.key ?? 0);
      else choose(within(state.query + down, rows), within(state.key + right, columns));
      return true;
    });
  }

  function listenToStrip(name, side) {
    const strip = strips[name];
    const pick = (cell) => (name === "query" ? choose(cell, null) : choose(null, cell));
    const cellOf = (event) => event.target.closest(".token")?.dataset.cell;
    strip.addEventListener("pointermove", (event) => {
      if (!state.held && cellOf(event) !== undefined) pick(Number(cellOf(event)));
    });
    strip.addEventListener("pointerleave", () => state.held || choose(null, null));
    strip.addEventListener("click", (event) => {
      if (cellOf(event) === undefined) return;
      const cell = Number(cellOf(event)), again = state.held && state[name] === cell;
      hold(!again);
      if (!again) pick(cell);
    });
    listenToKeys(strip, (key) => {
      const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -side.cells, End: side.cells }[key];
      if (!way) return false;
      pick(state[name] === null ? (way > 0 && key !== "End" ? 0 : side.cells - 1) : within(state[name] + way, side));
      strip.setAttribute("aria-activedescendant", `${name}-${state[name]}`);
      element(`${name}-${state[name]}`).scrollIntoView({ block: "nearest" });
      return true;
    });
  }

  function listenToHeads() {
    const group = element("heads");
    const pick = (button) => {
      select(state.layer, Number(button.dataset.head));
      button.focus();
    };
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) pick(button);
    });
    group.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!way) return;
      const buttons = [...group.children], now = buttons.findIndex((button) => button.tabIndex === 0);
      pick(buttons[(now + way + buttons.length) % buttons.length]);
      event.preventDefault();
    });
  }

  maps.layers.forEach((name, layer) => element("layer").add(new Option(name, layer)));
  element("layer").addEventListener("change", (event) => select(Number(event.target.value), state.head));
  element("scale").addEventListener("change", (event) => {
    state.scale = event.target.value;
    paintHeads();
    recolor();
  });
  dark.addEventListener("change", () => {
    table = maps.colorTable(dark.matches ? "dark" : "light");
    paintHeads();
    recolor();
  });
  table = maps.colorTable(dark.matches ? "dark" : "light");
  addEventListener("resize", drawMap);
  element("legend-label").textContent = maps.valueLabel;
  element("queries-name").textContent = `Point at a ${rows.label} token to see where it attends`;
  element("keys-name").textContent = `Point at a ${columns.label} token to see what attends to it`;
  fillStrip("query", rows);
  fillStrip("key", columns);
  listenToMap();
  listenToStrip("query", rows);
  listenToStrip("key", columns);
  listenToHeads();
  select(0, 0);
})();
