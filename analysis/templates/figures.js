// Draw the figures of the page with plotly.js. Texts of the runs are escaped for plotly, which reads some tags.
{
  const data = JSON.parse(document.getElementById("live-data").textContent);
  const {methods, budgets, runs, optima, bowls, lines, curves} = data;
  const table = document.querySelector("table.sortable");
  const heads = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
  const rows = [...table.tBodies[0].rows]; // before a reader sorts them
  const off = {method: new Set(), budget: new Set()};
  const escaped = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const dark = matchMedia("(prefers-color-scheme: dark)"), touch = matchMedia("(pointer: coarse)").matches;
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const shown = each => !off.method.has(each.method) && !off.budget.has(each.budget);

  // A colour that is seen on the page's paper: on a dark one, half way to white.
  function ink(color, alpha = 1) {
    const parts = [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16));
    return `rgba(${parts.map(part => dark.matches ? Math.round(part + (255 - part) * 0.45) : part)},${alpha})`;
  }

  // --- What a figure shows -------------------------------------------------------------------------------------------

  const cell = (row, name) => rows[row].cells[heads.indexOf(name)]?.textContent ?? "";
  function ofRun(row) {
    const [run, loss] = [rows[row].cells[0].textContent, cell(row, "loss (nats)")];
    const name = run.length > 40 ? `${run.slice(0, 20)}…${run.slice(-19)}` : run;
    return [name, `loss ${loss}, N ${cell(row, "N")}`].map(escaped).join("<br>");
  }

  const every = runs.row.map((row, i) => ({row, method: runs.method[i], budget: runs.budget[i], flop: runs.flop[i],
    size: runs.size[i], loss: runs.loss[i], best: runs.best[i]}));

  function marks(points, x, y, look) {
    return {type: "scatter", mode: "markers", x: points.map(each => each[x]), y: points.map(each => each[y]),
      customdata: points.map(each => each.row), hovertext: points.map(each => ofRun(each.row)), hoverinfo: "text",
      marker: look};
  }

  function ofMethods(x, y, what) {
    const traces = [];
    const points = every.filter(shown);
    traces.push(marks(points, x, y, {size: 5, opacity: 0.35, symbol: points.map(each => methods[each.method].symbol),
      color: points.map(each => ink(methods[each.method].color))}));
    for (const line of lines[what].filter(each => !off.method.has(each.method))) {
      const {color, dash} = methods[line.method];
      if (line.low) traces.push({type: "scatter", mode: "lines", hoverinfo: "skip", line: {width: 0},
        x: [...line.flop, ...[...line.flop].reverse()], y: [...line.high, ...[...line.low].reverse()], fill: "toself",
        fillcolor: ink(color, 0.14)});
      traces.push({type: "scatter", mode: "lines", x: line.flop, y: line.value, hoverinfo: "skip",
        line: {color: ink(color), width: 2, dash}});
    }
    methods.forEach(({color, symbol}, method) => {
      const own = optima.filter(each => each.method === method && shown(each)), ends = own.map(each => each[`${y}_ends`]);
      if (own.length) traces.push({type: "scatter", mode: "markers", x: own.map(each => each[x]), y: own.map(each => each[y]),
        hovertext: own.map(each => [methods[method].name, ...each.told].map(escaped).join("<br>")), hoverinfo: "text",
        error_y: {type: "data", symmetric: false, color: ink(color), thickness: 1.3, width: 3,
          array: own.map((each, i) => ends[i] ? Math.max(ends[i][1] - each[y], 0) : null),
          arrayminus: own.map((each, i) => ends[i] ? Math.max(each[y] - ends[i][0], 0) : null)},
        marker: {size: 10, color: ink(color), symbol: own.map(each => each.interior ? symbol : `${symbol}-open`),
          line: {width: 1.5}}});
    });
    return traces;
  }

  function profiles() {
    const traces = bowls.filter(shown).map(bowl => ({type: "scatter", mode: "lines", x: bowl.size, y: bowl.loss,
      hoverinfo: "skip", line: {color: ink(budgets[bowl.budget].color), width: 1.6, dash: methods[bowl.method].dash}}));
    for (const best of [0, 1]) {
      const points = every.filter(each => shown(each) && each.best === best);
      traces.push(marks(points, "size", "loss", {size: best ? 8 : 5, opacity: best ? 1 : 0.4,
        symbol: points.map(each => methods[each.method].symbol), color: points.map(each => ink(budgets[each.budget].color))}));
    }
    const found = optima.filter(each => shown(each) && each.interior);
    traces.push({type: "scatter", mode: "markers", x: found.map(each => each.size), y: found.map(each => each.loss),
      hovertext: found.map(each => [methods[each.method].name, ...each.told].map(escaped).join("<br>")), hoverinfo: "text",
      marker: {symbol: "star", size: 13, color: found.map(each => ink(budgets[each.budget].color)),
        line: {width: 1, color: css("--text")}}});
    return traces;
  }

  const training = () => curves.filter(shown).map(curve => ({type: "scatter", mode: "lines+markers", x: curve.flop,
    y: curve.loss, customdata: curve.flop.map(() => curve.row), hovertext: curve.flop.map(() => ofRun(curve.row)),
    hoverinfo: "text", marker: {size: 5, symbol: methods[curve.method].symbol},
    line: {color: ink(budgets[curve.budget].color), width: 1.3, dash: methods[curve.method].dash}}));

  const [BUDGET, SIZE, LOSS] = ["compute budget C (FLOP)", "parameters N (non-embedding)", "held-out loss (nats)"];
  const FIGURES = {
    size: [() => ofMethods("flop", "size", "size"), BUDGET, SIZE],
    profiles: [profiles, SIZE, LOSS],
    frontier: [() => ofMethods("flop", "loss", "frontier"), BUDGET, LOSS],
    curves: [training, "FLOP spent", LOSS],
  };

  // --- Drawing and pointing ------------------------------------------------------------------------------------------

  const STEPS = [[1, 1.5, 2, 3, 5, 7], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]];
  const short = value => ["", "k", "M", "B", "T"].map((letter, i) => [value / 1000 ** i, letter])
    .filter(([part]) => part >= 1).map(([part, letter]) => `${+part.toPrecision(3)}${letter}`).at(-1) ?? `${value}`;

  // Round ticks of an axis from 10^low to 10^high, at most so many: 2e11, or 20k where the axis is of sizes.
  function ticks([low, high], most, sizes) {
    const decades = Array.from({length: Math.ceil(high) - Math.floor(low) + 1}, (_, i) => Math.floor(low) + i);
    let found = [];
    for (const [steps, apart] of [...STEPS.map(steps => [steps, 1]), ...[2, 3, 5, 10].map(apart => [[1], apart])]) {
      found = decades.filter(decade => decade % apart === 0).flatMap(decade => steps.map(step => [step, decade]))
        .filter(([step, decade]) => low <= Math.log10(step) + decade && Math.log10(step) + decade <= high);
      if (found.length <= most) break;
    }
    const values = found.map(each => Number(each.join("e")));
    return {tickvals: values, ticktext: found.map((each, i) => sizes ? short(values[i]) : each.join("e"))};
  }

  // A log axis over what is drawn at the beginning, so that switching a method off moves nothing.
  function axis(traces, letter, title) {
    const values = traces.filter(trace => trace.hoverinfo !== "skip").flatMap(trace => trace[letter]).filter(each => each > 0);
    const [low, high] = [Math.log10(Math.min(...values)), Math.log10(Math.max(...values))];
    const margin = 0.05 * Math.max(high - low, 0.1);
    return {type: "log", title: {text: title, standoff: 8}, range: [low - margin, high + margin], automargin: true,
      gridcolor: css("--row"), linecolor: css("--head"), zeroline: false, ticks: "outside", tickcolor: css("--head")};
  }

  const drawn = Object.entries(FIGURES).flatMap(([name, [traces, x, y]]) => {
    const figure = document.getElementById(`live-${name}`);
    if (!figure) return [];
    figure.hidden = false;
    return [{traces, x, y, first: traces(), plot: figure.querySelector(".plot"), pointed: figure.querySelector(".pointed")}];
  });

  const height = plot => plot.clientWidth < 600 ? 340 : 460;

  // Ticks for what the axes show now. Those of the loss are plotly's own.
  function mark({plot, x, y}) {
    const room = {xaxis: plot.clientWidth / 80, yaxis: height(plot) / 45};
    const found = Object.entries({xaxis: x, yaxis: y}).filter(([, title]) => title !== LOSS).flatMap(([name, title]) =>
      Object.entries(ticks(plot.layout[name].range, room[name], title === SIZE)).map(([key, list]) => [`${name}.${key}`, list]));
    Plotly.relayout(plot, Object.fromEntries(found));
  }

  function draw(each) {
    const {traces, x, y, first, plot} = each;
    Plotly.react(plot, traces(), {
      xaxis: axis(first, "x", x), yaxis: axis(first, "y", y), showlegend: false, hovermode: "closest",
      dragmode: touch ? false : "zoom", height: height(plot), margin: {l: 50, r: 12, t: 12, b: 40},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", uirevision: "kept",
      font: {color: css("--text"), size: plot.clientWidth < 600 ? 11 : 13, family: getComputedStyle(document.body).fontFamily},
      hoverlabel: {align: "left", bgcolor: css("--box"), bordercolor: css("--box-line"), font: {color: css("--text")}},
    }, {responsive: true, displayModeBar: false, scrollZoom: false});
    mark(each);
  }

  function tell(pointed, row) {
    if (row === undefined) return;
    const cells = [...rows[row].cells], link = cells[0].querySelector("a"), name = document.createElement(link ? "a" : "b");
    name.textContent = cells[0].textContent;
    if (link) name.href = link.getAttribute("href");
    const told = cells.slice(1, -1).map((each, i) => [heads[i + 1], each.textContent]).filter(([, text]) => text !== "–");
    const parts = [told.map(([head, text]) => `${head} ${text}`).join(", ")];
    if (data.same) parts.push(`all runs: ${data.same}`);
    if (link) parts.push(`folder ${decodeURIComponent(link.getAttribute("href"))}`);
    pointed.replaceChildren(name, `: ${parts.join("; ")}.`);
  }

  for (const each of drawn) {
    draw(each);
    for (const event of ["plotly_hover", "plotly_click"])
      each.plot.on(event, ({points: [point]}) => tell(each.pointed, point.customdata));
    each.plot.on("plotly_relayout", changed => Object.keys(changed).some(key => key.includes("range")) && mark(each));
  }
  document.body.classList.add("drawn");
  const again = () => drawn.forEach(draw);
  dark.addEventListener("change", again);
  addEventListener("resize", again);

  // --- The legend ----------------------------------------------------------------------------------------------------

  const SHAPES = {circle: "●", "triangle-up": "▲", diamond: "◆", square: "■", "triangle-down": "▼", star: "★"};
  function legend(kind, entries) {
    const line = document.getElementById(`legend-${kind}`);
    if (entries.length < 2) return line.remove();
    const set = off[kind], buttons = entries.map(({text, symbol, color}, place) => {
      const button = document.createElement("button"), mark = document.createElement("i");
      button.type = "button";
      mark.textContent = SHAPES[symbol] ?? "●";
      mark.setAttribute("aria-hidden", "true");
      mark.style.color = ink(color);
      button.append(mark, text);
      button.addEventListener("click", () => change(() => set.has(place) ? set.delete(place) : set.add(place)));
      return button;
    });
    const all = document.createElement("button");
    all.type = "button";
    all.textContent = "all";
    all.addEventListener("click", () => change(() => {
      const some = set.size > 0;
      entries.forEach((_, place) => some ? set.delete(place) : set.add(place));
    }));
    function change(action) {
      action();
      buttons.forEach((button, place) => button.setAttribute("aria-pressed", !set.has(place)));
      all.setAttribute("aria-pressed", !set.size);
      again();
    }
    line.append(...buttons, all);
    change(() => {});
  }
  document.getElementById("legend").hidden = false;
  legend("method", methods.map(({name, symbol, color}) => ({text: name, symbol, color})));
  legend("budget", budgets);
}
