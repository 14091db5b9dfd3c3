// Answer a budget that a reader types, from the recipes that the page brings. Every text was written by the report.
{
  const data = JSON.parse(document.getElementById("answers").textContent);
  const [form, input, shown, told, answer] = ["ask", "budget", "shown", "told", "answer"].map(
    id => document.getElementById(id));
  const UNKNOWN = "not an amount with a known unit; allowed: 1e17, 100 PFLOP, 2 PFLOP-days, 24 device-hours";
  const hours = new RegExp(`^(.*?)\\s*${data.hours}\\s*$`, "i");

  // The number of a text such as 1e17, 1,500,000, 6×10^18 FLOP or 2 PFLOP-days, as `embedscale recipe` reads it.
  function amount(text, units) {
    const plain = text.trim().toLowerCase().replace(/\s*[x×*·]\s*10\^?([-+]?\d+)/g, "e$1")
      .replace(/(\d)\s(?=\d{3}(?!\d))/g, "$1");
    const found = plain.match(/^([-+]?[\d.,_]+(?:e[-+]?\d+)?)\s*([a-z][a-z -]*)?$/);
    const unit = found && found[2] ? found[2].replaceAll(" ", "") : "";
    if (!found || (unit && !Object.hasOwn(units, unit))) throw UNKNOWN;
    if (found[1].includes(",") && !/^[-+]?\d{1,3}(,\d{3})+(\.\d*)?(e[-+]?\d+)?$/.test(found[1]))
      throw "the comma does not separate thousands: write 1.5 or 1,500,000";
    const value = Number(found[1].replaceAll(",", "").replaceAll("_", "")) * (unit ? units[unit] : 1);
    if (isNaN(value)) throw UNKNOWN;
    if (!(value > 0 && isFinite(value))) throw "out of range; allowed: above 0";
    return value;
  }

  function limit(text) {
    const found = text.match(hours);
    return found ? ["device-hours", amount(found[1], {})] : ["FLOP", amount(text, data.units)];
  }

  // For a shell.
  const quoted = text => /^[\w.,:+-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`;
  const command = text => `${data.command} ${quoted(text.trim())}`;

  function say(...parts) {
    told.replaceChildren(...parts.map(([tag, text]) => {
      const part = document.createElement(tag);
      part.textContent = text;
      return part;
    }));
    told.hidden = !parts.length;
  }

  function show(found) {
    shown.textContent = found.text;
    const list = document.createElement("dl");
    for (const [name, text, address] of found.terms) {
      const [term, value] = ["dt", "dd"].map(tag => list.appendChild(document.createElement(tag)));
      const place = address ? value.appendChild(document.createElement("a")) : value;
      if (address) place.href = address;
      [term.textContent, place.textContent] = [name, text];
    }
    answer.replaceChildren(list);
  }

  const apart = (a, b) => Math.abs(Math.log(a / b));

  function ask() {
    const text = input.value;
    input.removeAttribute("aria-invalid");
    let kind, value;
    try {
      [kind, value] = limit(text);
    } catch (error) {
      input.setAttribute("aria-invalid", "true");
      return say(["span", text.trim() ? `${text.trim()}: ${error}.` : "Type a budget, such as 6e18 or 100 PFLOP."]);
    }
    const known = data.answers[kind];
    if (!known.length) return say(["span", "These runs do not say how many device-hours they took. Give FLOP."]);
    const [first, last] = [known[0], known.at(-1)];
    if (value < first.at * 0.9995 || value > last.at * 1.0005)
      return say(["span", `This page knows ${first.text} to ${last.text}. For your budget: `], ["code", command(text)]);
    const nearest = known.reduce((a, b) => apart(a.at, value) <= apart(b.at, value) ? a : b);
    show(nearest);
    if (apart(nearest.at, value) < 5e-4) return say();
    const other = known[known.indexOf(nearest) + (value > nearest.at ? 1 : -1)];
    const same = !other || other.choice === nearest.choice;
    say(["span", `Shown is ${nearest.text}, the nearest budget that this page knows. `],
      ["span", other ? `At ${other.text}: ${same ? "the same choice" : other.choice}. ` : ""],
      ["span", "For exactly your budget: "], ["code", command(text)]);
  }

  form.hidden = false;
  form.addEventListener("submit", event => event.preventDefault());
  input.addEventListener("input", ask);
}
