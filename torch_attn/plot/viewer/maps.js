// What the page knows: the maps, their tokens' names, numbers and colours. viewer.js, which follows, shows them.
"use strict";
const maps = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.query, columns = data.key;
  const cells = rows.cells * columns.cells;
  const levels = decode(data.weights, Uint8Array);
  const scales = decode(data.scales, Float32Array);
  const firstMaps = data.counts.map((_, layer) => data.counts.slice(0, layer).reduce((sum, heads) => sum + heads, 0));
  const MEAN = -1; // the head that stands for the mean of all

  function decode(text, type) {
    return new type(Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0)).buffer);
  }

  function oneHead(layer, head) {
    const first = firstMaps[layer] + head;
    const weights = new Float32Array(cells);
    for (let row = 0; row < rows.cells; row++) {
      const unit = scales[first * rows.cells + row] / data.levels;
      for (let column = 0; column < columns.cells; column++) {
        const place = row * columns.cells + column;
        weights[place] = levels[first * cells + place] * unit;
      }
    }
    return weights;
  }

  function weightsOf(layer, head) {
    if (head !== MEAN) return oneHead(layer, head);
    const heads = data.counts[layer];
    const mean = new Float32Array(cells);
    for (let each = 0; each < heads; each++) {
      oneHead(layer, each).forEach((weight, place) => (mean[place] += weight / heads));
    }
    return mean;
  }

  const largestOf = (weights) => weights.reduce((most, weight) => Math.max(most, weight), 0) || 1;

  // ---- colours

  const channels = (hex) => [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));

  /** 256 colours from 0 to the largest weight, as [red, green, blue]. */
  function colorTable(style) {
    const ramp = data.ramps[style].map(channels);
    return Array.from({ length: 256 }, (_, step) => {
      const place = (step / 255) * (ramp.length - 1), low = Math.min(Math.floor(place), ramp.length - 2);
      return ramp[low].map((value, channel) => value + (place - low) * (ramp[low + 1][channel] - value));
    });
  }

  /** A canvas with one pixel a cell. */
  function paint(weights, colorOf) {
    const canvas = document.createElement("canvas");
    canvas.width = columns.cells;
    canvas.height = rows.cells;
    const context = canvas.getContext("2d"), image = context.createImageData(columns.cells, rows.cells);
    for (let place = 0; place < cells; place++) {
      image.data.set(colorOf(weights[place]), 4 * place);
      image.data[4 * place + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  // ---- names and numbers

  function visible(token) {
    const text = token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
    return text.trim() === "" ? "␣".repeat(Math.max(1, text.length)) : text;
  }

  const last = (side, cell) => Math.min(side.length, (cell + 1) * side.size) - 1;

  function shortName(side, cell) {
    const first = cell * side.size;
    if (side.size === 1) return side.tokens ? visible(side.tokens[first]) : String(first);
    return `${first}–${last(side, cell)}`;
  }

  function longName(side, cell) {
    const first = cell * side.size, end = last(side, cell);
    const place = first === end ? `${side.label} ${first}` : `${side.label} ${first}–${end}`;
    if (!side.tokens) return place;
    const shown = side.tokens.slice(first, Math.min(end + 1, first + 12)).map(visible).join(" ");
    return `${place} “${shown}${end - first >= 12 ? " …" : ""}”`;
  }

  function number(weight) {
    if (weight === 0) return "0";
    return weight >= 0.001 ? weight.toPrecision(3) : weight.toExponential(2);
  }

  const layerName = (layer) => data.layers[layer];
  const headName = (head) => (head === MEAN ? "mean of heads" : data.heads[head]);
  const kinds = { mean: "mean weight of the cell", max: "largest weight of the cell" };
  const cellKind = kinds[data.binning] ?? data.valueLabel;

  return {
    MEAN, rows, columns, counts: data.counts, layers: data.layers, valueLabel: data.valueLabel, cellKind,
    weightsOf, largestOf, colorTable, paint, shortName, longName, number, layerName, headName,
  };
})();
