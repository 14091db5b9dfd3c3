// Sort a table by the column whose head is clicked: numbers as numbers, texts as texts, empty cells last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map(row => [row.cells[column].textContent, row]);
    const empty = ([text]) => text === "" || text === "–";
    const numbers = rows.every(row => empty(row) || !isNaN(row[0]));
    rows.sort((a, b) => empty(a) - empty(b)
      || sign * (numbers ? a[0] - b[0] : a[0].localeCompare(b[0], undefined, {numeric: true})) || 0);
    body.append(...rows.map(([, row]) => row));
  }));
}
